"""Shards elsewhere: blocks brought into memory, from the disk under it or over the network, and given back when others need the room.

Each shard in use gets one anonymous map as large as its file, so that its tokens stay one flat array; memory is taken
only by the blocks that were filled, and an evicted block returns its pages to the kernel. A block is paid for before
it is fetched: `budget_bytes` bounds what is there and what is on its way, at every moment.

What goes first is what is needed last, as far as the batches to come are known (`Future`); among blocks of which nothing is
known, the one least recently used. A block that is fetched ahead never pushes out one that is needed before it.

A hold pins its blocks before it fetches them, so they cannot be evicted under it. One thread holds, others fetch
ahead; while the holder waits for room, no other thread takes any.

A holder waits for each block `timeout_s` at most, in a thread of its own that can be left behind: a server that hangs does not
end, and what it writes into is not touched any more. The cache is of no use then (`abandoned`), and another one is opened.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import islice

import numpy as np
from typing_extensions import override

from datastore.dataset.shards.segments import Segments
from datastore.errors import ConfigError, StorageError
from datastore.loader.cache.blocks import I64, ZEROS, BlockLayout, BlockStats, TokenBlocks
from datastore.loader.cache.disk import DiskTier
from datastore.loader.cache.prefetch import NEVER, Future
from datastore.loader.cache.region import Filled, Region
from datastore.storage.base import Storage
from datastore.threads import in_thread
from datastore.units import format_bytes

__all__ = ["TIMEOUT_S", "BlockCache", "Disks"]

Disks = Sequence[tuple[int, DiskTier | None]]
"""From which shard on which disk is under the memory, in ascending order; None: none."""

TIMEOUT_S = 300
"""Longer than a storage repeats a request by itself: it knows better what is wrong."""

_LOOKED_AT = 64
"""Blocks looked at together when one has to go."""


class BlockCache(TokenBlocks):
    """The shards of `segments` in `storage`, at most `budget_bytes` of them in memory.

    Invariants, under the lock: `used` is the size of all blocks resident or filling; it never exceeds the budget; a
    pinned block, once resident, stays.
    """

    def __init__(
        self,
        storage: Storage,
        segments: Segments,
        *,
        budget_bytes: int,
        disks: Disks = (),
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        super().__init__(storage, segments)
        self._budget_bytes = budget_bytes
        self._disks = disks
        self._timeout_s = timeout_s
        self._requests = self._fetched_bytes = 0
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
        self._used_bytes = self._peak_bytes = 0
        self._waiting = self._short = 0
        """Holders that wait, and those of them that wait for room: then nobody else takes any."""

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
            self._misses += int((~there).sum())
        started = time.perf_counter()
        try:
            for block in wanted[~there].tolist():
                self._wait_for(block)
            self._wait_s += time.perf_counter() - started
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
        self.fetch_run(range(block, block + 1))
        return bool(self._resident[block])

    @override
    def fetch_run(self, blocks: range) -> None:
        shard = self.layout.of_shard(self.layout.range_of(blocks.start).shard)
        here = range(blocks.start, min(blocks.stop, shard.stop))
        claimed: list[int] = []
        with self._changed:
            for block in here:
                if self._claim(block, urgent=False):
                    claimed.append(block)
                elif not (self._resident[block] or block in self._filling):
                    break  # There is no room for it, nor for those after it, which are needed later.
        self._fill(claimed)
        if here.stop < blocks.stop:
            self.fetch_run(range(here.stop, blocks.stop))

    @override
    def read(self, shards: I64, starts: I64, sizes: I64) -> bytearray:
        regions = self._regions
        places = zip(shards.tolist(), starts.tolist(), sizes.tolist(), strict=True)
        return bytearray().join(
            [regions[shard].data[at : at + size] if shard >= 0 else ZEROS[:size] for shard, at, size in places]
        )

    @override
    def expect(self, batches: Sequence[I64]) -> None:
        with self._changed:
            self._future.plan(batches)

    @override
    def announce(self, blocks: Sequence[int]) -> None:
        with self._changed:
            self._future.announce(blocks)

    @override
    def foresee(self, next_uses: Callable[[I64], I64]) -> None:
        if len(self._disks) == 1 and self._disks[0][1] is not None:
            self._disks[0][1].next_uses = partial(_uses_by_name, self.layout, next_uses)

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
            mine = replace(
                super().stats(),
                resident_bytes=self._used_bytes,
                peak_bytes=self._peak_bytes,
                requests=self._requests,
                fetched_bytes=self._fetched_bytes,
            )
        for disk in {disk for _, disk in self._disks if disk is not None}:
            mine = replace(mine, **{name: getattr(mine, name) + count for name, count in asdict(disk.stats()).items()})
        return mine

    @override
    def close(self) -> None:
        with self._changed:
            for block in list(self._recent):
                self._evict(block)

    def _wait_for(self, block: int) -> None:
        """Have `block` brought; leave whoever brings it behind if that takes too long."""
        before = self._storage.statistics().get("read_into")
        try:
            coming = in_thread(partial(self._bring, block), name="datastore-block", daemon=True)
        except RuntimeError:  # The system has no more threads: wait for as long as it takes.
            return self._bring(block)
        wait((coming,), timeout=self._timeout_s)
        if coming.done():
            return coming.result()
        self.abandoned = True
        place, after = self.layout.range_of(block), self._storage.statistics().get("read_into")
        done = (after - before if before else after) if after else None
        raise StorageError(
            "a block did not come in time",
            transient=True,
            url=self._storage.url,
            shard=self._segments.shard(place.shard).path,
            block=place.index,
            bytes=f"{place.start}-{place.stop}",
            waited_s=self._timeout_s,
            tried="a request that was not answered"
            if done is None or not done.requests
            else f"a request that was not answered; meanwhile {done.requests} others ended, {done.retries} of them repeats",
            on_disk="not there" if self._disk_of(place.shard) is not None else "no cache_dir",
            hint="Look at the network and at the server; or wait longer: `timeout_s`.",
        )

    def _bring(self, block: int) -> None:
        """Make `block` resident: wait for room, and for another thread that is at it."""
        with self._changed:
            claimed = self._claim(block, urgent=True)
        if claimed:
            self._fill([block])

    def _fill(self, claimed: list[int]) -> None:
        """Bring blocks of one shard for which there is room, and let those who wait know of each."""
        if not claimed:
            return
        places = [self.layout.range_of(block) for block in claimed]
        first = claimed[0] - places[0].index
        try:
            # Here, where a shard that cannot be described is as one that cannot be read: whoever waits is told.
            with self._changed:
                region = self._region(places[0].shard)
            for filled in region.fill(places):
                self._publish(first + filled.block.index, filled)
        finally:
            with self._changed:
                for block in claimed:
                    if block in self._filling:
                        self._give_back(block, self._filling.pop(block))
                self._changed.notify_all()

    def _publish(self, block: int, filled: Filled) -> None:
        with self._changed:
            size = self._filling.pop(block)
            self._recent[block] = size
            self._resident[block] = True
            self._fills += 1
            self._filled_bytes += size
            self._requests += filled.requests
            self._fetched_bytes += filled.fetched_bytes
            self._refetches += filled.refetches
            self._changed.notify_all()

    def _claim(self, block: int, *, urgent: bool) -> bool:
        """Reserve room for `block` and mark it as being filled by this thread; False if there is nothing to do.

        Unless `urgent`, only if nobody else is at it and there is room.
        """
        place = self.layout.range_of(block)
        size = place.stop - place.start
        while True:
            if self._resident[block]:
                self._recent.move_to_end(block)
                return False
            if (
                block not in self._filling
                and (urgent or not self._short)
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
            short = block not in self._filling
            self._waiting += 1
            self._short += short
            try:
                self._changed.wait()
            finally:
                self._waiting -= 1
                self._short -= short

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

    def _disk_of(self, shard: int) -> DiskTier | None:
        found = [disk for first, disk in self._disks if first <= shard]
        return found[-1] if found else None

    def _region(self, shard: int) -> Region:
        region = self._regions.get(shard)
        if region is None:
            region = self._regions[shard] = Region(
                self._storage, self._segments.shard(shard), disk=self._disk_of(shard)
            )
        return region


def _uses_by_name(layout: BlockLayout, next_uses: Callable[[I64], I64], names: Sequence[str]) -> list[int]:
    """Return when blocks are needed next, by the names that they have on the disk."""
    parts = [name.partition("-b") for name in names]
    uids = np.array([int(uid[:16], 16) for uid, _, _ in parts], np.uint64)
    blocks = layout.numbered(uids, np.array([int(index or 0) for _, _, index in parts], np.int64))
    uses = np.full(len(names), NEVER)
    known = np.flatnonzero(blocks >= 0)
    uses[known] = next_uses(blocks[known])
    found: list[int] = uses.tolist()
    return found


def _subtract(counts: Counter[int], keys: list[int]) -> None:
    """Count each of `keys` once less; what reaches zero is forgotten."""
    for key in keys:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]
