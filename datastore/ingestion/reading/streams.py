"""The bytes of a source, in chunks, decompressed on the way.

A damaged stream is a fact about the data, not a failure of the program: what comes before the damage is delivered,
then the stream ends and `fault` says why. Nothing is trusted to be small: a chunk of compressed bytes can only become
some 128 MiB, and a file that keeps growing beyond `max_expansion` ends as a `bomb`.
"""

import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Literal, Protocol

import zstandard
from typing_extensions import override

from datastore.storage.base import Storage

__all__ = ["Codec", "Fault", "Stream", "open_stream", "read_chunks"]

Codec = Literal["", "gz", "zst"]
Fault = Literal["truncated", "corrupt_stream", "bomb"]

CHUNK_BYTES = 4 * 2**20
"""Of one read from storage, and at most of one chunk of decompressed gzip."""

_CHUNK_AT_LEAST_BYTES = 2**20
"""Of decompressed bytes: a record that spans chunks is copied once for each of them."""

_BOMB_FREE_BYTES = 64 * 2**20
"""Below this much output nothing is called a bomb."""

_ZSTD_FEED_BYTES = 4096
"""zstd can make 128 KiB of every 4 bytes (RLE blocks), and its Python object has no limit on output."""

_ZSTD_WINDOW_BYTES = 2**27
"""What a frame may ask for as its window; `zstd --long=27` makes these, more needs a flag when decompressing, too."""


class Stream(Protocol):
    """Chunks of bytes to iterate over once."""

    fault: Fault | None
    """Why the stream ended early; None while it has not."""

    def __iter__(self) -> Iterator[bytes]: ...


def read_chunks(
    storage: Storage, key: str, *, start: int, size_bytes: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Yield bytes `[start, size_bytes)` of `key`."""
    for at in range(start, size_bytes, chunk_bytes):
        yield from storage.get_ranges(key, [(at, min(at + chunk_bytes, size_bytes))])


def open_stream(chunks: Iterable[bytes], *, codec: Codec, max_expansion: int) -> Stream:
    """Return the stream whose stored form is `chunks`; concatenated gzip members and zstd frames are one stream."""
    if codec == "gz":
        return _Gunzip(chunks, max_expansion)
    if codec == "zst":
        return _Unzstd(chunks, max_expansion)
    return _Plain(chunks)


class _Plain(Stream):
    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.fault: Fault | None = None
        self._chunks = chunks

    @override
    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)


class _Compressed(Stream):
    def __init__(self, chunks: Iterable[bytes], max_expansion: int) -> None:
        self.fault: Fault | None = None
        self._chunks = chunks
        self._max_expansion = max_expansion
        self._taken = 0
        self._given = 0

    @override
    def __iter__(self) -> Iterator[bytes]:
        pending: list[bytes] = []
        size = 0
        for data in self._decompress():
            self._given += len(data)
            if self._given > max(_BOMB_FREE_BYTES, self._taken * self._max_expansion):
                self.fault = "bomb"
                break
            pending.append(data)
            size += len(data)
            if size >= _CHUNK_AT_LEAST_BYTES:
                yield b"".join(pending)
                pending, size = [], 0
        if pending:
            yield b"".join(pending)

    @abstractmethod
    def _decompress(self) -> Iterator[bytes]:
        """Yield the data in pieces of any size; set `fault` where it ends too early or is damaged."""


class _Gunzip(_Compressed):
    @override
    def _decompress(self) -> Iterator[bytes]:
        member, begun = zlib.decompressobj(wbits=31), False
        try:
            for chunk in self._chunks:
                self._taken += len(chunk)
                rest = chunk
                while rest:
                    if member.eof:
                        member, begun = zlib.decompressobj(wbits=31), False
                        rest = rest.lstrip(b"\0")  # Tapes and some tools pad with zeros.
                        continue
                    begun = True
                    data = member.decompress(rest, CHUNK_BYTES)
                    rest = member.unused_data if member.eof else member.unconsumed_tail
                    if data:
                        yield data
        except zlib.error:
            self.fault = "corrupt_stream"
            return
        if begun and not member.eof:
            self.fault = "truncated"


class _Unzstd(_Compressed):
    @override
    def _decompress(self) -> Iterator[bytes]:
        maker = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        frame, begun = maker.decompressobj(), False
        try:
            for piece in self._pieces():
                rest = piece
                while rest:
                    if frame.eof:
                        frame, begun = maker.decompressobj(), False
                    begun = True
                    data = frame.decompress(rest)
                    rest = frame.unused_data if frame.eof else b""
                    if data:
                        yield data
        except zstandard.ZstdError:
            self.fault = "corrupt_stream"
            return
        if begun and not frame.eof:
            self.fault = "truncated"

    def _pieces(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            for at in range(0, len(chunk), _ZSTD_FEED_BYTES):
                piece = chunk[at : at + _ZSTD_FEED_BYTES]
                self._taken += len(piece)
                yield piece
