"""The order of samples: pure functions from a position of the endless stream to a sample, and from a cursor to batches.

Position t lies in epoch t // N. Each epoch lays the shards end to end in an order of its own, hashed from their uids
(never from their place in the list, or an append would reshuffle everything): the line. Lanes and windows (`lanes.py`)
then say which place of the line a position takes. Every epoch is a bijection of its N positions onto the N samples,
for every N, number of lanes and window.

Complexity: O(shards + lanes) time and memory to start or to enter an epoch, O(1) a sample; nothing is O(samples), and
starting at position 10^12 costs the same as starting at 0. At 33 x 10^9 samples in 10^6 shards an Order takes 0.1 s.

Which samples a rank's next batches hold follows from the cursor; no rank asks another. The global batch at cursor T is the
positions [T, T + global_batch). Its slots are sorted by (lane, position), and rank r of W takes slots
[r * G // W, (r + 1) * G // W): the *set* of every global batch is the same for every W, and since lanes are visited in
bit-reversed order a rank always gets nearly the same lanes, so it reads only its part of the data.
The slice is then shuffled by a hash of the cursor, or a micro-batch would be neighbouring lanes.

When W does not divide G, the batches of two ranks differ by one row. A finite pass ends after ceil(total / G) steps on
every rank; the free slots of the last batch are spread evenly over the ranks.

Complexity: O(global_batch) time a batch on every rank, 8 ns a slot; the samples of other ranks are not looked up.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from datastore.errors import ConfigError
from datastore.loader.order.lanes import I64, Cells, LaneGrid, Windows, lane_grid
from datastore.loader.order.mix import U64, Purpose, derive_key, mix64
from datastore.loader.settings import Rank

__all__ = [
    "NO_SAMPLE",
    "ORDER_VERSION",
    "BatchPlan",
    "LaneOrder",
    "Line",
    "Located",
    "Order",
    "OrderKey",
    "Ordered",
    "Planner",
    "Runs",
    "SampleOrder",
    "line_of",
]

ORDER_VERSION = 1
"""Part of every saved state. Any change to what a position means raises it."""


@dataclass(frozen=True, slots=True)
class OrderKey:
    """What the order depends on, besides the dataset and `seq_len`."""

    seed: int
    lanes: int
    window: int
    shuffle: bool = True
    """False: every epoch has the samples in the order of the dataset; lanes and window are 1."""


@dataclass(frozen=True)
class Line:
    """One epoch's shards laid end to end."""

    shard: I64
    """[S] shards in the order of the line."""

    start: I64
    """[S] place on the line of the first sample of each of them."""

    @cached_property
    def starts(self) -> I64:
        """[S] place on the line of the first sample of each shard, in the order of the dataset."""
        found = np.empty_like(self.start)
        found[self.shard] = self.start
        return found


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


class Runs(Protocol):
    """Samples laid end to end, shard by shard."""

    @property
    def samples(self) -> int:
        """N, all of them."""
        ...

    @property
    def run_start(self) -> I64:
        """[S] number of each shard's first sample."""
        ...

    @property
    def run_length(self) -> I64:
        """[S] samples of each shard."""
        ...


class Ordered(Protocol):
    """Samples that say in which order they are gone through."""

    @property
    def samples(self) -> int:
        """N, what the order goes through before it begins anew."""
        ...

    @property
    def rows_per_epoch(self) -> int:
        """Samples of an epoch: N, or a multiple of it."""
        ...

    def order(self, uid64: U64, key: OrderKey) -> "SampleOrder":
        """Return the order of the samples."""
        ...


class Order:
    """The order of one dataset version for one `OrderKey`. Not thread-safe: it remembers the windows in use."""

    def __init__(self, grid: Runs, uid64: U64, key: OrderKey) -> None:
        self.key = key
        self.samples = grid.samples
        self.lanes: LaneGrid = lane_grid(samples=grid.samples, lanes=key.lanes, window=key.window, seed=key.seed)
        self._grid = grid
        self._uid64 = uid64
        self._windows = Windows(self.lanes, seed=key.seed)
        self._lines: dict[int, Line] = {}

    def lane_of(self, positions: I64) -> npt.NDArray[np.uint16]:
        """Return a number for each position by which those that read from the same place come together."""
        return self.lanes.lane_of(positions % self.samples)

    def locate(self, positions: I64) -> Located:
        """Return the sample at each position, and its shard.

        Any positions may be asked for at once; it is fast if they lie within a few windows of each other.
        """
        epoch, within = np.divmod(positions, self.samples)
        if not self.key.shuffle:
            return Located(within, np.searchsorted(self._grid.run_start, within, side="right") - 1)
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

    def last_of_lane(self, positions: I64, shards: I64) -> I64:
        """Return for samples, by position and shard, the last sample of the same shard that is of the same lane."""
        if not self.key.shuffle:
            return self._grid.run_start[shards] + self._grid.run_length[shards] - 1
        epochs, within = np.divmod(positions, self.samples)
        lanes = self.lanes.lane_of(within)
        found = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            chosen = np.flatnonzero(epochs == epoch)
            shard, lane = shards[chosen], lanes[chosen]
            start = self._line(epoch).starts[shard]
            stop = np.minimum(start + self._grid.run_length[shard], self.lanes.start[lane] + self.lanes.length[lane])
            found[chosen] = self._grid.run_start[shard] + stop - 1 - start
        return found

    def next_read(self, shards: I64, first: I64, last: I64, *, cursor: int) -> I64:
        """Return about when any of the samples `first` to `last` of each shard is read next: a position from `cursor` on.

        It is right up to a window of each lane, and early where a stretch lies in more than one lane.
        """
        epoch, now = divmod(cursor, self.samples)
        begin, end = self._read_in(epoch, shards, first, last)
        again, _ = self._read_in(epoch + 1, shards, first, last)
        return np.where(now <= end, np.maximum(begin, now), self.samples + again) + epoch * self.samples

    def _read_in(self, epoch: int, shards: I64, first: I64, last: I64) -> tuple[I64, I64]:
        """Return about where in an epoch the first and the last sample of each stretch is read."""
        starts = self._line(epoch).starts if self.key.shuffle else self._grid.run_start
        places = np.stack([first, last]) + starts[shards] - self._grid.run_start[shards]
        lanes = np.searchsorted(self.lanes.start, places, side="right") - 1
        index = places - self.lanes.start[lanes]
        # In two lanes: at the end of one, and at the start of the next.
        begin = np.where(lanes[0] == lanes[1], np.maximum(index[0] - self.lanes.window, 0), 0)
        end = np.where(lanes[0] == lanes[1], index[1] + self.lanes.window, self.samples)
        return begin * self.lanes.lanes, end * self.lanes.lanes

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


class SampleOrder(Protocol):
    """What a planner needs of an order: of one dataset (`Order`), or of several (`MixedOrder`)."""

    @property
    def key(self) -> OrderKey:
        """What it depends on, besides the data."""
        ...

    def lane_of(self, positions: I64) -> npt.NDArray[np.uint16]:
        """Return a number for each position by which those that read from the same place come together."""
        ...

    def locate(self, positions: I64) -> Located:
        """Return the sample at each position, and its shard."""
        ...


class LaneOrder(SampleOrder, Protocol):
    """An order that also knows how its lanes read on: see `Order`."""

    def last_of_lane(self, positions: I64, shards: I64) -> I64:
        """Return for samples, by position and shard, the last sample of the same shard that is of the same lane."""
        ...

    def next_read(self, shards: I64, first: I64, last: I64, *, cursor: int) -> I64:
        """Return about when any of the samples `first` to `last` of each shard is read next: a position from `cursor` on."""
        ...


NO_SAMPLE = -1
"""Position and sample of a row that only fills up the last batch of a finite pass."""


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """One rank's part of the global batch at `cursor`."""

    cursor: int
    positions: I64
    """[B] positions, `NO_SAMPLE` in rows that only fill up."""

    samples: I64
    """[B] the sample at each position."""

    shards: I64
    """[B] the shard each sample belongs to."""

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """[B] whether a row holds a sample."""
        return np.not_equal(self.positions, NO_SAMPLE)


class Planner:
    """Plans the batches of one rank. Not thread-safe, as its `Order`.

    Raises:
        ConfigError: `global_batch` leaves a rank without a row.
    """

    def __init__(self, order: SampleOrder, *, rank: Rank, global_batch: int, total: int | None) -> None:
        if global_batch < rank.world:
            raise ConfigError(
                "global_batch is smaller than the number of readers",
                global_batch=global_batch,
                world=rank.world,
                hint="Give every rank at least one sample: raise `global_batch`, or use fewer ranks.",
            )
        self._order = order
        self._rank = rank
        self._global_batch = global_batch
        self._total = total

    def plan(self, cursor: int, *, batches: int) -> list[BatchPlan]:
        """Return the next `batches` batches from `cursor` on, fewer at the end of a finite pass."""
        left = batches * self._global_batch if self._total is None else max(0, self._total - cursor)
        full = min(batches, left // self._global_batch)
        cursors = cursor + self._global_batch * np.arange(full, dtype=np.int64)
        plans = self._locate(cursors, self._slices(cursors)) if full else []
        rest = left - full * self._global_batch
        if rest and full < batches:
            end = cursor + full * self._global_batch
            plans += self._locate(np.array([end]), self._last_slice(end, rest))
        return plans

    def _slices(self, cursors: I64) -> I64:
        """Return [H, B]: the positions of this rank, for H full batches."""
        slots = np.arange(self._global_batch)
        lanes = self._order.lane_of(cursors[:, None] + slots)
        # Slots come in order of position, so a stable sort by lane sorts by (lane, position); 16 bits sort by radix.
        start, stop = self._rank.share(self._global_batch)
        chosen = np.argsort(lanes, axis=1, kind="stable")[:, start:stop] + cursors[:, None]
        return np.take_along_axis(chosen, self._shuffle(cursors, chosen), axis=1)

    def _last_slice(self, cursor: int, rest: int) -> I64:
        """Return [1, B]: the same for the last batch, which has only `rest` samples."""
        positions = cursor + np.arange(rest, dtype=np.int64)
        lanes = self._order.lane_of(positions)
        slots = np.full(self._global_batch, NO_SAMPLE, np.int64)
        slots[np.arange(rest) * self._global_batch // rest] = positions[np.argsort(lanes, kind="stable")]
        start, stop = self._rank.share(self._global_batch)
        chosen = slots[None, start:stop]
        return np.take_along_axis(chosen, self._shuffle(np.array([cursor]), chosen), axis=1)

    def _shuffle(self, cursors: I64, positions: I64) -> I64:
        """Return [H, B]: the order that the slice of each batch is handed out in."""
        if not self._order.key.shuffle:
            return np.broadcast_to(np.arange(positions.shape[1]), positions.shape)
        key = mix64(np.uint64(derive_key(self._order.key.seed, Purpose.SLICE)) ^ cursors.astype(np.uint64))
        return np.argsort(mix64(key[:, None] ^ positions.astype(np.uint64)), axis=1, kind="stable")

    def _locate(self, cursors: I64, positions: I64) -> list[BatchPlan]:
        flat = positions.reshape(-1)
        missing = flat == NO_SAMPLE
        found = self._order.locate(flat[~missing] if missing.any() else flat)
        samples, shards = np.full_like(flat, NO_SAMPLE), np.zeros_like(flat)
        samples[~missing], shards[~missing] = found.samples, found.shards
        rows = zip(positions, samples.reshape(positions.shape), shards.reshape(positions.shape), strict=True)
        return [BatchPlan(int(cursor), *row) for cursor, row in zip(cursors, rows, strict=True)]
