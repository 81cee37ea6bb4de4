"""The bytes of a source: in chunks, decompressed on the way, and cut into records that many may read.

A damaged stream is a fact about the data, not a failure of the program: what comes before the damage is delivered,
then the stream ends and `fault` says why. Nothing is trusted to be small: a chunk of compressed bytes can only become
some 128 MiB, and a file that keeps growing beyond `max_expansion` ends as a `bomb`.

A file can be cut anywhere. A record belongs to the range that holds its first byte; a reader of a range looks one separator back and reads on
past its end. So over any cuts every record is read exactly once, whoever reads which range. The price is one
separator and one partial record read twice per cut.
"""

import bz2
import lzma
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import zstandard
from typing_extensions import override

from datastore.dataset.journal import Codec
from datastore.errors import ConfigError
from datastore.storage.base import Storage

__all__ = [
    "HEAD_BYTES",
    "Fault",
    "RecordPiece",
    "SourceStream",
    "can_be_cut",
    "cut_evenly",
    "lookback",
    "open_stream",
    "read_chunks",
    "split_records",
]


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


def read_chunks(
    storage: Storage, key: str, *, start: int, size_bytes: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Yield bytes `[start, size_bytes)` of `key`."""
    for at in range(start, size_bytes, chunk_bytes):
        yield from storage.get_ranges(key, [(at, min(at + chunk_bytes, size_bytes))])


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


HEAD_BYTES = 200
"""What is kept of a record that is too long, to show which one it was."""


class RecordPiece(NamedTuple):
    """One record: its bytes, without the separator. If `length` is more than `len(data)`, it was over the limit."""

    offset: int
    data: bytes
    length: int
    ended: bool
    """Whether a separator follows; the last record of a file may do without."""


def can_be_cut(separator: bytes) -> bool:
    r"""Return whether `separator` is found the same from wherever one starts: it must not overlap itself.

    In `x\n\n\ny` a reader that starts at the first byte and one that starts in the middle disagree about `\n\n`.
    """
    return bool(separator) and not any(separator.endswith(separator[:size]) for size in range(1, len(separator)))


def cut_evenly(size_bytes: int, target_bytes: int) -> list[tuple[int, int]]:
    """Return ranges that cover `[0, size_bytes)` in order, each of about `target_bytes`."""
    count = max(1, round(size_bytes / target_bytes))
    bounds = [size_bytes * i // count for i in range(count + 1)]
    return list(pairwise(bounds))


def lookback(start: int, separator: bytes) -> int:
    """Return the position from which `split_records` must be fed for a range that begins at `start`."""
    return max(0, start - len(separator))


def split_records(
    chunks: Iterable[bytes], *, separator: bytes, start: int = 0, stop: int | None = None, limit_bytes: int
) -> Iterator[RecordPiece]:
    """Yield the records that begin in `[start, stop)`; those without a byte are none.

    `chunks` are the file's bytes from `lookback(start, separator)` to its end; no more of them are taken than needed.
    An empty separator makes one record of everything. Memory: `limit_bytes` and two chunks.
    """
    if start and not separator:
        raise ConfigError("a file without a separator cannot be cut", start=start, hint="Read it from its first byte.")
    scan = _Scan(separator, limit_bytes, position=lookback(start, separator), inside=start == 0)
    for chunk in chunks:
        for piece in scan.feed(chunk):
            if stop is not None and piece.offset >= stop:
                return
            yield piece
        if stop is not None and scan.next_record >= stop:
            return
    yield from scan.finish()


class _Scan:
    """A separator search over chunks. Invariant: `rest` is what follows the last separator, or its head and tail."""

    def __init__(self, separator: bytes, limit_bytes: int, *, position: int, inside: bool) -> None:
        self.separator = separator
        self.limit_bytes = limit_bytes
        self.begin = position
        self.rest = b""
        self.inside = inside
        """Whether the record at `begin` is ours; false until the first separator of a range that starts later."""
        self.head = b""
        self.dropped = 0
        """Bytes of the current record that are no longer in `rest`: its `head` is kept, if it is ours."""

    @property
    def next_record(self) -> int:
        """The first position at which a record can begin that was not given out yet."""
        if self.inside:
            return self.begin
        return self.begin + self.dropped + len(self.separator)

    def feed(self, chunk: bytes) -> Iterator[RecordPiece]:
        if not self.separator:
            self.rest += chunk
        else:
            parts = (self.rest + chunk).split(self.separator)
            self.rest = parts.pop()
            for part in parts:
                if self.inside and (part or self.dropped):
                    yield self._piece(part, ended=True)
                self.begin += self.dropped + len(part) + len(self.separator)
                self.inside, self.dropped = True, 0
        self._drop_surplus()

    def finish(self) -> Iterator[RecordPiece]:
        if self.inside and (self.rest or self.dropped):
            yield self._piece(self.rest, ended=False)

    def _piece(self, part: bytes, *, ended: bool) -> RecordPiece:
        length = self.dropped + len(part)
        if length <= self.limit_bytes:
            return RecordPiece(self.begin, part, length, ended)
        return RecordPiece(self.begin, self.head if self.dropped else self._cut_head(part), length, ended)

    def _drop_surplus(self) -> None:
        """Forget what can no longer matter of a record that is too long or not ours."""
        kept = max(0, len(self.separator) - 1)  # These may be the beginning of a separator, not of the record.
        if self.inside and self.dropped + len(self.rest) <= self.limit_bytes + kept:
            return
        if self.inside and not self.dropped:
            self.head = self._cut_head(self.rest)
        surplus = max(0, len(self.rest) - kept)
        self.rest = self.rest[surplus:]
        self.dropped += surplus

    def _cut_head(self, data: bytes) -> bytes:
        return data[: min(HEAD_BYTES, self.limit_bytes)]
