"""The batches of record shards that rows are taken from: read when a row of theirs is needed, kept under a budget.

A batch of a shard (2 MiB as a rule) is the least that can be read and checked. Rows of one window lie in few of them, and
neighbouring steps come back to them. What was used least recently goes first. Thread-safe: one that several threads need is
read once.
"""

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from datastore.dataset.snapshot import Dataset
from datastore.formats.schema import no_rows
from datastore.loader.cache.batches import CachedBatches
from datastore.loader.cache.opening import open_disk
from datastore.loader.order.lanes import I64
from datastore.loader.rows.gather import Held, gathered, held, joined
from datastore.loader.rows.mapped import MappedBatches
from datastore.loader.rows.source import RowSource
from datastore.loader.settings import LoaderSettings

__all__ = ["RowPlaces", "RowStore"]

_SHIFT = 32
"""A batch is named by one number: its shard, and below so many bits 1 more than its number there; 0: the whole shard."""

_MOST = 32_768
"""Batches that are kept at most: of those whose rows are read from a file there is little in memory."""

_FEW = 16
"""Rows of a shard, below which they are looked up one by one."""

_SHARDS = 65_536
"""Shards whose batches are remembered: some hundred bytes each."""


class RowPlaces(NamedTuple):
    """Where rows lie: the batch that each is in, and its number there."""

    keys: list[int]
    within: list[int]


class RowStore:
    """Rows of `dataset` by shard and number, `columns` of them (all, if there are none).

    `memory_bytes` of batches are kept in memory, and those of a dataset elsewhere in `cache_dir` as well, as `options` say.
    """

    def __init__(self, dataset: RowSource, *, columns: Sequence[str], options: LoaderSettings) -> None:
        self.schema = dataset.schema if not columns else pa.schema([dataset.schema.field(name) for name in columns])
        """What rows look like."""
        self._dataset = dataset
        self._columns = tuple(columns) or None
        self._budget_bytes = options.memory_bytes
        # Files that were not ingested have no digests: nothing of them is kept on disk.
        disk = open_disk(dataset, options=options) if isinstance(dataset, Dataset) else None
        self._cached = CachedBatches(dataset, disk) if isinstance(dataset, Dataset) and disk is not None else None
        self._mapped = MappedBatches(dataset) if isinstance(dataset, Dataset) and disk is None else None
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Held] = OrderedDict()
        self._coming: dict[int, tuple[int, Future[Held]]] = {}
        """What is being read, by which thread."""
        self._starts: OrderedDict[int, list[int]] = OrderedDict()
        self._live: OrderedDict[int, np.ndarray | None] = OrderedDict()
        self.hits = self.fills = self.evictions = self.resident_bytes = 0

    def place(self, shards: I64, rows: I64) -> "RowPlaces":
        """Return where the rows number `rows` of `shards` lie. Only a table of contents is read, if anything."""
        found = set(shards.tolist())
        starts_of = {shard: self._batch_starts(shard) for shard in found}
        if len(rows) < _FEW * len(found):
            return _places_one_by_one(shards, rows, starts_of)
        number, within = np.full(len(rows), -1, np.int64), rows.copy()
        for shard, starts in starts_of.items():
            # One that was written before shards said where their batches are is read as a whole.
            if len(starts) > 1:
                here, first = np.flatnonzero(shards == shard), np.array(starts)
                number[here] = np.searchsorted(first, rows[here], side="right") - 1
                within[here] -= first[number[here]]
        return RowPlaces((shards << _SHIFT | number + 1).tolist(), within.tolist())

    def has(self, places: "RowPlaces") -> bool:
        """Return whether rows can be taken without reading a batch: all that they lie in are kept."""
        with self._lock:
            return all(key in self._kept for key in places.keys)

    def take(self, places: "RowPlaces") -> pa.RecordBatch:
        """Return the rows at `places`, in that order, as one batch of its own memory.

        Raises:
            MissingError, CorruptError, StorageError: a batch that they lie in cannot be read, or is damaged.
        """
        keys, within = places.keys, places.within
        wanted = sorted(set(keys))
        kept = self._kept_of(wanted)
        if len(kept) == len(wanted):
            return self._gathered(kept, keys, within)
        parts: list[pa.RecordBatch] = []
        order: list[int] = []
        read = dict[int, Held]()
        size_bytes = 0
        for index, key in enumerate(wanted):
            read[key] = kept.pop(key) if key in kept else self._batch(key)
            size_bytes += read[key].size_bytes
            if size_bytes > self._budget_bytes // 4 or index + 1 == len(wanted):
                # What was read stays in memory as long as it is named here: copy the rows, and let go of it, before more is read.
                here = [at for at, one in enumerate(keys) if one in read]
                parts.append(self._gathered(read, [keys[at] for at in here], [within[at] for at in here]))
                order += here
                size_bytes = 0
                read.clear()
        if len(parts) < 2:
            return parts[0] if parts else no_rows(self.schema)
        back = np.argsort(order).tolist()
        whole = joined(parts, self.schema)
        return joined([whole.slice(index, 1) for index in back], self.schema)

    def _gathered(self, read: dict[int, Held], keys: list[int], within: list[int]) -> pa.RecordBatch:
        """Return rows of what was read; what can no longer be read from a map is read anew, and checked anew."""
        found = gathered([read[key] for key in keys], within, self.schema)
        if found is None:
            mapped = {key for key, part in read.items() if part.is_mapped}
            with self._lock:
                for key in mapped:
                    if self._kept.get(key) is read[key]:
                        self.resident_bytes -= self._kept.pop(key).size_bytes
            again = {key: held(self._read(key)) if key in mapped else part for key, part in read.items()}
            found = gathered([again[key] for key in keys], within, self.schema)
            assert found is not None, "nothing of it is mapped"
        return found

    def _kept_of(self, keys: list[int]) -> dict[int, Held]:
        """Return those of some batches that are kept, and note that they were used."""
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            self.hits += len(found)
            return found

    def _batch(self, place: int) -> Held:
        """Return one batch of a shard, deleted rows too."""
        with self._lock:
            found = self._kept.get(place)
            if found is not None:
                self._kept.move_to_end(place)
                self.hits += 1
                return found
            reader, coming = self._coming.get(place, (threading.get_ident(), Future()))
            # Nobody waits for himself: what this thread began to read before was ended by an exception.
            mine = reader == threading.get_ident()
            self._coming[place] = reader, coming
        if not mine:
            return coming.result()
        try:
            batch = self._read_to_keep(place)
        except BaseException as error:
            with self._lock:
                self._coming.pop(place, None)
            coming.set_exception(error)
            raise
        with self._lock:
            del self._coming[place]
            self._keep(place, batch)
        coming.set_result(batch)
        return batch

    def live(self, shards: I64, rows: I64) -> np.ndarray:
        """Return whether each of these rows is not deleted."""
        found = np.ones(len(shards), np.bool_)
        if self._dataset.deletions:
            for shard in np.unique(shards).tolist():
                mask = self._mask(shard)
                if mask is not None:
                    here = np.flatnonzero(shards == shard)
                    found[here] = mask[rows[here]]
        return found

    def disk_stats(self) -> dict[str, int]:
        """Return the counts of the disk of the cache; nothing if there is none."""
        return {} if self._cached is None else asdict(self._cached.disk.stats())

    def _mask(self, shard: int) -> np.ndarray | None:
        with self._lock:
            if shard not in self._live:
                if len(self._live) >= _SHARDS:
                    self._live.popitem(last=False)
                self._live[shard] = self._dataset.live_rows(shard)
            return self._live[shard]

    def _batch_starts(self, shard: int) -> list[int]:
        """Return the first row of each batch of a shard, and the number of its rows."""
        with self._lock:
            starts = self._starts.get(shard)
            if starts is None:
                if len(self._starts) >= _SHARDS:
                    self._starts.popitem(last=False)
                starts = self._starts[shard] = [0, *accumulate(self._dataset.batch_rows(shard))]
            return starts

    def _read_to_keep(self, place: int) -> Held:
        shard, number = _place_of(place)
        found = None if self._mapped is None or number < 0 else self._mapped.read(shard, number, columns=self._columns)
        return held(self._read(place)) if found is None else found

    def _read(self, place: int) -> pa.RecordBatch:
        shard, number = _place_of(place)
        if number >= 0 and self._cached is not None:
            return self._cached.read(shard, number, columns=self._columns)
        if number >= 0:
            return self._dataset.read_batch(shard, number, columns=self._columns)
        table = self._dataset.record_shard(shard)
        return joined((table if self._columns is None else table.select(self._columns)).to_batches(), self.schema)

    def _keep(self, place: int, batch: Held) -> None:
        self.fills += 1
        self._kept[place] = batch
        self.resident_bytes += batch.size_bytes
        while len(self._kept) > 1 and (self.resident_bytes > self._budget_bytes or len(self._kept) > _MOST):
            _, gone = self._kept.popitem(last=False)
            self.resident_bytes -= gone.size_bytes
            self.evictions += 1


def _places_one_by_one(shards: I64, rows: I64, starts_of: Mapping[int, list[int]]) -> RowPlaces:
    """Return where so few rows lie that a step in Python for each costs less than NumPy's for each shard."""
    keys, within = [], []
    for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
        starts = starts_of[shard]
        batch = bisect_right(starts, row) - 1 if len(starts) > 1 else -1
        keys.append(shard << _SHIFT | batch + 1)
        within.append(row - starts[batch] if batch >= 0 else row)
    return RowPlaces(keys, within)


def _place_of(key: int) -> tuple[int, int]:
    """Return the shard of a batch and its number there; below 0: the whole shard."""
    return key >> _SHIFT, (key & (1 << _SHIFT) - 1) - 1
