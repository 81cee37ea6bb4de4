"""The order of a mixture: the schedule says which source a position draws from, and that source's own order which sample.

A source goes through its samples as a loader of it alone would: draw k is position k of its order. So each has its own
epochs, and none waits for another.

For the ranks, the slots of a global batch are sorted by how far along the line of its source each lane lies, whatever the
source: rank r gets about the same lanes of every source at every step, as it does with one dataset.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.errors import ConfigError
from datastore.loader.mixture.schedule import Draws, Phase
from datastore.loader.order.lanes import I64
from datastore.loader.order.mix import Purpose, derive_key
from datastore.loader.order.order import Located, Order, OrderKey

__all__ = ["MixedOrder", "Place", "seed_of"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the shards and samples of a source begin in the joint numbering."""

    first_shard: int
    first_sample: int


class MixedOrder:
    """The order of several datasets together. Not thread-safe, as the orders of its sources."""

    def __init__(
        self, orders: Sequence[Order], places: Sequence[Place], *, phases: Sequence[Phase], key: OrderKey
    ) -> None:
        self.key = key
        self._orders = orders
        self._places = places
        self._phases = phases
        self._starts = [phase.start for phase in phases]
        self._samples = np.array([order.samples for order in orders], np.int64)
        self._lanes = np.array([order.lanes.lanes for order in orders], np.int64)
        self._first_lane = np.cumsum(self._lanes) - self._lanes
        # How far along its source's line each lane lies, in 65,536ths.
        self._along = np.concatenate(
            [(order.lanes.visit.astype(np.int64) << 16) // order.lanes.lanes for order in orders]
        ).astype(np.uint16)

    def draws(self, positions: I64) -> Draws:
        """Return which source each of `positions` draws from, and which of its draws that is."""
        flat = positions.reshape(-1)
        if not flat.size:
            return Draws(flat, flat)
        first, last = (bisect_right(self._starts, int(end)) - 1 for end in (flat.min(), flat.max()))
        if first < 0:
            raise ConfigError(
                "the position lies before the weights of this state were set",
                position=int(flat.min()),
                start=self._starts[0],
                hint="Use the state of a step from that time.",
            )
        if first == last:
            return self._phases[first].at(flat - self._starts[first])
        found = Draws(np.empty_like(flat), np.empty_like(flat))
        which = np.searchsorted(self._starts, flat, side="right") - 1
        for number in range(first, last + 1):
            here = np.flatnonzero(which == number)
            part = self._phases[number].at(flat[here] - self._starts[number]) if here.size else Draws(here, here)
            found.sources[here], found.draws[here] = part
        return found

    def lane_of(self, positions: I64) -> npt.NDArray[np.uint16]:
        """Return how far along its source's line the lane of each position lies, in 65,536ths."""
        sources, draws = self.draws(positions)
        lane = self._first_lane[sources] + draws % self._samples[sources] % self._lanes[sources]
        return self._along[lane].reshape(positions.shape)

    def locate(self, positions: I64) -> Located:
        """Return the sample at each position and its shard, both in the joint numbering."""
        sources, draws = self.draws(positions)
        found = Located(np.empty_like(draws), np.empty_like(draws))
        by_source = np.argsort(sources.astype(np.uint16), kind="stable")
        ends = np.cumsum(np.bincount(sources, minlength=len(self._orders))).tolist()
        start = 0
        for order, place, end in zip(self._orders, self._places, ends, strict=True):
            if start < end:
                here = by_source[start:end]
                part = order.locate(draws[here])
                found.samples[here] = part.samples + place.first_sample
                found.shards[here] = part.shards + place.first_shard
            start = end
        return found


def seed_of(seed: int, name: str) -> int:
    """Return the seed of the order of the source `name`: two sources of one dataset are two shuffles of it."""
    return derive_key(seed, Purpose.SOURCE, *name.encode()) >> 1
