"""The batches of record shards that rows are taken from: read when a row of theirs is needed, kept under a budget.

A batch of a shard (2 MiB as a rule) is the least that can be read and checked. Rows of one window lie in few of them, and
neighbouring steps come back to them. What was used least recently goes first. A batch of a local Arrow file is mapped, and
its size counts all the same. Thread-safe: one that several threads need is read once.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.loader.order.lanes import I64

__all__ = ["BatchPlace", "RowStore"]

_SHARDS = 65_536
"""Shards whose batches are remembered: some hundred bytes each."""


class BatchPlace(NamedTuple):
    """Batch `number` of shard `shard`."""

    shard: int
    number: int


class RowStore:
    """Rows of `dataset` by shard and number, `columns` of them (all, if there are none); `budget_bytes` of batches are kept."""

    def __init__(self, dataset: Dataset, *, columns: Sequence[str], budget_bytes: int) -> None:
        self.schema = dataset.schema if not columns else pa.schema([dataset.schema.field(name) for name in columns])
        """What rows look like."""
        self._dataset = dataset
        self._columns = tuple(columns) or None
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[BatchPlace, pa.RecordBatch] = OrderedDict()
        self._coming: dict[BatchPlace, Future[pa.RecordBatch]] = {}
        self._starts: OrderedDict[int, I64] = OrderedDict()
        self._live: OrderedDict[int, np.ndarray | None] = OrderedDict()
        self.hits = self.fills = self.evictions = self.resident_bytes = 0

    def take(self, shards: I64, rows: I64) -> pa.RecordBatch:
        """Return the rows number `rows` of `shards`, in that order, as one batch of its own memory.

        Raises:
            MissingError, CorruptError, StorageError: a batch that they lie in cannot be read, or is damaged.
        """
        places = [self._place(shard, row) for shard, row in zip(shards.tolist(), rows.tolist(), strict=True)]
        pieces: list[pa.RecordBatch] = []
        sorted_by_batch = sorted(range(len(places)), key=lambda index: places[index])
        slices: dict[int, pa.RecordBatch] = {}
        held, at = 0, 0
        order: list[int] = []
        while at < len(sorted_by_batch):
            place = places[sorted_by_batch[at]][0]
            batch = self.batch(place)
            while at < len(sorted_by_batch) and places[sorted_by_batch[at]][0] == place:
                index = sorted_by_batch[at]
                slices[index] = batch.slice(places[index][1], 1)
                at += 1
            held += batch.nbytes
            if held > self._budget_bytes // 4 and at < len(sorted_by_batch):
                # What the slices refer to is kept by them: copy the rows, and let go of it.
                pieces.append(_joined([slices[index] for index in slices], self.schema))
                order += slices
                slices, held = {}, 0
        if not pieces:
            return _joined([slices[index] for index in range(len(places))], self.schema)
        pieces.append(_joined([slices[index] for index in slices], self.schema))
        order += slices
        whole = _joined(pieces, self.schema)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return _joined([whole.slice(index, 1) for index in back.tolist()], self.schema)

    def batch(self, place: BatchPlace) -> pa.RecordBatch:
        """Return one batch of a shard, deleted rows too.

        Raises:
            MissingError, CorruptError, StorageError: as `take`.
        """
        with self._lock:
            found = self._kept.get(place)
            if found is not None:
                self._kept.move_to_end(place)
                self.hits += 1
                return found
            coming = self._coming.get(place)
            mine = coming is None
            if coming is None:
                coming = self._coming[place] = Future()
        if not mine:
            return coming.result()
        try:
            batch = self._read(place)
        except BaseException as error:
            with self._lock:
                del self._coming[place]
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

    def _mask(self, shard: int) -> np.ndarray | None:
        with self._lock:
            if shard not in self._live:
                if len(self._live) >= _SHARDS:
                    self._live.popitem(last=False)
                self._live[shard] = self._dataset.live_rows(shard)
            return self._live[shard]

    def _place(self, shard: int, row: int) -> tuple[BatchPlace, int]:
        """Return the batch that a row lies in, and its number there."""
        starts = self._starts.get(shard)
        if starts is None:
            starts = np.cumsum([0, *(span.rows for span in self._dataset.segments.shard(shard).layout.batches)])
            with self._lock:
                if len(self._starts) >= _SHARDS:
                    self._starts.popitem(last=False)
                self._starts[shard] = starts
        if len(starts) == 1:  # Written before shards said where their batches are: read as a whole.
            return BatchPlace(shard, -1), row
        index = int(np.searchsorted(starts, row, side="right")) - 1
        return BatchPlace(shard, index), row - int(starts[index])

    def _read(self, place: BatchPlace) -> pa.RecordBatch:
        if place.number >= 0:
            return self._dataset.read_batch(place.shard, place.number, columns=self._columns)
        table = self._dataset.record_shard(place.shard)
        return _joined((table if self._columns is None else table.select(self._columns)).to_batches(), self.schema)

    def _keep(self, place: BatchPlace, batch: pa.RecordBatch) -> None:
        self.fills += 1
        self._kept[place] = batch
        self.resident_bytes += batch.nbytes
        while self.resident_bytes > self._budget_bytes and len(self._kept) > 1:
            _, gone = self._kept.popitem(last=False)
            self.resident_bytes -= gone.nbytes
            self.evictions += 1


def _joined(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """Return the rows of all `batches` in one, copied."""
    if not batches:
        return pa.RecordBatch.from_pylist([], schema=schema)
    joined = pa.Table.from_batches(batches).combine_chunks().to_batches()
    if len(joined) > 1:
        raise ConfigError(
            "a batch of rows is larger than an Arrow array can be", rows=len(batches), hint="Lower global_batch."
        )
    return joined[0] if joined else batches[0]
