"""The unit of verification: a piece of a tensor is hashed in chunks, so that one bad block is named and the rest is not."""

from collections.abc import Iterator
from dataclasses import dataclass

from typing_extensions import Buffer

from datastore.checkpoint.format.manifest import DIGEST_HEX, Entry
from datastore.digest import digest_hex
from datastore.errors import CorruptError

__all__ = ["Chunk", "chunks_of"]


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """A byte range of a part with its digest; ordered as they lie on disk."""

    part: str
    start: int
    stop: int
    digest: str
    tensor: str

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self.stop - self.start

    def check(self, data: Buffer) -> None:
        """Raise `CorruptError` unless `data` are the bytes that were written."""
        self.compare(digest_hex(data))

    def compare(self, digest: str) -> None:
        """Raise `CorruptError` unless `digest` is that of the bytes that were written."""
        if digest != self.digest:
            raise CorruptError(
                "a chunk of a checkpoint does not match its digest",
                part=self.part,
                tensor=self.tensor,
                start=self.start,
                stop=self.stop,
                hint="Restore this part from a copy, or use an earlier step.",
            )


def chunks_of(entry: Entry, chunk_bytes: int, *, first: int = 0, last: int | None = None) -> Iterator[Chunk]:
    """Yield the chunks `first` to `last` (all, if None) of a piece."""
    count = -(-(entry.stop - entry.start) // chunk_bytes)
    for i in range(first, count if last is None else last):
        start = entry.start + i * chunk_bytes
        stop = min(start + chunk_bytes, entry.stop)
        yield Chunk(entry.part, start, stop, entry.digests[i * DIGEST_HEX : (i + 1) * DIGEST_HEX], entry.tensor)
