"""Rows in proportion to weights, in the order of lanes: what comes is drawn, when it comes follows from the line as ever.

With replacement, the weights are laid end to end, row by row, and cut into as many equal strata as an epoch has draws. Each
draw takes a place in its stratum by chance, and the row that lies there. So a row comes as often as its weight says,
rounded up or down; independent draws would stray by the square root of that.

Copies of a heavy row would be neighbours. So an epoch is several passes, as many as the heaviest row has copies: pass
p takes every P-th stratum, from one that chance gives it. In each pass the draws are in the order of rows, and are shuffled as an epoch
is that has each row once. The price: every pass reads all of the dataset that it draws from.

Without replacement, an epoch has the k rows with the smallest u / weight, u by chance in (0, 1): sequential Poisson sampling.
A row is in it with a chance of k x weight / total, nearly, and always where that is above 1.

Complexity: with replacement O(log rows) a draw; without, O(rows) at the start of an epoch. Memory: 16 bytes a row at most.

RowSource: E. Ohlsson, "Sequential Poisson Sampling", Journal of Official Statistics 14(2), 1998. The keys u^(1/weight) of
Efraimidis and Spirakis, 2006, need a power, whose last bit is not the same on every machine.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from datastore.digest import digest_hex
from datastore.loader.order.lanes import I64
from datastore.loader.order.mix import U64, Purpose, derive_key, mix64
from datastore.loader.order.order import Order, OrderKey, SampleOrder
from datastore.loader.rows.grid import RowGrid

__all__ = ["SubsetGrid", "WeightedGrid", "subset_grid", "weighted_grid"]

Weights = npt.NDArray[np.float64]

_PASS_DRAWS = 256
"""Draws of a pass at least, or starting one would cost more than what is in it."""


@dataclass(frozen=True, slots=True)
class WeightedGrid:
    """Rows drawn with replacement. To the order, an epoch is one pass, and its samples are strata."""

    samples: int
    """Draws of a pass."""

    passes: int
    run_start: I64
    """[S] which draw is about the first of each shard."""

    run_length: I64
    shard_start: I64
    chosen: I64
    """[N] numbers in the dataset of the rows that can come, ascending."""

    ends: Weights
    """[N] sum of the weights up to each of them."""

    seed: int

    @property
    def rows_per_epoch(self) -> int:
        """Draws of all passes."""
        return self.samples * self.passes

    def numbers(self, samples: I64, positions: I64) -> I64:
        """Return the number in the dataset of each draw."""
        nth = positions // self.samples
        stratum = samples * self.passes + self._phase(nth)
        key = mix64(np.uint64(derive_key(self.seed, Purpose.DRAW, 0)) ^ (nth // self.passes).astype(np.uint64))
        chance = (mix64(key ^ stratum.astype(np.uint64)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        place = (stratum + chance) / self.rows_per_epoch * self.ends[-1]
        found = np.searchsorted(self.ends, place, side="right")
        numbers: I64 = self.chosen[np.minimum(found, len(self.ends) - 1)]
        return numbers

    def order(self, uid64: U64, key: OrderKey) -> SampleOrder:
        """Return the order of the draws."""
        return Order(self, uid64, key)

    def fingerprint(self, uid64: U64) -> str:
        """Return 16 hex digits that name the shards, the rows, their weights and the number of draws."""
        parts = [uid64, self.shard_start, self.chosen, self.ends, np.array([self.samples, self.passes])]
        return digest_hex(*(part.tobytes() for part in parts))[:16]

    def _phase(self, nth: I64) -> I64:
        """Return which of every `passes` strata each pass takes: another one in each pass of an epoch."""
        found = np.empty_like(nth)
        for epoch in np.unique(nth // self.passes):
            here = np.flatnonzero(nth // self.passes == epoch)
            key = np.uint64(derive_key(self.seed, Purpose.DRAW, 1, int(epoch)))
            phases = np.argsort(mix64(key ^ np.arange(self.passes, dtype=np.uint64)), kind="stable")
            found[here] = phases[nth[here] % self.passes]
        return found


def weighted_grid(grid: RowGrid, weights: Weights, *, draws: int, seed: int) -> WeightedGrid:
    """Return the rows of `grid`, drawn with replacement; `weights` are those of its rows, one at least above 0."""
    numbers = np.arange(grid.samples) if grid.chosen is None else grid.chosen
    some = np.flatnonzero(weights)
    ends = np.cumsum(weights[some] / weights.max())
    heaviest = draws / ends[-1]
    passes = max(1, min(int(np.ceil(heaviest)), draws // _PASS_DRAWS))
    samples = -(-draws // passes)
    # Where a shard begins is known up to a draw, and decides nothing but where the draw is read.
    first = np.searchsorted(numbers[some], grid.shard_start)
    before = np.concatenate(([0.0], ends))[first]
    run_start = np.minimum((before / ends[-1] * samples).astype(np.int64), samples)
    run_length = np.diff(np.append(run_start, samples))
    return WeightedGrid(samples, passes, run_start, run_length, grid.shard_start, numbers[some], ends, seed)


@dataclass(frozen=True, slots=True)
class SubsetGrid:
    """Rows drawn without replacement: in each epoch others."""

    samples: int
    """Rows of an epoch."""

    run_start: I64
    run_length: I64
    shard_start: I64
    chosen: I64
    weights: Weights
    seed: int
    _epochs: dict[int, I64] = field(default_factory=dict, compare=False)
    """The rows of the epochs in use: a memo."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch."""
        return self.samples

    def numbers(self, samples: I64, positions: I64) -> I64:
        """Return the number in the dataset of each row of an epoch's line."""
        epochs = positions // self.samples
        found = np.empty_like(samples)
        for epoch in np.unique(epochs).tolist():
            here = np.flatnonzero(epochs == epoch)
            found[here] = self._drawn(epoch)[samples[here]]
        return found

    def order(self, uid64: U64, key: OrderKey) -> SampleOrder:
        """Return the order of the rows."""
        return Order(self, uid64, key)

    def fingerprint(self, uid64: U64) -> str:
        """Return 16 hex digits that name the shards, the rows, their weights and how many are drawn."""
        parts = [uid64, self.shard_start, self.chosen, self.weights, np.array([self.samples])]
        return digest_hex(*(part.tobytes() for part in parts))[:16]

    def _drawn(self, epoch: int) -> I64:
        drawn = self._epochs.get(epoch)
        if drawn is None:
            key = np.uint64(derive_key(self.seed, Purpose.DRAW, 2, epoch))
            chance = (mix64(key ^ np.arange(len(self.chosen), dtype=np.uint64)) >> np.uint64(11)).astype(
                np.float64
            ) + 0.5
            first = np.argsort(chance / self.weights, kind="stable")[: self.samples]
            drawn = self.chosen[np.sort(first)]
            for old in list(self._epochs):  # Several threads may be here, and draw the same.
                if abs(old - epoch) > 1:
                    self._epochs.pop(old, None)
            self._epochs[epoch] = drawn
        return drawn


def subset_grid(grid: RowGrid, weights: Weights, *, draws: int, seed: int) -> SubsetGrid:
    """Return the rows of `grid`, `draws` of them in each epoch; `weights` are those of its rows, so many at least above 0."""
    numbers = np.arange(grid.samples) if grid.chosen is None else grid.chosen
    some = np.flatnonzero(weights)
    first = np.searchsorted(numbers[some], grid.shard_start)
    run_start = first * draws // len(some)
    run_length = np.diff(np.append(run_start, draws))
    return SubsetGrid(draws, run_start, run_length, grid.shard_start, numbers[some], weights[some], seed)
