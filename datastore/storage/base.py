"""The contract between this package and any byte store.

Nineteen members: two properties and eight methods that a backend must have, and nine with a default, five of which say
what a storage on several disks is made of. A backend that passes `datastore.testing.StorageContract` can hold a dataset
and a run; nothing else about it matters.

Promises every backend keeps:

1. `put` and `put_new` are atomic: a reader sees the old bytes, the new bytes, or nothing.
2. `put_new` never overwrites. Of any number of concurrent calls exactly one succeeds (unless `exclusive` is
   False: then the backend cannot promise it, and the store on top allows one writer only).
3. A successful write is durable and visible to the next read from any process.
4. Every failure is an error of `datastore.errors`: `MissingError`, `ConflictError`, `StorageError`, `ConfigError`.

Promise 2 is what commits rest on. POSIX gives it through `link(2)`, S3 through `If-None-Match: *`.

Some gateways take that header and ignore it. So a backend is asked once, when a dataset is created, whether its put-if-absent
is real (`probe_exclusive`, three requests); the answer is recorded there.
"""

import os
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from typing_extensions import Buffer, override

from datastore.errors import ConfigError, ConflictError
from datastore.storage.statistics import OperationStatistics

__all__ = ["ReadOnly", "Root", "Stat", "Storage", "StorageLike", "check_key", "probe_exclusive"]

_BAD_KEY = re.compile(r"[\\\x00-\x1f\ud800-\udfff]|(?:\A|/)(?:\.{0,2}|\.(?:[^/]*\.)?tmp)(?:/|\Z)")
"""A bad character anywhere, or a part that is empty, dots, or a temporary name."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What a backend knows of one key without reading it."""

    key: str
    size_bytes: int
    modified: float
    """Seconds since the epoch, by the backend's clock; 0.0 if it does not say."""


@dataclass(frozen=True, slots=True)
class Root:
    """One of the places of a storage. Its id, not its address, decides what lies there: a disk may be mounted elsewhere."""

    id: str
    storage: "Storage"


@runtime_checkable
class Storage(Protocol):
    """Bytes by key below one root. Thread-safe; rebuilt in other processes by `open_storage(url)`."""

    @property
    def url(self) -> str:
        """The root as the user would type it, without credentials."""
        ...

    @property
    def exclusive(self) -> bool:
        """Whether promise 2 holds on this backend."""
        ...

    def get(self, key: str) -> bytes:
        """Return all bytes of `key`.

        Raises:
            MissingError: there is no such key.
        """
        ...

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Return the bytes `[start, stop)` of `key` for each range, in the order given.

        Raises:
            MissingError: there is no such key.
            StorageError: the object ends before `stop`.
        """
        ...

    def read_into(self, key: str, start: int, target: Buffer) -> None:
        """Fill the writable `target` with the bytes of `key` from `start` on, without a further copy where possible.

        Raises:
            MissingError: there is no such key.
            StorageError: the object ends before `target` is full.
        """
        ...

    def put(self, key: str, *chunks: Buffer) -> None:
        """Write the chunks, laid end to end, replacing what was there."""
        ...

    def put_hint(self, key: str, *chunks: Buffer) -> None:
        """Write what nobody relies on: as `put`, but it may be gone for a moment, and gone or not whole after a power cut."""
        self.put(key, *chunks)

    def put_new(self, key: str, *chunks: Buffer) -> None:
        """Write the chunks unless `key` exists. At least one byte: an empty exclusive write truncates on some gateways.

        If an answer was lost, the bytes stored decide who wrote them: let those of different writers differ.

        Raises:
            ConflictError: the key exists; its bytes are untouched.
        """
        ...

    def list(self, folder: str = "") -> Iterator[Stat]:
        """Yield every key at any depth below `folder` ("" is the root) in lexicographic order; unfinished writes never show."""
        ...

    def delete(self, key: str) -> None:
        """Remove `key`; a key that is not there is no error."""
        ...

    def stat(self, key: str) -> Stat:
        """Return the size and time of `key`.

        Raises:
            MissingError: there is no such key.
        """
        ...

    def local_path(self, key: str) -> Path | None:
        """Return the file of this machine that holds `key`, else None."""
        ...

    def adopt(self, key: str, path: Path) -> bool:
        """Have `key` be the file `path` of this machine, under a second name, and return True; if it would have to be copied, return False.

        For files that nobody writes to again: each name can be deleted without the other. By default nothing is adopted.

        Raises:
            ConflictError: the key exists.
            StorageError: there is no such file.
        """
        del path
        check_key(key)
        return False

    def statistics(self) -> dict[str, OperationStatistics]:
        """Return what each kind of operation ("get", "put", ...) has cost since this object was made; by default nothing."""
        return {}

    def copies(self, key: str) -> "Sequence[Storage]":
        """Return the places that should each hold all of `key`, in the order in which to read them; by default this one.

        Who finds that the bytes are not what was written asks the others, then calls `heal`.
        """
        check_key(key)
        return (self,)

    def heal(self, key: str, is_good: Callable[[bytes], bool]) -> None:
        """Have the copies of `key` that are not good written anew from one that is, if there is one, some time soon."""
        del is_good
        check_key(key)  # By default there are no others.

    def clear_unfinished(self, *, before: float, dry_run: bool = False) -> "Sequence[Stat]":
        """Remove what writers left unfinished that began before `before` (seconds since the epoch) and died; return it.

        With `dry_run` nothing is removed. The default is for backends on which nothing is left: it finds nothing.
        """
        del before, dry_run
        return ()

    def roots(self) -> "Sequence[Root]":
        """Return the places that it is made of, the one that decides first; by default itself, whose id is empty."""
        return (Root("", self),)

    def homes(self, key: str) -> "Sequence[Root]":
        """Return the roots that should have `key`, the first to ask first; by default all there are."""
        check_key(key)
        return self.roots()

    def lost(self) -> "Sequence[str]":
        """Return the URLs of the roots that are not there now; by default none."""
        return ()

    def behind(self) -> "Collection[str]":
        """Return the ids of the roots that have missed a write; by default none."""
        return ()


class ReadOnly(Storage):
    """What can be read and not be written: a web server, an archive."""

    @property
    @override
    def exclusive(self) -> bool:
        return False

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        raise self._refusal(key)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        raise self._refusal(key)

    @override
    def delete(self, key: str) -> None:
        raise self._refusal(key)

    @override
    def heal(self, key: str, is_good: Callable[[bytes], bool]) -> None:
        pass

    @override
    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _refusal(self, key: str) -> ConfigError:
        check_key(key)
        return ConfigError(
            "this kind of storage can only be read",
            url=self.url,
            hint="Copy it to a disk or a bucket, and write there.",
        )


def check_key(key: str) -> str:
    """Return `key` if it is a plain relative path that cannot leave the root.

    Raises:
        ConfigError: empty or absolute; a part that is empty, `.`, `..` or named like an unfinished write (`.*.tmp`); a
            backslash, a control character or a half surrogate, which not every backend can store.
    """
    if _BAD_KEY.search(key):
        raise ConfigError("not a valid key", key=key, hint="Use a relative path of plain names, parted by '/'.")
    return key


StorageLike = str | os.PathLike[str] | Storage
"""A storage, or the URL of one."""


def probe_exclusive(storage: Storage) -> bool:
    """Return whether `storage` refuses the second of two `put_new` of one key; leave nothing behind.

    Raises:
        StorageError: the probe object cannot be written.
    """
    key = f"probe-{uuid.uuid4().hex}"
    storage.put_new(key, b"first")
    try:
        storage.put_new(key, b"second")
    except ConflictError:
        return storage.exclusive and storage.get(key) == b"first"
    else:
        return False
    finally:
        storage.delete(key)
