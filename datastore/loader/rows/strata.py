"""Rows in an order in which each value of a column comes at its rate, all the time.

The rows of one value are a stratum. The schedule that deals out the draws of a mixture deals out the positions of an epoch: after
any number of them a stratum is at most two rows off its share. Which row of it comes says an order of its own: lanes and
windows, as for the whole, so that each byte is still read once.

Complexity: O(rows) to start, O(1) a row. Memory: 8 bytes a row.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.digest import digest_hex
from datastore.errors import ConfigError
from datastore.loader.mixture.schedule import PERIOD, Phase, huffman_tree
from datastore.loader.order.lanes import I64
from datastore.loader.order.mix import U64
from datastore.loader.order.order import Located, Order, OrderKey, SampleOrder
from datastore.loader.rows.grid import RowGrid

__all__ = ["StratifiedGrid", "StratifiedOrder", "stratified_grid"]

_PERIODS = 4
"""Periods of the schedule that are kept: 1 MiB each."""

_MOST_ROWS = 2**30
"""Up to here the schedule gives each stratum exactly its rows in every epoch."""


@dataclass(frozen=True, slots=True)
class StratifiedGrid:
    """Rows by stratum, and in each in the order of the dataset."""

    samples: int
    shard_start: I64
    chosen: I64
    """[N] numbers in the dataset, stratum by stratum."""

    first: I64
    """[K + 1] where each stratum begins in `chosen`, and the end."""

    @property
    def rows_per_epoch(self) -> int:
        """All rows."""
        return self.samples

    def numbers(self, samples: I64, positions: I64) -> I64:
        """Return the number in the dataset of each sample."""
        del positions
        return self.chosen[samples]

    def order(self, uid64: U64, key: OrderKey) -> SampleOrder:
        """Return the order of the rows."""
        return StratifiedOrder(self, uid64, key)

    def fingerprint(self, uid64: U64) -> str:
        """Return 16 hex digits that name the shards, the rows, and which stratum each is in."""
        return digest_hex(*(part.tobytes() for part in (uid64, self.shard_start, self.chosen, self.first)))[:16]


class StratifiedOrder:
    """The order of rows by stratum. Not thread-safe, as any order."""

    def __init__(self, grid: StratifiedGrid, uid64: U64, key: OrderKey) -> None:
        self.key = key
        self._grid = grid
        self._uid64 = uid64
        self._size = np.diff(grid.first)
        self._phase = Phase(0, huffman_tree([float(size) for size in self._size]), (0,) * len(self._size))
        self._periods: dict[int, tuple[I64, I64]] = {}
        lanes = np.maximum(1, key.lanes * self._size // grid.samples)
        self._parts = [self._part(number, int(count)) for number, count in enumerate(lanes)]
        self._lanes = lanes
        self._first_lane = np.cumsum(lanes) - lanes
        # How far along its stratum each lane lies, in 65,536ths: a rank gets about the same lanes of all strata.
        along = [(order.lanes.visit.astype(np.int64) << 16) // order.lanes.lanes for order, _ in self._parts]
        self._along = np.concatenate(along).astype(np.uint16)

    def lane_of(self, positions: I64) -> npt.NDArray[np.uint16]:
        """Return how far along its stratum the lane of each position lies, in 65,536ths."""
        strata, nth = self._draws(positions.reshape(-1) % self._grid.samples)
        along: npt.NDArray[np.uint16] = self._along[self._first_lane[strata] + nth % self._lanes[strata]]
        return along.reshape(positions.shape)

    def locate(self, positions: I64) -> Located:
        """Return the sample at each position, and its shard."""
        epoch, within = np.divmod(positions, self._grid.samples)
        found = Located(np.empty_like(positions), np.empty_like(positions))
        if not positions.size:
            return found
        strata, nth = self._draws(within)
        ordered = np.argsort(strata, kind="stable")
        numbers, starts = np.unique(strata[ordered], return_index=True)
        for number, here in zip(numbers.tolist(), np.split(ordered, starts[1:]), strict=True):
            order, present = self._parts[number]
            part = order.locate(epoch[here] * order.samples + nth[here])
            found.samples[here] = self._grid.first[number] + part.samples
            found.shards[here] = present[part.shards]
        return found

    def _draws(self, within: I64) -> tuple[I64, I64]:
        """Return the stratum of each position of an epoch, and which of its rows comes there."""
        period, slot = np.divmod(within, PERIOD)
        strata, nth = np.empty_like(within), np.empty_like(within)
        for number in np.unique(period).tolist():
            here = np.flatnonzero(period == number)
            dealt = self._period(number)
            strata[here], nth[here] = dealt[0][slot[here]], dealt[1][slot[here]]
        return strata, nth

    def _period(self, number: int) -> tuple[I64, I64]:
        """Return the same for a whole period; the last few are kept."""
        found = self._periods.get(number)
        if found is None:
            found = np.empty(PERIOD, np.int64), np.empty(PERIOD, np.int64)
            for run in self._phase.period(number):
                found[0][run.slots] = run.source
                found[1][run.slots] = run.first + np.arange(len(run.slots))
            if len(self._periods) >= _PERIODS:
                del self._periods[next(iter(self._periods))]
            self._periods[number] = found
        return found

    def _part(self, number: int, lanes: int) -> tuple[Order, I64]:
        """Return the order of one stratum, and the shards that have rows of it."""
        grid = self._grid
        rows = grid.chosen[grid.first[number] : grid.first[number + 1]]
        start = np.searchsorted(rows, grid.shard_start)
        length = np.diff(np.append(start, len(rows)))
        present = np.flatnonzero(length)
        runs = RowGrid(len(rows), start[present], length[present], grid.shard_start[present])
        return Order(
            runs, self._uid64[present], OrderKey(self.key.seed, lanes, self.key.window, self.key.shuffle)
        ), present


def stratified_grid(grid: RowGrid, strata: I64) -> StratifiedGrid:
    """Return the rows of `grid` by stratum; `strata` are those of its rows.

    Raises:
        ConfigError: there are too many.
    """
    if grid.samples >= _MOST_ROWS:
        raise ConfigError(
            "too many rows for strata", rows=grid.samples, limit=_MOST_ROWS, hint="Choose a part of them."
        )
    numbers = np.arange(grid.samples) if grid.chosen is None else grid.chosen
    _, stratum, size = np.unique(strata, return_inverse=True, return_counts=True)
    by_stratum = np.argsort(stratum, kind="stable")
    first = np.concatenate(([0], np.cumsum(size)))
    return StratifiedGrid(grid.samples, grid.shard_start, numbers[by_stratum], first)
