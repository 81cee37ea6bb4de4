"""A file as a stream of plain bytes, whatever it is compressed by: its first bytes say so, not its name.

Damage is never the end of the data: whoever reads past what is there gets an error with the name of the file.
"""

import io
from collections.abc import Iterator

from typing_extensions import Buffer, override

from datastore.errors import CorruptError
from datastore.formats.decompression import CHUNK_BYTES, codec_of, open_stream
from datastore.storage.base import Storage

__all__ = ["PlainFile", "plain_chunks"]

_MAX_EXPANSION = 200

_MAGIC_BYTES = 8


def plain_chunks(storage: Storage, key: str) -> Iterator[bytes]:
    """Yield the bytes of `key`, decompressed.

    Raises:
        CorruptError: it is damaged, ends too early, or grows more than 200 times.
    """
    size = storage.stat(key).size_bytes
    stored = (
        chunk
        for at in range(0, size, CHUNK_BYTES)
        for chunk in storage.get_ranges(key, [(at, min(at + CHUNK_BYTES, size))])
    )
    head = storage.get_ranges(key, [(0, min(_MAGIC_BYTES, size))])[0] if size else b""
    stream = open_stream(stored, codec=codec_of(head), max_expansion=_MAX_EXPANSION)
    yield from stream
    if stream.fault is not None:
        raise CorruptError(f"the file is damaged: {stream.fault}", where=key, hint="Restore it from a copy.")


class PlainFile(io.RawIOBase):
    """The same as a file to be read from its start to its end, once."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._chunks = plain_chunks(storage, key)
        self._left = b""
        self._at = 0

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        while self._at == len(self._left):
            self._left, self._at = next(self._chunks, b""), 0
            if not self._left:
                return 0
        with memoryview(buffer) as view, view.cast("B") as target:
            size = min(len(target), len(self._left) - self._at)
            target[:size] = self._left[self._at : self._at + size]
        self._at += size
        return size
