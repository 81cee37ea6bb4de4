"""Files that a manifest names by size and digest: nothing of them is handed out unchecked.

Where a dataset lies on several disks a copy that is wrong is passed over for one that is right, and written anew.

A file of this machine is read once through a small buffer, for its digest, and then mapped. Taking the digest of
the mapping would save nothing, and a bad sector would end the process with SIGBUS where a read is an error to catch.
"""

import mmap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
from typing_extensions import Buffer

from datastore.digest import check_digest, digest_bytes, digest_of, require_digest
from datastore.errors import CorruptError, MissingError, StorageError
from datastore.storage.base import Storage
from datastore.storage.errors import explain

__all__ = ["Forget", "check_range", "first_sound", "has_digest", "map_checked", "read_checked"]

T = TypeVar("T")

Forget = Callable[[], None]

_PIECE_BYTES = 2**20


def read_checked(storage: Storage, key: str, *, size_bytes: int, digest: bytes | str) -> pa.Buffer:
    """Return all bytes of `key`, mapped where the file is on this machine.

    Raises:
        MissingError: there is no such key.
        CorruptError: its size or its digest differs.
    """
    return first_sound(
        storage,
        key,
        lambda place: _read(place, key, size_bytes=size_bytes, digest=digest, map_file=_mapped)[0],
        is_good=has_digest(digest),
    )


def map_checked(storage: Storage, key: str, *, size_bytes: int, digest: bytes | str) -> tuple[pa.Buffer, Forget]:
    """Return as `read_checked`, and how to take mapped pages out of this process until they are touched again.

    A page of a mapped file counts as memory of the process once it was touched, with the megabytes around it (Linux
    maps a whole folio of its cache). Forgetting frees nothing but this count; the bytes stay in the kernel's cache.
    Each map holds a descriptor: it is for the few files that stay open, not for shards.
    """
    return first_sound(
        storage,
        key,
        lambda place: _read(place, key, size_bytes=size_bytes, digest=digest, map_file=_mapped_forgettably),
        is_good=has_digest(digest),
    )


def first_sound(storage: Storage, key: str, read: Callable[[Storage], T], *, is_good: Callable[[bytes], bool]) -> T:
    """Return what `read` makes of `key`, from the first of its copies that it does not find corrupt; have those healed.

    `is_good` tells from all bytes of `key` whether they are those that were written.
    """
    try:
        return read(storage)
    except CorruptError as error:
        copies = storage.copies(key)
        if len(copies) < 2:
            raise
        damage = error
    for place in copies:
        try:
            found = read(place)
        except (CorruptError, MissingError, StorageError):
            continue
        storage.heal(key, is_good)
        return found
    raise damage


def has_digest(digest: bytes | str) -> Callable[[Buffer], bool]:
    """Return a function that tells whether bytes have `digest` (16 bytes, or 32 hex digits)."""
    wanted = digest if isinstance(digest, bytes) else bytes.fromhex(digest)
    return lambda raw: digest_bytes(raw) == wanted


def _read(
    storage: Storage,
    key: str,
    *,
    size_bytes: int,
    digest: bytes | str,
    map_file: Callable[[Path], tuple[pa.Buffer, Forget]],
) -> tuple[pa.Buffer, Forget]:
    path = storage.local_path(key)
    if path is None or not size_bytes:
        raw = pa.py_buffer(storage.get(key))
        _check_size(raw.size, size_bytes, where=key)
        check_digest(raw, digest, where=key)
        return raw, _nothing
    _check_size(storage.stat(key).size_bytes, size_bytes, where=key)
    check_range(storage, key, (0, size_bytes), digest=digest, where=key)
    try:
        return map_file(path)
    except OSError as error:
        raise explain(error, key=key, url=storage.url) from None


def _mapped(path: Path) -> tuple[pa.Buffer, Forget]:
    # Arrow lets go of the descriptor; `mmap.mmap` keeps one as long as there is the map (Python 3.11).
    with pa.memory_map(str(path)) as file:
        return file.read_buffer(), _nothing


def _mapped_forgettably(path: Path) -> tuple[pa.Buffer, Forget]:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    forget = partial(mapped.madvise, mmap.MADV_DONTNEED) if hasattr(mmap, "MADV_DONTNEED") else _nothing
    return pa.py_buffer(mapped), forget


def _nothing() -> None:
    """There is nothing to forget."""


def check_range(storage: Storage, key: str, span: tuple[int, int], *, digest: bytes | str, where: str) -> None:
    """Read the bytes `span` of `key` through a small buffer, and raise unless they have that digest.

    Raises:
        MissingError: there is no such key.
        CorruptError: the digest differs; `where` names the bytes.
        StorageError: they cannot be read, or the file ends before.
    """
    require_digest(digest_of(_pieces(storage, key, *span)), digest, where=where)


def _pieces(storage: Storage, key: str, start: int, stop: int) -> Iterator[memoryview]:
    """Yield the bytes `[start, stop)` of `key` in order; each piece overwrites the one before."""
    buffer = memoryview(bytearray(min(stop - start, _PIECE_BYTES)))
    for at in range(start, stop, _PIECE_BYTES):
        piece = buffer[: min(_PIECE_BYTES, stop - at)]
        storage.read_into(key, at, piece)
        yield piece


def _check_size(found_bytes: int, size_bytes: int, *, where: str) -> None:
    if found_bytes != size_bytes:
        raise CorruptError(
            "file has another size than its manifest says",
            where=where,
            expected=size_bytes,
            found=found_bytes,
            hint="Restore this file from a copy.",
        )
