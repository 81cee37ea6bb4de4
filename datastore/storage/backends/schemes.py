"""The abilities of each backend beyond what all have: one row per scheme, and a cautious one for schemes we do not know.

A row that promises too little costs speed or the second writer; one that promises too much costs data. So a scheme that a
plugin registers with fsspec gets the cautious row: a write goes to a hidden file that is moved over its target, and nobody is
told that put-if-absent holds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["BACKENDS", "CAUTIOUS", "S3_CONFIG", "Backend", "backend_of"]

Listing = Literal["ordered", "any", "none"]


@dataclass(frozen=True, slots=True)
class Backend:
    """What one scheme can do."""

    creates: str = ""
    """How put-if-absent is decided by the server, in its own words; "" if it is not: then a dataset has one writer."""

    creates_in_one: bool = False
    """The condition holds for a single request only: Ceph 16.2 ignores it at the end of an upload in parts."""

    largest_put_bytes: int | None = None
    """What fits into a single request, if there is a limit."""

    part_bytes: int | None = None
    """The size of a part where large values are sent in several requests; None: always one stream."""

    move: Callable[[Any, str, str], object] = lambda fs, source, target: fs.mv(source, target)
    """Give a file of an fsspec file system another name, replacing what has it."""

    replaces: bool = False
    """A write shows the old bytes or the new, never a part; otherwise we write beside the key, and move."""

    listing: Listing = "any"
    """Whether a listing comes in the order of the keys' bytes, in any order (we sort), or not at all."""

    ranges: bool = True
    """A part of a value can be read without the rest; False: it depends on the server, and is asked once."""

    reads_from_zero: bool = False
    """The library reads a whole value in several requests, which may see two versions; "from byte 0 on" is one."""

    repeats: bool = False
    """Below the library a request may be sent again unseen, as aiohttp does when a connection was lost: then the server may
    refuse a conditional write for what its first sending wrote, and only the bytes stored tell."""

    threads: bool = False
    """Its connection serves several threads at once; otherwise they take turns. paramiko's hands one thread's answer to
    another and then waits for ever, and ftplib mixes them up."""

    writable: bool = True

    requires: str = ""
    """What pip installs for it; "" if this package can do it alone."""

    options: tuple[tuple[str, object], ...] = ()
    """Options for the constructor of fsspec's file system."""


_UNCACHED = (("use_listings_cache", False),)
_MIB = 2**20

CAUTIOUS = Backend()

S3_CONFIG: dict[str, object] = {
    "retries": {"total_max_attempts": 1, "mode": "standard"},
    "response_checksum_validation": "when_required",
}
"""What botocore is told, by whichever of our clients asks it: retries are ours alone, and an answer is checked against our own
digests. S3's checksums are not: they cost a copy of every byte, and a gateway that sends that of the whole object with a
part of it has every partial read fail (rclone 1.75 does)."""

# s3fs sends If-None-Match for what it writes in one request since 2025.7 (its #974), and reads large objects in several
# requests since 2026.3 (its #1007). Both s3fs and botocore repeat requests; one layer, ours, is enough.
_S3 = Backend(
    creates="If-None-Match: *",
    creates_in_one=True,
    largest_put_bytes=5 * 2**30,
    part_bytes=64 * _MIB,
    replaces=True,
    listing="ordered",
    reads_from_zero=True,
    repeats=True,
    threads=True,
    requires="llm-datastore[s3]",
    options=(*_UNCACHED, ("config_kwargs", S3_CONFIG)),
)
_GCS = Backend(
    creates="ifGenerationMatch=0",
    part_bytes=50 * _MIB,
    replaces=True,
    listing="ordered",
    repeats=True,
    threads=True,
    requires="gcsfs",
    options=_UNCACHED,
)
_AZURE = Backend(
    creates="If-None-Match: *",
    part_bytes=4 * _MIB,
    replaces=True,
    repeats=True,
    threads=True,
    requires="adlfs",
    options=_UNCACHED,
)
_HDFS = Backend(threads=True, requires="pyarrow, and Hadoop's libhdfs")
_SFTP = Backend(requires="paramiko")
_WEBDAV = Backend(
    threads=True,
    # Its `mv` copies, and refuses to replace.
    move=lambda fs, source, target: fs.client.move(source, target, overwrite=True),
    requires="webdav4[fsspec]",
)
_WEB = Backend(writable=False, listing="none", ranges=False)

BACKENDS: dict[str, Backend] = {
    "file": Backend(threads=True),
    "memory": Backend(replaces=True, threads=True),
    "s3": _S3,
    "s3a": _S3,
    "gs": _GCS,
    "gcs": _GCS,
    "abfs": _AZURE,
    "abfss": _AZURE,
    "az": _AZURE,
    "hdfs": _HDFS,
    "sftp": _SFTP,
    "ssh": _SFTP,
    "webdav": _WEBDAV,
    "http": _WEB,
    "https": _WEB,
    "zip": Backend(writable=False, listing="ordered"),
}
"""Scheme -> what it can do through fsspec. `file`, `memory`, `s3`, `http` and `zip` have implementations of their own here,
which do more: fsspec's for files and memory look first and write then, so that two writers can both win."""


def backend_of(scheme: str) -> Backend:
    """Return the row of a scheme; the cautious one if it has none."""
    return BACKENDS.get(scheme, CAUTIOUS)
