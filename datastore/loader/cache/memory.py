"""Shards elsewhere: blocks fetched into memory, checked, and given back when others need the room.

Each shard in use gets one anonymous map as large as its file, so that its tokens stay one flat array; memory is taken
only by the blocks that were filled, and an evicted block returns its pages to the kernel. A block is paid for before
it is fetched: `budget_bytes` bounds what is there and what is on its way, at every moment.

What goes first is what is needed last, as far as the batches to come are known (`Future`); among blocks of which nothing is
known, the one least recently used. A block that is fetched ahead never pushes out one that is needed before it.

A hold pins its blocks before it fetches them, so they cannot be evicted under it. One thread holds, others fetch
ahead; while the holder waits for room, no other thread takes any.
"""

import mmap
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice

import numpy as np
from typing_extensions import override

from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.segments import Segments
from datastore.digest import DIGEST_BYTES, digest_bytes
from datastore.errors import ConfigError, MissingError, StorageError
from datastore.loader.cache.blocks import I64, ZEROS, BlockRange, BlockStats, TokenBlocks, damaged, unreadable
from datastore.loader.cache.prefetch import NEVER, Future
from datastore.storage.base import Storage
from datastore.storage.verified import has_digest
from datastore.units import format_bytes

__all__ = ["BlockCache", "Region"]

_LOOKED_AT = 64
"""Blocks looked at together when one has to go."""


class Region:
    """The bytes of one shard. Blocks are independent: several threads may fill different ones."""

    def __init__(self, storage: Storage, info: ShardInfo) -> None:
        self._storage = storage
        self._info = info
        # Private: pages of a shared map would not go away by MADV_DONTNEED.
        self._map = mmap.mmap(-1, info.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data = memoryview(self._map).toreadonly()

    def fill(self, block: BlockRange) -> int:
        """Fetch a block and check it; return how many times it had to be fetched again.

        Raises:
            CorruptError: its bytes are wrong each time, or the object is too short.
            MissingError: the object is gone.
            StorageError: the storage failed.
        """
        at = block.index * DIGEST_BYTES
        wanted = self._info.block_digests[at : at + DIGEST_BYTES]
        target = memoryview(self._map)[block.start : block.stop]
        for attempt in range(_FETCHES):
            self._read(block, target)
            if digest_bytes(target) == wanted:
                return attempt
        if self._read_copy(block, target, wanted):
            return _FETCHES
        raise damaged("a block does not match its digest", shard=self._info, block=block, fetched=f"{_FETCHES} times")

    def release(self, block: BlockRange) -> None:
        """Return the memory of a block to the kernel; it reads as zeros from now on."""
        page = mmap.PAGESIZE
        start = -(-block.start // page) * page
        # The rest of the last page is padding. Between blocks, a page that two share must stay.
        last = block.stop == self._info.size_bytes
        stop = -(-block.stop // page) * page if last else block.stop // page * page
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _read(self, block: BlockRange, target: memoryview) -> None:
        try:
            self._storage.read_into(self._info.path, block.start, target)
        except StorageError as error:
            raise unreadable(error, shard=self._info, block=block) from None

    def _read_copy(self, block: BlockRange, target: memoryview, wanted: bytes) -> bool:
        """Fill `target` from the first copy that is right, and have the others healed; return whether there is one."""
        copies = self._storage.copies(self._info.path)
        for copy in copies if len(copies) > 1 else ():
            with suppress(MissingError, StorageError):
                copy.read_into(self._info.path, block.start, target)
                if digest_bytes(target) == wanted:
                    self._storage.heal(self._info.path, has_digest(self._info.digest))
                    return True
        return False


class BlockCache(TokenBlocks):
    """The shards of `segments` in `storage`, at most `budget_bytes` of them in memory.

    Invariants, under the lock: `used` is the size of all blocks resident or filling; it never exceeds the budget; a
    pinned block, once resident, stays.
    """

    def __init__(self, storage: Storage, segments: Segments, *, budget_bytes: int) -> None:
        super().__init__(storage, segments)
        self._budget_bytes = budget_bytes
        self._changed = threading.Condition()
        self._regions: dict[int, Region] = {}
        self._recent: OrderedDict[int, int] = OrderedDict()
        """Resident blocks, least recently used first, with their sizes."""
        self._filling: dict[int, int] = {}
        self._pins: Counter[int] = Counter()
        self._holders: Counter[int] = Counter()
        """How many holds each thread has open."""
        self._resident = np.zeros(self.layout.blocks, np.bool_)
        self._future = Future(self.layout.blocks)
        self._used_bytes = self._peak_bytes = self._waiting = 0

    @property
    @override
    def budget_bytes(self) -> int | None:
        return self._budget_bytes

    @override
    @contextmanager
    def hold(self, blocks: I64) -> Iterator[None]:
        wanted = np.unique(blocks)
        if len(wanted) * self.layout.largest_bytes > self._budget_bytes:
            need = int(self.layout.sizes(wanted).sum())
            if need > self._budget_bytes:
                raise self._too_small(need)
        pinned, thread = wanted.tolist(), threading.get_ident()
        with self._changed:
            self._pins.update(pinned)
            self._holders[thread] += 1
            there = self._resident[wanted]
            for block in wanted[there].tolist():
                self._recent.move_to_end(block)
            self._hits += int(there.sum())
        try:
            for block in wanted[~there].tolist():
                self._bring(block, urgent=True)
            yield
        finally:
            with self._changed:
                _subtract(self._holders, [thread])
                _subtract(self._pins, pinned)
                self._changed.notify_all()

    @override
    def absent(self, blocks: I64) -> I64:
        there = self._resident[blocks]
        return blocks[:0] if there.all() else np.unique(blocks[~there])

    @override
    def fetch(self, block: int) -> bool:
        return self._bring(block, urgent=False)

    @override
    def read(self, shards: Sequence[int], starts: Sequence[int], sizes: Sequence[int]) -> bytearray:
        regions = self._regions
        places = zip(shards, starts, sizes, strict=True)
        return bytearray().join(
            [regions[shard].data[at : at + size] if shard >= 0 else ZEROS[:size] for shard, at, size in places]
        )

    @override
    def expect(self, batches: Sequence[I64]) -> None:
        with self._changed:
            self._future.plan(batches)

    @override
    def passed(self) -> None:
        with self._changed:
            self._future.pass_one()

    @override
    def forget(self) -> None:
        with self._changed:
            self._future.forget()

    @override
    def stats(self) -> BlockStats:
        with self._changed:
            return replace(super().stats(), resident_bytes=self._used_bytes, peak_bytes=self._peak_bytes)

    @override
    def close(self) -> None:
        with self._changed:
            for block in list(self._recent):
                self._evict(block)

    def _bring(self, block: int, *, urgent: bool) -> bool:
        """Make `block` resident; unless `urgent`, only if nobody else is at it and there is room."""
        place = self.layout.range_of(block)
        size = place.stop - place.start
        with self._changed:
            if not self._claim(block, size, urgent=urgent):
                return bool(self._resident[block])
        filled = False
        try:
            # Here, where a shard that cannot be described is as one that cannot be read: whoever waits is told.
            with self._changed:
                region = self._region(place.shard)
            refetches = region.fill(place)
            filled = True
        finally:
            with self._changed:
                del self._filling[block]
                if filled:
                    self._recent[block] = size
                    self._resident[block] = True
                    self._fills += 1
                    self._filled_bytes += size
                    self._refetches += refetches
                else:
                    self._give_back(block, size)
                self._changed.notify_all()
        return True

    def _claim(self, block: int, size: int, *, urgent: bool) -> bool:
        """Reserve room for `block` and mark it as being filled by this thread; False if there is nothing to do."""
        while True:
            if self._resident[block]:
                self._recent.move_to_end(block)
                return False
            if (
                block not in self._filling
                and (urgent or not self._waiting)
                and self._make_room(block, size, urgent=urgent)
            ):
                self._filling[block] = size
                self._used_bytes += size
                self._peak_bytes = max(self._peak_bytes, self._used_bytes)
                return True
            if not urgent:
                return False
            # Another thread fetches this very block, or fetches and other holds take all room. Fetches end by
            # themselves; holds that all wait for each other do not.
            if not self._filling and self._waiting + 1 == len(self._holders):
                raise self._too_small(self._used_bytes + size)
            self._waiting += 1
            try:
                self._changed.wait()
            finally:
                self._waiting -= 1

    def _make_room(self, block: int, size: int, *, urgent: bool) -> bool:
        """Evict what is not pinned, until the `size` bytes of `block` fit; False if they cannot.

        Unless `urgent`, nothing is evicted that is needed no later than `block`.
        """
        while self._used_bytes + size > self._budget_bytes:
            last, use = self._needed_last()
            if last is None or (not urgent and use <= self._future.next_use(np.array([block]))[0] < NEVER):
                return False
            self._evict(last)
        return True

    def _needed_last(self) -> tuple[int | None, int]:
        """Return the resident block that is needed last, of several the least recently used one, and when it is needed."""
        free = (block for block in self._recent if block not in self._pins)
        found, latest = None, -1
        while part := list(islice(free, _LOOKED_AT)):
            uses = self._future.next_use(np.array(part))
            place = int(uses.argmax())
            if uses[place] > latest:
                found, latest = part[place], int(uses[place])
            if latest == NEVER:
                break
        return found, latest

    def _evict(self, block: int) -> None:
        size = self._recent.pop(block)
        self._resident[block] = False
        self._evictions += 1
        self._give_back(block, size)

    def _give_back(self, block: int, size: int) -> None:
        place = self.layout.range_of(block)
        self._used_bytes -= size
        region = self._regions.get(place.shard)
        if region is None:
            return
        region.release(place)
        if not any(other in self._recent or other in self._filling for other in self.layout.of_shard(place.shard)):
            del self._regions[place.shard]

    def _too_small(self, need: int) -> ConfigError:
        return ConfigError(
            "the block cache is too small for what must be held at once",
            memory_bytes=format_bytes(self._budget_bytes),
            needed=format_bytes(need),
            hint="Raise `memory_bytes`.",
        )

    def _region(self, shard: int) -> Region:
        region = self._regions.get(shard)
        if region is None:
            region = self._regions[shard] = Region(self._storage, self._segments.shard(shard))
        return region


def _subtract(counts: Counter[int], keys: list[int]) -> None:
    """Count each of `keys` once less; what reaches zero is forgotten."""
    for key in keys:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]


_FETCHES = 2
"""Wrong bytes are fetched once more: the first ones may have been damaged on the way."""
