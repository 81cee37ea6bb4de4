"""The batches of record shards that rows are taken from: read when a row of theirs is needed, kept under a budget.

A batch of a shard (2 MiB as a rule) is the least that can be read and checked. Rows of one window lie in few of them, and
neighbouring steps come back to them. What was used least recently goes first. Thread-safe: one that several threads need is
read once.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pt

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.formats.schema import no_rows
from datastore.loader.cache.batches import CachedBatches
from datastore.loader.cache.opening import open_disk
from datastore.loader.order.lanes import I64
from datastore.loader.rows.source import RowSource
from datastore.loader.settings import LoaderSettings

__all__ = ["RowStore"]

_SHIFT = 32
"""A batch is named by one number: its shard, and below so many bits 1 more than its number there; 0: the whole shard."""

_TAKEN, _SHORT_BYTES = 16, 512
"""Rows of a batch, and bytes of a row, from which and up to which rows are taken together."""

_PLAIN: tuple[Any, ...] = (
    pt.is_primitive,
    pt.is_decimal,
    pt.is_string,
    pt.is_large_string,
    pt.is_binary,
    pt.is_large_binary,
    pt.is_list,
    pt.is_large_list,
    pt.is_struct,
)

_SHARDS = 65_536
"""Shards whose batches are remembered: some hundred bytes each."""


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
        disk = open_disk(dataset, options=options) if isinstance(dataset, Dataset) else None
        self._cached = CachedBatches(dataset, disk) if disk is not None and isinstance(dataset, Dataset) else None
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, tuple[pa.RecordBatch, int]] = OrderedDict()
        self._coming: dict[int, tuple[int, Future[tuple[pa.RecordBatch, int]]]] = {}
        """What is being read, by which thread."""
        self._starts: OrderedDict[int, I64] = OrderedDict()
        self._live: OrderedDict[int, np.ndarray | None] = OrderedDict()
        self.hits = self.fills = self.evictions = self.resident_bytes = 0

    def take(self, shards: I64, rows: I64) -> pa.RecordBatch:
        """Return the rows number `rows` of `shards`, in that order, as one batch of its own memory.

        Raises:
            MissingError, CorruptError, StorageError: a batch that they lie in cannot be read, or is damaged.
        """
        number, within = self._places(shards, rows)
        keys, members = np.unique(shards << _SHIFT | number + 1, return_inverse=True)
        wanted = keys.tolist()
        kept = self._kept_of(wanted)
        parts: list[pa.RecordBatch] = []
        order: list[I64] = []
        first, held = 0, dict[int, pa.RecordBatch]()
        size_bytes = 0
        for index, key in enumerate(wanted):
            held[index], read_bytes = kept.pop(key) if key in kept else self._batch(key)
            size_bytes += read_bytes
            if size_bytes > self._budget_bytes // 4 or index + 1 == len(wanted):
                # Slices keep what they are slices of: copy the rows, and let go of it, before more is read.
                here = np.flatnonzero((members >= first) & (members <= index))
                parts.append(_gathered(held, members[here], within[here], self.schema))
                order.append(here)
                first, size_bytes = index + 1, 0
                held.clear()
        if len(parts) < 2:
            return parts[0] if parts else _joined([], self.schema)
        back = np.argsort(np.concatenate(order)).tolist()
        whole = _joined(parts, self.schema)
        return _joined([whole.slice(index, 1) for index in back], self.schema)

    def _kept_of(self, keys: list[int]) -> dict[int, tuple[pa.RecordBatch, int]]:
        """Return those of some batches that are kept, and note that they were used."""
        with self._lock:
            found = {key: self._kept[key] for key in keys if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
            self.hits += len(found)
            return found

    def _batch(self, place: int) -> tuple[pa.RecordBatch, int]:
        """Return one batch of a shard, deleted rows too, and its size in bytes."""
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
            rows = self._read(place)
            batch = rows, rows.nbytes
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

    def _places(self, shards: I64, rows: I64) -> tuple[I64, I64]:
        """Return the number of the batch that each row lies in, and the row's number there."""
        number, within = np.full(len(rows), -1, np.int64), rows.copy()
        for shard in np.unique(shards).tolist():
            starts = self._batch_starts(shard)
            # One that was written before shards said where their batches are is read as a whole.
            if len(starts) > 1:
                here = np.flatnonzero(shards == shard)
                number[here] = np.searchsorted(starts, rows[here], side="right") - 1
                within[here] -= starts[number[here]]
        return number, within

    def _batch_starts(self, shard: int) -> I64:
        """Return the first row of each batch of a shard, and the number of its rows."""
        with self._lock:
            starts = self._starts.get(shard)
            if starts is None:
                if len(self._starts) >= _SHARDS:
                    self._starts.popitem(last=False)
                starts = self._starts[shard] = np.cumsum([0, *self._dataset.batch_rows(shard)])
            return starts

    def _read(self, place: int) -> pa.RecordBatch:
        shard, number = place >> _SHIFT, (place & (1 << _SHIFT) - 1) - 1
        if number >= 0 and self._cached is not None:
            return self._cached.read(shard, number, columns=self._columns)
        if number >= 0:
            return self._dataset.read_batch(shard, number, columns=self._columns)
        table = self._dataset.record_shard(shard)
        return _joined((table if self._columns is None else table.select(self._columns)).to_batches(), self.schema)

    def _keep(self, place: int, batch: tuple[pa.RecordBatch, int]) -> None:
        self.fills += 1
        self._kept[place] = batch
        self.resident_bytes += batch[1]
        while self.resident_bytes > self._budget_bytes and len(self._kept) > 1:
            _, (_, size_bytes) = self._kept.popitem(last=False)
            self.resident_bytes -= size_bytes
            self.evictions += 1


def _gathered(held: Mapping[int, pa.RecordBatch], members: I64, within: I64, schema: pa.Schema) -> pa.RecordBatch:
    """Return rows of the batches `held`, each by its batch and its number there, copied.

    One by one, which costs 1.3 us a row. Where many come from each, and are short, pyarrow takes those of a batch at once, and then
    puts them in order: two copies, and 1.8 times as fast for rows of 100 bytes. From 500 bytes on there is nothing to gain.
    """
    if len(members) >= _TAKEN * len(held) and all(map(_is_plain, schema.types)):
        rows, size_bytes = (sum(getattr(batch, name) for batch in held.values()) for name in ("num_rows", "nbytes"))
        if size_bytes <= _SHORT_BYTES * rows:
            order = np.argsort(members, kind="stable")
            numbers, starts = np.unique(members[order], return_index=True)
            groups = zip(numbers.tolist(), np.split(within[order], starts[1:]), strict=True)
            taken = _joined([held[number].take(group) for number, group in groups], schema)
            return taken.take(np.argsort(order))
    pairs = zip(members.tolist(), within.tolist(), strict=True)
    return _joined([held[batch].slice(row, 1) for batch, row in pairs], schema)


def _is_plain(kind: Any) -> bool:
    """Return whether pyarrow takes rows of a type: not of all it does."""
    inner = all(_is_plain(kind.field(index).type) for index in range(kind.num_fields))
    return inner and any(is_one(kind) for is_one in _PLAIN)


def _joined(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """Return the rows of all `batches` in one, copied."""
    if not batches:
        return no_rows(schema)
    joined = pa.Table.from_batches(batches).combine_chunks().to_batches()
    if len(joined) > 1:
        raise ConfigError(
            "a batch of rows is larger than an Arrow array can be", rows=len(batches), hint="Lower global_batch."
        )
    return joined[0] if joined else batches[0]
