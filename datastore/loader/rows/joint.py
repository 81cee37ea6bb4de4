"""The rows of several sources under one numbering, so that what reads one source reads a mixture.

Shards and rows are those of all sources, one source after the other, in the order of their names.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datastore.errors import ConfigError
from datastore.loader.mixture.order import Place
from datastore.loader.order.lanes import I64
from datastore.loader.rows.grid import RowGrid
from datastore.loader.rows.source import RowSource

__all__ = ["JointRows", "joint_rows"]


@dataclass(frozen=True)
class JointShards:
    """The shards of all sources, in order, as columns."""

    documents: I64
    size_bytes: I64
    uid64: npt.NDArray[np.uint64]


class JointRows:
    """Several sources as one. Safe for any number of threads, and it can be sent to another process, as its sources.

    Raises:
        ConfigError: a source holds tokens, or has other columns than the others.
    """

    kind = "records"
    version = 0

    def __init__(self, sources: Mapping[str, RowSource], *, columns: Sequence[str]) -> None:
        self._sources = list(sources.values())
        self._first = [0, *np.cumsum([len(source.segments.documents) for source in self._sources]).tolist()]
        schemas = {name: _columns_of(source.schema, columns, name) for name, source in sources.items()}
        self.schema: pa.Schema = next(iter(schemas.values()))
        """The columns that are read."""
        self._columns = tuple(self.schema.names)
        for name, schema in schemas.items():
            if schema != self.schema:
                raise ConfigError(
                    "sources of the mixture have different columns",
                    source=name,
                    columns=[str(field) for field in schema],
                    others=[str(field) for field in self.schema],
                    hint="Read those that they share: LoaderSettings(columns=(...)); or change one with `datastore evolve`.",
                )

    @property
    def url(self) -> str:
        """Where its sources lie."""
        return " + ".join(source.url for source in self._sources)

    @property
    def uuid(self) -> str:
        """Names its sources."""
        return " + ".join(source.uuid for source in self._sources)

    @cached_property
    def segments(self) -> JointShards:
        """All shards."""
        parts = [source.segments for source in self._sources]
        return JointShards(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("documents", "size_bytes", "uid64"))
        )

    @property
    def deletions(self) -> Any:
        """True if rows are deleted."""
        return any(source.deletions for source in self._sources)

    @property
    def batch_bytes(self) -> int:
        """About what the largest batches take in memory."""
        return max(source.batch_bytes for source in self._sources)

    def live_rows(self, index: int) -> npt.NDArray[np.bool_] | None:
        """Return which rows of a shard are not deleted, or None if all are there."""
        source, shard = self._place(index)
        return source.live_rows(shard)

    def batch_rows(self, shard: int) -> Sequence[int]:
        """Return how many rows each batch of a shard has; none if it is read as a whole only."""
        source, own = self._place(shard)
        return source.batch_rows(own)

    def read_batch(self, shard: int, batch: int, *, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Return one batch, deleted rows too."""
        source, own = self._place(shard)
        return source.read_batch(own, batch, columns=columns or self._columns)

    def record_shard(self, index: int) -> pa.Table:
        """Return all rows of a shard, deleted ones too."""
        source, own = self._place(index)
        return source.record_shard(own).select(list(self._columns))

    def iter_batches(self, *, columns: Sequence[str] | None = None, deleted: bool = False) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, source by source."""
        for source in self._sources:
            yield from source.iter_batches(columns=columns or self._columns, deleted=deleted)

    def _place(self, shard: int) -> tuple[RowSource, int]:
        source = bisect.bisect_right(self._first, shard) - 1
        return self._sources[source], shard - self._first[source]


def joint_rows(grids: Sequence[RowGrid], places: Sequence[Place], *, rows: Sequence[int]) -> RowGrid:
    """Return the rows of all sources, which begin at `places` and have `rows` rows each, chosen ones or not."""
    first_row = np.cumsum([0, *rows]).tolist()[:-1]
    chosen = [
        first + (np.arange(grid.samples) if grid.chosen is None else grid.chosen)
        for grid, first in zip(grids, first_row, strict=True)
    ]
    return RowGrid(
        samples=sum(grid.samples for grid in grids),
        run_start=np.concatenate([grid.run_start + at.first_sample for grid, at in zip(grids, places, strict=True)]),
        run_length=np.concatenate([grid.run_length for grid in grids]),
        shard_start=np.concatenate([grid.shard_start + first for grid, first in zip(grids, first_row, strict=True)]),
        chosen=None if all(grid.chosen is None for grid in grids) else np.concatenate(chosen),
    )


def _columns_of(schema: pa.Schema, names: Sequence[str], source: str) -> pa.Schema:
    """Return the columns that are read of a source, without what is noted in the schema."""
    for name in names:
        if name not in schema.names:
            raise ConfigError(
                "a source of the mixture has no such column",
                source=source,
                column=name,
                columns=schema.names,
                hint="Name columns that all sources have.",
            )
    return pa.schema([schema.field(name) for name in names or schema.names])
