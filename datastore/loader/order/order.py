"""The order of samples: a pure function from a position of the endless stream to a sample.

Position t lies in epoch t // N. Each epoch lays the shards end to end in an order of its own, hashed from their uids
(never from their place in the list, or an append would reshuffle everything): the line. Lanes and windows (`lanes.py`)
then say which place of the line a position takes. Every epoch is a bijection of its N positions onto the N samples,
for every N, number of lanes and window.

Complexity: O(shards + lanes) time and memory to start or to enter an epoch, O(1) a sample; nothing is O(samples), and
starting at position 10^12 costs the same as starting at 0. At 33 x 10^9 samples in 10^6 shards an Order takes 0.1 s.
"""

from dataclasses import dataclass

import numpy as np

from datastore.loader.order.lanes import I64, Cells, LaneGrid, Windows, lane_grid
from datastore.loader.order.mix import U64, Purpose, derive_key, mix64
from datastore.loader.order.samples import SampleGrid

__all__ = ["ORDER_VERSION", "Line", "Located", "Order", "OrderKey", "line_of"]

ORDER_VERSION = 1
"""Part of every saved state. Any change to what a position means raises it."""


@dataclass(frozen=True, slots=True)
class OrderKey:
    """What the order depends on, besides the dataset and `seq_len`."""

    seed: int
    lanes: int
    window: int


@dataclass(frozen=True, slots=True)
class Line:
    """One epoch's shards laid end to end."""

    shard: I64
    """[S] shards in the order of the line."""

    start: I64
    """[S] place on the line of the first sample of each of them."""


@dataclass(frozen=True, slots=True)
class Located:
    """Samples, each with the shard it belongs to."""

    samples: I64
    shards: I64


def line_of(uid64: U64, run_length: I64, *, seed: int, epoch: int) -> Line:
    """Return the line of `epoch`; shards with equal hashes keep their order."""
    shard = np.argsort(mix64(np.uint64(derive_key(seed, Purpose.LINE, epoch)) ^ uid64), kind="stable")
    length = run_length[shard]
    return Line(shard, np.cumsum(length) - length)


class Order:
    """The order of one dataset version for one `OrderKey`. Not thread-safe: it remembers the windows in use."""

    def __init__(self, grid: SampleGrid, uid64: U64, key: OrderKey) -> None:
        self.key = key
        self.samples = grid.samples
        self.lanes: LaneGrid = lane_grid(samples=grid.samples, lanes=key.lanes, window=key.window, seed=key.seed)
        self._grid = grid
        self._uid64 = uid64
        self._windows = Windows(self.lanes, seed=key.seed)
        self._lines: dict[int, Line] = {}

    def locate(self, positions: I64) -> Located:
        """Return the sample at each position, and its shard.

        Any positions may be asked for at once; it is fast if they lie within a few windows of each other.
        """
        epoch, within = np.divmod(positions, self.samples)
        at_once = self._windows.positions_at_once
        group = epoch * (self.samples // at_once + 1) + within // at_once
        if group.size and group.min() == group.max():
            return self._locate(within, epoch=int(epoch[0]))
        found = Located(np.empty_like(positions), np.empty_like(positions))
        for one in np.unique(group):
            chosen = np.flatnonzero(group == one)
            part = self._locate(within[chosen], epoch=int(epoch[chosen[0]]))
            found.samples[chosen] = part.samples
            found.shards[chosen] = part.shards
        return found

    def _locate(self, within: I64, *, epoch: int) -> Located:
        cells: Cells = self.lanes.cells(within)
        place = self.lanes.place(cells.lane, cells.window, self._windows.slots(cells, epoch=epoch))
        line = self._line(epoch)
        nth = np.searchsorted(line.start, place, side="right") - 1
        shards = line.shard[nth]
        return Located(self._grid.run_start[shards] + place - line.start[nth], shards)

    def _line(self, epoch: int) -> Line:
        line = self._lines.get(epoch)
        if line is None:
            # A batch may straddle epochs, so the one before is kept.
            self._lines = {old: kept for old, kept in self._lines.items() if old == epoch - 1}
            line = line_of(self._uid64, self._grid.run_length, seed=self.key.seed, epoch=epoch)
            self._lines[epoch] = line
        return line
