"""The order of a mixture: the schedule says which source a position draws from, and that source's own order which sample.

A source goes through its samples as a loader of it alone would: draw k is position k of its order. So each has its own
epochs, and none waits for another.

For the ranks, the slots of a global batch are sorted by how far along the line of its source each lane lies, whatever the
source: rank r gets about the same lanes of every source at every step, as it does with one dataset.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from datastore.errors import ConfigError
from datastore.loader.cache.prefetch import NEVER
from datastore.loader.mixture.schedule import PERIOD, U16, Phase
from datastore.loader.order.lanes import I64
from datastore.loader.order.mix import Purpose, derive_key
from datastore.loader.order.order import Located, Order, OrderKey

__all__ = ["MixedOrder", "Place", "seed_of"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the shards and samples of a source begin in the joint numbering."""

    first_shard: int
    first_sample: int


class _Dealt(NamedTuple):
    """What a period of positions draws from."""

    sources: U16
    nth: U16
    """How many draws its source had before in the period."""

    along: U16
    """How far along its source's line the lane of each draw lies, in 65,536ths."""

    first: I64
    """[sources] draws of each source before the period."""


_PERIODS = 64
"""Periods remembered: 24 MiB."""


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
        self._periods: dict[tuple[int, int], _Dealt] = {}
        # How far along its source's line each lane lies, in 65,536ths.
        self._along = [
            ((order.lanes.visit.astype(np.int64) << 16) // order.lanes.lanes).astype(np.uint16) for order in orders
        ]

    def lane_of(self, positions: I64) -> U16:
        """Return how far along its source's line the lane of each position lies, in 65,536ths."""
        dealt, places = self._dealt(positions.reshape(-1))
        return dealt.along[places].reshape(positions.shape)

    def locate(self, positions: I64) -> Located:
        """Return the sample at each position and its shard, both in the joint numbering."""
        found = Located(np.empty_like(positions), np.empty_like(positions))
        for order, place, here, draws in self._by_source(positions):
            part = order.locate(draws)
            found.samples[here] = part.samples + place.first_sample
            found.shards[here] = part.shards + place.first_shard
        return found

    def last_of_lane(self, positions: I64, shards: I64) -> I64:
        """Return for samples, by position and shard, the last sample of the same shard that is of the same lane."""
        found = np.empty_like(positions)
        for order, place, here, draws in self._by_source(positions):
            found[here] = order.last_of_lane(draws, shards[here] - place.first_shard) + place.first_sample
        return found

    def next_read(self, shards: I64, first: I64, last: I64, *, cursor: int) -> I64:
        """Return about when any of the samples `first` to `last` of each shard is read next: a position from `cursor` on.

        As if the weights stayed what they are at `cursor`; a source without weight is never read.
        """
        phase = self._phases[max(0, bisect_right(self._starts, cursor) - 1)]
        drawn, rates = phase.drawn(cursor - phase.start), phase.rates(len(self._orders))
        source_of = np.searchsorted([place.first_shard for place in self._places], shards, side="right") - 1
        found = np.full(len(shards), NEVER, np.int64)
        for source in np.unique(source_of).tolist():
            if rates[source] > 0:
                here, place = np.flatnonzero(source_of == source), self._places[source]
                samples = [each[here] - place.first_sample for each in (first, last)]
                order = self._orders[source]
                draws = order.next_read(shards[here] - place.first_shard, *samples, cursor=drawn[source])
                found[here] = cursor + ((draws - drawn[source]) / rates[source]).astype(np.int64)
        return found

    def _by_source(self, positions: I64) -> Iterator[tuple[Order, Place, I64, I64]]:
        """Yield for each source that is drawn from: its order and place, which of `positions` are its, and their draws."""
        dealt, places = self._dealt(positions)
        sources = dealt.sources[places]
        draws = dealt.first[places // PERIOD * len(self._orders) + sources] + dealt.nth[places]
        by_source = np.argsort(sources, kind="stable")  # 16 bits sort by radix.
        ends = np.cumsum(np.bincount(sources, minlength=len(self._orders))).tolist()
        start = 0
        for order, place, end in zip(self._orders, self._places, ends, strict=True):
            if start < end:
                here = by_source[start:end]
                yield order, place, here, draws[here]
            start = end

    def _dealt(self, positions: I64) -> tuple[_Dealt, I64]:
        """Return whole periods that have `positions` among theirs, end to end, and where each of these is there."""
        if not positions.size:
            return self._period(0, 0), positions
        low, high = int(positions.min()), int(positions.max())
        first, last = (bisect_right(self._starts, end) - 1 for end in (low, high))
        if first < 0:
            raise ConfigError(
                "the position lies before the weights of this state were set",
                position=low,
                start=self._starts[0],
                hint="Use the state of a step from that time.",
            )
        parts: list[_Dealt] = []
        places, size = np.empty_like(positions), 0
        for phase in range(first, last + 1):
            start = self._starts[phase]
            begin = (max(low, start) - start) // PERIOD
            end = (high if phase == last else self._starts[phase + 1] - 1) - start
            parts += [self._period(phase, number) for number in range(begin, end // PERIOD + 1)]
            if first == last:
                places = positions - (start + begin * PERIOD)
            else:
                here = (positions >= start) & (positions <= start + end)
                places[here] = positions[here] - (start + begin * PERIOD) + size
                size = len(parts) * PERIOD
        return parts[0] if len(parts) == 1 else _Dealt(*map(np.concatenate, zip(*parts, strict=True))), places

    def _period(self, phase: int, number: int) -> _Dealt:
        """Return one period of a phase; those used last are remembered."""
        found = self._periods.pop((phase, number), None)
        if found is None:
            sources, of_source, along = (np.empty(PERIOD, np.uint16) for _ in range(3))
            found = _Dealt(sources, of_source, along, np.zeros(len(self._orders), np.int64))
            for source, slots, first in self._phases[phase].period(number):
                order, visit, nth = self._orders[source], self._along[source], np.arange(len(slots))
                found.sources[slots] = source
                found.nth[slots] = nth
                found.along[slots] = visit[(nth + first) % order.samples % len(visit)]
                found.first[source] = first
        self._periods[phase, number] = found
        if len(self._periods) > _PERIODS:
            del self._periods[next(iter(self._periods))]
        return found


def seed_of(seed: int, name: str) -> int:
    """Return the seed of the order of the source `name`: two sources of one dataset are two shuffles of it."""
    return derive_key(seed, Purpose.SOURCE, *name.encode()) >> 1
