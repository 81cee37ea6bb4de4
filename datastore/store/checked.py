"""Files that a manifest names by size and digest: nothing of them is handed out unchecked.

A file of this machine is read once through a small buffer, for its digest, and then mapped. Taking the digest of
the mapping would save nothing, and a bad sector would end the process with SIGBUS where a read is an error to catch.
"""

from collections.abc import Iterator

import pyarrow as pa

from datastore.digest import check_digest, digest_of, require_digest
from datastore.errors import CorruptError
from datastore.storage.base import Storage

__all__ = ["read_checked"]

_PIECE_BYTES = 2**20


def read_checked(storage: Storage, key: str, *, size_bytes: int, digest: bytes | str) -> pa.Buffer:
    """Return all bytes of `key`, mapped where the file is on this machine.

    Raises:
        MissingError: there is no such key.
        CorruptError: its size or its digest differs.
    """
    path = storage.local_path(key)
    if path is None or not size_bytes:
        raw = pa.py_buffer(storage.get(key))
        _check_size(raw.size, size_bytes, where=key)
        check_digest(raw, digest, where=key)
        return raw
    _check_size(storage.stat(key).size_bytes, size_bytes, where=key)
    require_digest(digest_of(_pieces(storage, key, size_bytes)), digest, where=key)
    with pa.memory_map(str(path)) as file:
        return file.read_buffer()


def _pieces(storage: Storage, key: str, size_bytes: int) -> Iterator[memoryview]:
    """Yield the bytes of `key` in order; each piece overwrites the one before."""
    buffer = memoryview(bytearray(min(size_bytes, _PIECE_BYTES)))
    for start in range(0, size_bytes, _PIECE_BYTES):
        piece = buffer[: min(_PIECE_BYTES, size_bytes - start)]
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
