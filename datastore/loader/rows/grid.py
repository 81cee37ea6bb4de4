"""Which rows a loader goes through, and in which shards they lie.

Without a choice these are all rows of the dataset, deleted ones too: their places stay, so a run goes on after a delete.
A choice is a list of row numbers, in the order of the dataset; a row may be in it more than once. It is made once, from a
condition or by the user, and is part of the fingerprint of a state.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.operations.selection import Matcher, Selection
from datastore.digest import digest_hex
from datastore.errors import ConfigError
from datastore.loader.order.lanes import I64
from datastore.loader.order.mix import U64
from datastore.loader.order.order import Order, OrderKey, SampleOrder
from datastore.loader.rows.source import RowSource

__all__ = ["Grid", "RowGrid", "live_rows_of", "matching_rows", "row_grid"]


class Grid(Protocol):
    """Rows to go through: each once an epoch (`RowGrid`), or as `sampling` asks for."""

    @property
    def samples(self) -> int:
        """N, what the order goes through before it begins anew."""
        ...

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch: N, or a multiple of it."""
        ...

    @property
    def shard_start(self) -> I64:
        """[S] number in the dataset of each shard's first row."""
        ...

    def numbers(self, samples: I64, positions: I64) -> I64:
        """Return the number in the dataset of each sample at its position."""
        ...

    def order(self, uid64: U64, key: OrderKey) -> SampleOrder:
        """Return the order of the samples."""
        ...

    def fingerprint(self, uid64: U64) -> str:
        """Return 16 hex digits that name the rows, and what they are gone through by."""
        ...


@dataclass(frozen=True, slots=True)
class RowGrid:
    """The rows of a line, laid end to end shard by shard. Memory: 24 bytes a shard, 8 a row that is chosen."""

    samples: int
    """N, all rows."""

    run_start: I64
    """[S] which row of the line is the first of each shard."""

    run_length: I64
    """[S] how many rows of the line each shard has."""

    shard_start: I64
    """[S] number in the dataset of each shard's first row."""

    chosen: I64 | None = None
    """[N] numbers in the dataset, ascending; None: all."""

    @property
    def rows_per_epoch(self) -> int:
        """Rows that are gone through before the order begins anew."""
        return self.samples

    def numbers(self, samples: I64, positions: I64) -> I64:
        """Return the number in the dataset of each row of the line, and of the order: here the positions do not matter."""
        del positions
        return samples if self.chosen is None else self.chosen[samples]

    def order(self, uid64: U64, key: OrderKey) -> SampleOrder:
        """Return the order of the rows."""
        return Order(self, uid64, key)

    def fingerprint(self, uid64: U64) -> str:
        """Return 16 hex digits that name the line: the shards and their rows, and which of these are chosen."""
        parts = [uid64.tobytes(), self.run_length.tobytes()]
        return digest_hex(*parts, *([] if self.chosen is None else [self.chosen.tobytes()]))[:16]


def row_grid(dataset: RowSource, *, chosen: I64 | None = None) -> RowGrid:
    """Return the rows of `dataset`, or those that are `chosen`.

    Raises:
        ConfigError: there are none, or a number that is chosen is not one of a row.
    """
    rows = dataset.segments.documents
    ends = np.cumsum(rows)
    starts, total = ends - rows, int(ends[-1]) if len(ends) else 0
    if chosen is None:
        if not total:
            raise ConfigError("the dataset has no rows", url=dataset.url, hint="Add data.")
        return RowGrid(total, starts, rows, starts)
    ordered = np.sort(np.asarray(chosen, np.int64))
    if not len(ordered):
        raise ConfigError("no row is chosen", url=dataset.url, hint="Choose others, or take all.")
    if ordered[0] < 0 or ordered[-1] >= total:
        wrong = int(ordered[0] if ordered[0] < 0 else ordered[-1])
        raise ConfigError("there is no such row", row=wrong, rows=total, hint="Rows count from 0.")
    run_start = np.searchsorted(ordered, starts)
    run_length = np.searchsorted(ordered, ends) - run_start
    return RowGrid(len(ordered), run_start, run_length, starts, ordered)


def matching_rows(dataset: RowSource, where: "str | pc.Expression") -> I64:
    """Return the numbers of the rows for which a condition is true, deleted ones too: one pass over the columns it names.

    Raises:
        ConfigError: the condition does not fit the columns.
        DependencyError: it is SQL, and DuckDB is not installed.
    """
    matcher = Matcher(Selection.of(ids=None, where=where), dataset.schema)
    found, at = [np.empty(0, np.int64)], 0
    for batch in dataset.iter_batches(columns=matcher.columns, deleted=True):
        mask, _ = matcher.match(pa.Table.from_batches([batch]))
        found.append(np.flatnonzero(mask) + at)
        at += batch.num_rows
    return np.concatenate(found)


def live_rows_of(dataset: RowSource) -> I64:
    """Return the numbers of all rows that are not deleted."""
    return np.concatenate([np.empty(0, np.int64), *_live(dataset)])


def _live(dataset: RowSource) -> Iterable[I64]:
    at = 0
    for shard, rows in enumerate(dataset.segments.documents.tolist()):
        live = dataset.live_rows(shard)
        yield np.arange(at, at + rows) if live is None else np.flatnonzero(live) + at
        at += rows
