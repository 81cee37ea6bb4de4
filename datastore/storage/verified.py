"""Files that a manifest names by size and digest: nothing of them is handed out unchecked.

Where a dataset lies on several disks a copy that is wrong is passed over for one that is right, and written anew.

Files are read into memory, never mapped: under a map, a bad sector or a file that somebody cuts ends the process by SIGBUS, where a
read is an error to catch, and what is looked at later need not be what was checked. The price is their size in memory.
"""

from collections.abc import Callable, Iterator
from typing import TypeVar

import pyarrow as pa
from typing_extensions import Buffer

from datastore.digest import check_digest, digest_bytes, digest_of, require_digest
from datastore.errors import CorruptError, MissingError, StorageError
from datastore.storage.base import Storage

__all__ = ["first_sound", "has_digest", "read_checked"]

T = TypeVar("T")

_PIECE_BYTES = 2**20


def read_checked(storage: Storage, key: str, *, size_bytes: int, digest: bytes | str) -> pa.Buffer:
    """Return all bytes of `key`, in memory.

    Raises:
        MissingError: there is no such key.
        CorruptError: its size or its digest differs.
        StorageError: it cannot be read.
    """
    return first_sound(
        storage,
        key,
        lambda place: _read(place, key, size_bytes=size_bytes, digest=digest),
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


def _read(storage: Storage, key: str, *, size_bytes: int, digest: bytes | str) -> pa.Buffer:
    if storage.local_path(key) is None or not size_bytes:
        raw = pa.py_buffer(storage.get(key))
        _check_size(raw.size, size_bytes, where=key)
        check_digest(raw, digest, where=key)
        return raw
    _check_size(storage.stat(key).size_bytes, size_bytes, where=key)
    raw = pa.allocate_buffer(size_bytes)
    require_digest(digest_of(_filled(storage, key, memoryview(raw))), digest, where=key)
    return raw


def _filled(storage: Storage, key: str, target: memoryview) -> Iterator[memoryview]:
    """Fill `target` with the bytes of `key` piece by piece, and yield each while it is in a core's cache."""
    for start in range(0, len(target), _PIECE_BYTES):
        piece = target[start : start + _PIECE_BYTES]
        storage.read_into(key, start, piece)
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
