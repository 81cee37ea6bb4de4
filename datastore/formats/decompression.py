"""Compressed bytes as plain ones, chunk by chunk: gzip, Zstandard, bzip2 and xz.

A damaged stream is a fact about the data, not a failure of the program: what comes before the damage is delivered,
then the stream ends and `fault` says why. Nothing is trusted to be small: a chunk of compressed bytes can only become
some 128 MiB, and a file that keeps growing beyond `max_expansion` ends as a `bomb`.
"""

import bz2
import lzma
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, Protocol

import zstandard
from typing_extensions import override

__all__ = ["CHUNK_BYTES", "Codec", "Fault", "SourceStream", "codec_of", "open_stream"]

Codec = Literal["", "gz", "zst", "bz2", "xz"]
"""How a file is compressed, "" for not at all."""

Fault = Literal["truncated", "corrupt_stream", "bomb"]

CHUNK_BYTES = 4 * 2**20
"""Of one read from storage, and at most of one chunk of decompressed gzip."""

_CHUNK_AT_LEAST_BYTES = 2**20
"""Of decompressed bytes: a record that spans chunks is copied once for each of them."""

_BOMB_FREE_BYTES = 64 * 2**20
"""Below this much output nothing is called a bomb."""

_ZSTD_FEED_BYTES = 4096
"""zstd can make 128 KiB of every 4 bytes (RLE blocks), and its Python object has no limit on output."""

_XZ_MEMORY_BYTES = 2**28
"""What decompressing may take: `xz -9` needs 65 MiB."""

_ZSTD_WINDOW_BYTES = 2**27
"""What a frame may ask for as its window; `zstd --long=27` makes these, more needs a flag when decompressing, too."""


class SourceStream(Protocol):
    """Chunks of bytes to iterate over once."""

    fault: Fault | None
    """Why the stream ended early; None while it has not."""

    def __iter__(self) -> Iterator[bytes]: ...


_MAGIC: dict[bytes, Codec] = {b"\x1f\x8b\x08": "gz", b"\x28\xb5\x2f\xfd": "zst", b"BZh": "bz2", b"\xfd7zXZ\0": "xz"}


def codec_of(head: bytes) -> Codec:
    """Return how a file that begins with `head` is compressed.

    >>> codec_of(b"BZh91AY")
    'bz2'
    """
    return next((codec for magic, codec in _MAGIC.items() if head.startswith(magic)), "")


def open_stream(chunks: Iterable[bytes], *, codec: Codec, max_expansion: int) -> SourceStream:
    """Return the stream whose stored form is `chunks`; concatenated members, frames and streams are one."""
    if codec == "gz":
        return _Gunzip(chunks, max_expansion)
    if codec == "bz2":
        return _Unblock(chunks, max_expansion, bz2.BZ2Decompressor)
    if codec == "xz":
        return _Unblock(chunks, max_expansion, partial(lzma.LZMADecompressor, memlimit=_XZ_MEMORY_BYTES))
    if codec == "zst":
        return _Unzstd(chunks, max_expansion)
    return _Plain(chunks)


class _Plain(SourceStream):
    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.fault: Fault | None = None
        self._chunks = chunks

    @override
    def __iter__(self) -> Iterator[bytes]:
        return iter(self._chunks)


class _Compressed(SourceStream):
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


class _Unblock(_Compressed):
    """bzip2 and xz, whose decompressors are alike."""

    def __init__(
        self,
        chunks: Iterable[bytes],
        max_expansion: int,
        make: "Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]",
    ) -> None:
        super().__init__(chunks, max_expansion)
        self._make = make

    @override
    def _decompress(self) -> Iterator[bytes]:
        member, begun = self._make(), False
        try:
            for chunk in self._chunks:
                self._taken += len(chunk)
                rest = chunk
                while rest or (begun and not member.eof and not member.needs_input):
                    if member.eof:
                        rest = rest.lstrip(b"\0")  # xz pads with zeros between streams.
                        member, begun = self._make(), False
                        continue
                    begun = True
                    data = member.decompress(rest, CHUNK_BYTES)
                    rest = member.unused_data if member.eof else b""
                    if data:
                        yield data
        except (OSError, EOFError, lzma.LZMAError):
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
