"""The blocks of all shards of a version, numbered from 0: what is fetched, checked and kept as one.

A block is a range of bytes of a shard's file, with a digest in the manifest. Numbers, not objects: whether a batch is
in memory is one look into an array, and a million shards cost 16 bytes each.

A shard holds its tokens end to end, and beside them perhaps other columns of so many bytes for each token. Each such
stretch of the file is a track: blocks know no more of what they hold.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.dataset.shards.segment_file import Segments

__all__ = ["I64", "BlockLayout", "BlockRange", "Track"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Where a block lies: bytes `[start, stop)` of the file of `shard`, its block number `index`."""

    shard: int
    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Track:
    """Values that lie end to end in each shard, some bytes for each token."""

    start: I64
    """[S] byte position of the first value in each shard's file."""

    token_bytes: I64
    """[S] bytes for each token."""


class BlockLayout:
    """Translates between shards, tokens, bytes and block numbers; a pure function of the manifest."""

    def __init__(self, segments: Segments) -> None:
        self._segments = segments
        self.tokens = Track(segments.values_start, segments.itemsize)
        """Where the tokens lie."""
        per_shard = -(-segments.size_bytes // segments.block_bytes)
        self._first = np.zeros(len(segments) + 1, np.int64)
        np.cumsum(per_shard, out=self._first[1:])
        self._widest = int(segments.itemsize.max(initial=0))
        self._mixed = int(segments.itemsize.min(initial=self._widest)) < self._widest

    @property
    def blocks(self) -> int:
        """Number of all blocks."""
        return int(self._first[-1])

    @property
    def largest_bytes(self) -> int:
        """Size of the largest block."""
        segments = self._segments
        return int(np.minimum(segments.block_bytes, segments.size_bytes).max(initial=0))

    def of_tokens(self, shards: I64, start: I64, stop: I64, *, track: Track | None = None) -> tuple[I64, I64]:
        """Return the first and the last block of tokens `[start, stop)` of each shard; no range is empty.

        With `track`: of the values there that go with them.
        """
        place = track or self.tokens
        origin, token_bytes = place.start[shards], place.token_bytes[shards]
        block_bytes, first = self._segments.block_bytes[shards], self._first[shards]
        low: I64 = first + np.floor_divide(origin + start * token_bytes, block_bytes)
        high: I64 = first + np.floor_divide(origin + stop * token_bytes - 1, block_bytes)
        return low, high

    def is_narrow(self, shards: I64) -> npt.NDArray[np.bool_]:
        """Return whether the tokens of each shard have fewer bytes than those of others do."""
        if not self._mixed:
            return np.zeros(shards.shape, np.bool_)
        return np.less(self._segments.itemsize[shards], self._widest)

    def of_shard(self, shard: int) -> range:
        """Return the blocks of one shard."""
        return range(int(self._first[shard]), int(self._first[shard + 1]))

    def range_of(self, block: int) -> BlockRange:
        """Return where `block` lies."""
        shard = int(np.searchsorted(self._first, block, side="right")) - 1
        index = block - int(self._first[shard])
        block_bytes = int(self._segments.block_bytes[shard])
        stop = min((index + 1) * block_bytes, int(self._segments.size_bytes[shard]))
        return BlockRange(shard, index, index * block_bytes, stop)

    def sizes(self, blocks: I64) -> I64:
        """Return the bytes of each block."""
        shards = np.searchsorted(self._first, blocks, side="right") - 1
        block_bytes = self._segments.block_bytes[shards]
        start = (blocks - self._first[shards]) * block_bytes
        return np.minimum(block_bytes, self._segments.size_bytes[shards] - start)
