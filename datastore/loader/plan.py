"""From a cursor to batches: which samples a rank's next batches hold. A pure function; no rank asks another.

The global batch at cursor T is the positions [T, T + global_batch). Its slots are sorted by (lane, position), and rank
r of W takes slots [r * G // W, (r + 1) * G // W): the *set* of every global batch is the same for every W, and since
lanes are visited in bit-reversed order a rank always gets nearly the same lanes, so it reads only its part of the data.
The slice is then shuffled by a hash of the cursor, or a micro-batch would be neighbouring lanes.

When W does not divide G, the batches of two ranks differ by one row. A finite pass ends after ceil(total / G) steps on
every rank; the free slots of the last batch are spread evenly over the ranks.

Complexity: O(global_batch) time a batch on every rank, 8 ns a slot; the samples of other ranks are not looked up.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.errors import ConfigError
from datastore.loader.order.lanes import I64
from datastore.loader.order.mix import Purpose, derive_key, mix64
from datastore.loader.order.order import Order
from datastore.loader.place import Place

__all__ = ["NO_SAMPLE", "BatchPlan", "Planner"]

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

    def __init__(self, order: Order, *, place: Place, global_batch: int, total: int | None) -> None:
        if global_batch < place.world:
            raise ConfigError(
                "global_batch is smaller than the number of readers",
                global_batch=global_batch,
                world=place.world,
                hint="Give every rank at least one sample: raise global_batch, or use fewer ranks.",
            )
        self._order = order
        self._place = place
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
        lanes = self._order.lanes.lane_of((cursors[:, None] + slots) % self._order.samples)
        # Slots come in order of position, so a stable sort by lane sorts by (lane, position); 16 bits sort by radix.
        start, stop = self._place.share(self._global_batch)
        chosen = np.argsort(lanes, axis=1, kind="stable")[:, start:stop] + cursors[:, None]
        return np.take_along_axis(chosen, self._shuffle(cursors, chosen), axis=1)

    def _last_slice(self, cursor: int, rest: int) -> I64:
        """Return [1, B]: the same for the last batch, which has only `rest` samples."""
        positions = cursor + np.arange(rest, dtype=np.int64)
        lanes = self._order.lanes.lane_of(positions % self._order.samples)
        slots = np.full(self._global_batch, NO_SAMPLE, np.int64)
        slots[np.arange(rest) * self._global_batch // rest] = positions[np.argsort(lanes, kind="stable")]
        start, stop = self._place.share(self._global_batch)
        chosen = slots[None, start:stop]
        return np.take_along_axis(chosen, self._shuffle(np.array([cursor]), chosen), axis=1)

    def _shuffle(self, cursors: I64, positions: I64) -> I64:
        """Return [H, B]: the order that the slice of each batch is handed out in."""
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
