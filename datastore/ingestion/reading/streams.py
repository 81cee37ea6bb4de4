"""The bytes of a source: in chunks, and cut into records that many may read.

A file can be cut anywhere. A record belongs to the range that holds its first byte; a reader of a range looks one separator back and reads on
past its end. So over any cuts every record is read exactly once, whoever reads which range. The price is one
separator and one partial record read twice per cut.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from datastore.errors import ConfigError
from datastore.formats.decompression import CHUNK_BYTES
from datastore.storage.base import Storage

__all__ = [
    "HEAD_BYTES",
    "RecordPiece",
    "StoredBytes",
    "can_be_cut",
    "cut_evenly",
    "lookback",
    "read_chunks",
    "split_records",
]


def read_chunks(
    storage: Storage, key: str, *, start: int, size_bytes: int, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Yield bytes `[start, size_bytes)` of `key`."""
    for at in range(start, size_bytes, chunk_bytes):
        yield from storage.get_ranges(key, [(at, min(at + chunk_bytes, size_bytes))])


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


class StoredBytes:
    """How many stored bytes of a task have been read: of a compressed file, fewer than its text has."""

    def __init__(self, total_bytes: int, read_bytes: Callable[[], int]) -> None:
        self.left_bytes = total_bytes
        self._read_bytes = read_bytes
        self._seen = read_bytes()

    def advance(self, *, otherwise: int) -> int:
        """Return what was read since the last time; or `otherwise`, where nobody counts. Never more than there is."""
        now = self._read_bytes()
        step = min(now - self._seen if now else otherwise, self.left_bytes)
        self._seen = now
        self.left_bytes -= step
        return step
