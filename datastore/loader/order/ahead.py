"""Blocks that lanes come to next: neighbours of one that is fetched, worth fetching with it, and when each is needed again.

A lane reads on from block to block, up to its end or that of its shard. So the neighbours that follow are needed for sure, by this
rank and in this epoch, and one request of 16 MiB costs less than eight of 2 MiB. They wait in memory for as long as the lane is
busy with the blocks before them: the budget says how many there may be. Nothing behind the end of a lane is fetched, for that
belongs to another one, and perhaps to another rank.

Complexity: O(1) for each sample that is asked about, O(shards) once in an epoch.
"""

from collections.abc import Sequence

import numpy as np

from datastore.loader.cache.blocks import I64, BlockLayout, Track
from datastore.loader.cache.prefetch import NEVER, blocks_of_a_run
from datastore.loader.order.order import NO_SAMPLE, BatchPlan, LaneOrder
from datastore.loader.order.packs import PackGrid
from datastore.loader.order.samples import SampleGrid

__all__ = ["LaneReader", "Outlook", "blocks_at_once"]


def blocks_at_once(layout: BlockLayout, *, budget_bytes: int | None, stretches: int, in_use: int = 1) -> int:
    """Return how many blocks may be fetched together, if this rank reads on in so many `stretches` at once; at least 1.

    Each of them has `in_use` blocks that it reads from, and all that are fetched together wait for those.
    """
    if budget_bytes is None or not layout.blocks:
        return 1
    each = budget_bytes // max(1, stretches * layout.largest_bytes)
    return max(1, min(each - in_use, blocks_of_a_run(layout.largest_bytes)))


class Outlook:
    """When blocks are needed next, of all there are: for a disk that has room for some of them. Not thread-safe.

    It knows the order of this epoch and of the next one, on whatever rank; `order` is its own, for it is asked by other threads.
    """

    def __init__(
        self, order: LaneOrder, grid: SampleGrid | PackGrid, layout: BlockLayout, *, tracks: Sequence[Track]
    ) -> None:
        self._order, self._grid, self._layout, self._tracks = order, grid, layout, tracks
        self.cursor = 0
        """Where the loader stands."""

    def __call__(self, blocks: I64) -> I64:
        """Return about when each of `blocks` is read next, as a position; `NEVER` if nothing of it is read."""
        shards, starts, stops = self._layout.ranges_of(blocks)
        found: I64 = np.full(len(blocks), NEVER, np.int64)
        tokens = self._grid.stored_start[shards + 1] - self._grid.stored_start[shards]
        for track in self._tracks:
            low = np.clip((starts - track.start[shards]) // track.token_bytes[shards], 0, tokens)
            high = np.clip(-((track.start[shards] - stops) // track.token_bytes[shards]), 0, tokens)
            here = np.flatnonzero(high > low)
            ends = self._grid.samples_of(shards[here], low[here], high[here] - 1)
            uses = self._order.next_read(shards[here], *ends, cursor=self.cursor)
            found[here] = np.minimum(found[here], uses)
        return found


class LaneReader:
    """How the lanes of a rank read on, as many blocks together as memory has room for, in so many `stretches` at once.

    Of two equal orders, one is for its `outlook`.
    """

    def __init__(
        self,
        orders: tuple[LaneOrder, LaneOrder],
        grid: SampleGrid | PackGrid,
        layout: BlockLayout,
        *,
        tracks: Sequence[Track],
        budget_bytes: int | None,
        stretches: int,
    ) -> None:
        self._order, self._grid, self._layout, self._tracks = orders[0], grid, layout, tracks
        token_bytes = max(int(track.token_bytes.max(initial=0)) for track in tracks)
        in_use = 1 + (grid.tokens_at_once - 1) * token_bytes // max(1, layout.largest_bytes)
        self._run = blocks_at_once(layout, budget_bytes=budget_bytes, stretches=stretches, in_use=in_use)
        self._asked = np.zeros(layout.blocks, np.bool_)
        self.outlook = Outlook(orders[1], grid, layout, tracks=tracks)

    def coming(self, plan: BatchPlan) -> list[int]:
        """Return the blocks to fetch behind those that `plan` reads, as far as its lanes go, and not returned before.

        Half of what may wait is asked for when the other half is left, so that a lane does not run dry.
        """
        if self._run < 2:
            return []
        there = np.flatnonzero(plan.positions != NO_SAMPLE)
        shards, samples = plan.shards[there], plan.samples[there]
        ends = self._order.last_of_lane(plan.positions[there], shards)
        found: set[int] = set()
        for track in self._tracks:
            last, limit = self._last_block(shards, samples, track), self._last_block(shards, ends, track)
            self._asked[last] = False  # In the next epoch it is asked for again.
            trigger = np.minimum(last + max(1, self._run // 2), limit)
            for at in np.flatnonzero((trigger > last) & ~self._asked[trigger]).tolist():
                found.update(range(int(last[at]) + 1, min(int(last[at]) + self._run, int(limit[at])) + 1))
        fresh = [block for block in sorted(found) if not self._asked[block]]
        self._asked[fresh] = True
        return fresh

    def _last_block(self, shards: I64, samples: I64, track: Track) -> I64:
        """Return the block that the last token of each sample lies in, as far as it is in the same shard."""
        stops = self._grid.end_in(shards, samples)
        return self._layout.of_tokens(shards, stops - 1, stops, track=track)[1]
