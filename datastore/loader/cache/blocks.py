"""The blocks of all shards of a version, numbered from 0, and the contract of whatever hands out tokens by them.

Promises:

1. A block is handed out only after its bytes had the digest that the manifest records.
2. While a block is held it stays: its tokens can be read, and are right.
3. A block that cannot be had right is an error that names the file and the block; nothing wrong is ever handed out.

Ranks share no memory, and no lock that one could hold for long; only the files of a cache on disk, where there is one.

A block, which is fetched, checked and kept as one, is a range of bytes of a shard's file, with a digest in the manifest.
Numbers, not objects: whether a batch is in memory is one look into an array, and a million shards cost 16 bytes each.

A shard holds its tokens end to end, and beside them perhaps other columns of so many bytes for each token. Each such
stretch of the file is a track: blocks know no more of what they hold.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.segments import Segments
from datastore.errors import CorruptError, StorageError
from datastore.storage.base import Storage
from datastore.storage.errors import TOO_SHORT, is_damage

__all__ = [
    "I64",
    "NOWHERE",
    "ZEROS",
    "BlockLayout",
    "BlockRange",
    "BlockStats",
    "TokenBlocks",
    "Track",
    "damaged",
    "unreadable",
]


@dataclass(frozen=True, slots=True)
class BlockStats:
    """What happened so far; sizes in bytes."""

    hits: int = 0
    """Blocks asked for that were there already."""

    misses: int = 0
    """Blocks asked for that were not: a batch waited for them."""

    wait_s: float = 0.0
    """Seconds that batches waited."""

    fills: int = 0
    """Blocks read and checked."""

    filled_bytes: int = 0
    refetches: int = 0
    """Fills repeated because the first bytes were wrong."""

    evictions: int = 0
    resident_bytes: int = 0
    """Memory in use now, with what is being fetched; 0 for local files, whose memory is the kernel's."""

    peak_bytes: int = 0
    requests: int = 0
    """Reads of the storage that were asked for; one may bring several blocks. 0 for local files."""

    fetched_bytes: int = 0
    """What came from the storage; the rest of `filled_bytes` came from the disk of the cache. 0 for local files."""

    disk_hits: int = 0
    """Blocks that came from the disk of the cache (`cache_dir`); this and what follows is of this process."""

    disk_hit_bytes: int = 0
    disk_writes: int = 0
    disk_write_bytes: int = 0
    disk_evictions: int = 0
    disk_corrupt: int = 0
    """Files of the cache whose digest was wrong; each was removed, and its block fetched."""

    @property
    def hit_rate(self) -> float:
        """Which part of the blocks asked for were there already; 1 if there were none."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else 1.0


@dataclass(frozen=True, slots=True)
class BlockRange:
    """Where a block lies: bytes `[start, stop)` of the file of `shard`, its block number `index`."""

    shard: int
    index: int
    start: int
    stop: int


I64 = npt.NDArray[np.int64]

NOWHERE = -1
"""Stands for a shard: zeros are read from there."""

ZEROS = memoryview(bytes(2**24))
"""What is read from there."""


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
        self.dtype: np.dtype[Any] = np.dtype("uint16" if self._widest == 2 else "uint32")
        """Of the tokens of a batch: that of the shards whose tokens have the most bytes."""

    @property
    def blocks(self) -> int:
        """Number of all blocks."""
        return int(self._first[-1])

    @property
    def largest_bytes(self) -> int:
        """Size of the largest block."""
        segments = self._segments
        return int(np.minimum(segments.block_bytes, segments.size_bytes).max(initial=0))

    @property
    def total_bytes(self) -> int:
        """Size of all blocks."""
        return int(self._segments.size_bytes.sum())

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

    def of_bytes(self, shard: int, start: int, stop: int) -> range:
        """Return the blocks of the bytes `[start, stop)` of a shard's file, at least one."""
        first, block_bytes = int(self._first[shard]), int(self._segments.block_bytes[shard])
        return range(first + start // block_bytes, first + (stop - 1) // block_bytes + 1)

    def range_of(self, block: int) -> BlockRange:
        """Return where `block` lies."""
        shard = int(np.searchsorted(self._first, block, side="right")) - 1
        index = block - int(self._first[shard])
        block_bytes = int(self._segments.block_bytes[shard])
        stop = min((index + 1) * block_bytes, int(self._segments.size_bytes[shard]))
        return BlockRange(shard, index, index * block_bytes, stop)

    def ranges_of(self, blocks: I64) -> tuple[I64, I64, I64]:
        """Return the shard of each block, and where in its file it begins and ends."""
        shards = np.searchsorted(self._first, blocks, side="right") - 1
        block_bytes = self._segments.block_bytes[shards]
        start = (blocks - self._first[shards]) * block_bytes
        return shards, start, np.minimum(start + block_bytes, self._segments.size_bytes[shards])

    def numbered(self, uids: npt.NDArray[np.uint64], indices: I64) -> I64:
        """Return the blocks by the uid of their shard (its first 64 bits) and their number in it; -1 where there is none."""
        order = np.argsort(self._segments.uid64)
        at = np.minimum(np.searchsorted(self._segments.uid64[order], uids), len(order) - 1)
        shards = order[at]
        blocks = self._first[shards] + indices
        known = (self._segments.uid64[shards] == uids) & (blocks < self._first[shards + 1])
        return np.where(known, blocks, -1)

    def sizes(self, blocks: I64) -> I64:
        """Return the bytes of each block."""
        shards = np.searchsorted(self._first, blocks, side="right") - 1
        block_bytes = self._segments.block_bytes[shards]
        start = (blocks - self._first[shards]) * block_bytes
        return np.minimum(block_bytes, self._segments.size_bytes[shards] - start)


class TokenBlocks(ABC):
    """The tokens of a dataset, block by block. Thread-safe; not to be used in a forked child."""

    def __init__(self, storage: Storage, segments: Segments) -> None:
        self._storage = storage
        self._segments = segments
        self.layout = BlockLayout(segments)
        """The numbering of blocks."""
        self.abandoned = False
        """Whether something hangs in it: open another one."""
        self._wait_s = 0.0
        self._hits = self._misses = self._fills = self._filled_bytes = self._refetches = self._evictions = 0

    lends = False
    """Whether what `read` returns is overwritten by the next read."""

    @property
    def budget_bytes(self) -> int | None:
        """How much can be held at once; None if there is no limit."""
        return None

    @abstractmethod
    def hold(self, blocks: I64) -> AbstractContextManager[None]:
        """Return a context within which `blocks` (in any order, repeats allowed) are there.

        Raises:
            CorruptError: a block is damaged; the message names shard and block.
            MissingError: a shard's file is gone.
            StorageError: the storage failed.
            ConfigError: `blocks` need more than `budget_bytes`.
        """

    @abstractmethod
    def absent(self, blocks: I64) -> I64:
        """Return those of `blocks` that are not there, without waiting."""

    @abstractmethod
    def fetch(self, block: int) -> bool:
        """Bring one block ahead of its use, if there is room; return whether it is there now.

        Raises:
            DatastoreError: as `hold`.
        """

    def fetch_run(self, blocks: range) -> None:
        """Bring neighbours ahead of their use, in ascending order, as far as there is room; as `fetch`."""
        for block in blocks:
            self.fetch(block)

    @abstractmethod
    def read(self, shards: I64, starts: I64, sizes: I64) -> bytearray | npt.NDArray[np.uint8]:
        """Return for each of `shards` so many bytes of its file, from `starts` on, end to end; right until the next read if `lends`.

        All of them lie in blocks that are held. Shard `NOWHERE` has zeros, at most `ZEROS` bytes at a time.

        Raises:
            DatastoreError: as `hold`; a block may have been lost since.
        """

    def expect(self, batches: Sequence[I64]) -> None:  # noqa: ARG002 - the protocol
        """Take note of the blocks of batches to come, in order, after those told before; a cache may ignore it."""
        return

    def announce(self, blocks: Sequence[int]) -> None:  # noqa: ARG002 - the protocol
        """Take note that `blocks` are needed some time after all batches that were told."""
        return

    def foresee(self, next_uses: Callable[[I64], I64]) -> None:  # noqa: ARG002 - the protocol
        """Take note of when blocks are needed next beyond the batches that are told: the larger the number, the later."""
        return

    def passed(self) -> None:
        """Take note that the first of the batches told was delivered."""
        return

    def forget(self) -> None:
        """Expect none of the batches told any more."""
        return

    def stats(self) -> BlockStats:
        """Return counts since the start."""
        return BlockStats(
            hits=self._hits,
            misses=self._misses,
            wait_s=self._wait_s,
            fills=self._fills,
            filled_bytes=self._filled_bytes,
            refetches=self._refetches,
            evictions=self._evictions,
        )

    @abstractmethod
    def close(self) -> None:
        """Give back all memory and files."""


def unreadable(error: StorageError, *, shard: ShardInfo, block: BlockRange) -> CorruptError | StorageError:
    """Return what a block that could not be read because of `error` is: damaged, unless it may be sound all the same."""
    if not is_damage(error):
        return error
    if error.fact == TOO_SHORT:
        return damaged("the shard's file is cut short", shard=shard, block=block)
    return damaged("a block cannot be read", shard=shard, block=block, reason=error.fact)


def damaged(fact: str, *, shard: ShardInfo, block: BlockRange, **values: object) -> CorruptError:
    """Return the error for a block that cannot be had right."""
    return CorruptError(
        fact,
        shard=shard.path,
        block=block.index,
        bytes=f"{block.start}-{block.stop}",
        **values,
        hint="Restore this file from a copy; `datastore verify` lists all that is damaged.",
    )
