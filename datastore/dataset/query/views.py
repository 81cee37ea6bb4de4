"""A dataset as other libraries see it: Arrow, pandas, Polars, Hugging Face `datasets`, and DuckDB through SQL.

Nothing is converted: they get the Arrow tables that the shards are. What
goes through here honours deletions. `arrow_dataset` hands out the files themselves, which cannot, so it says no when
there are some; and whoever scans files on their own reads them unchecked, as with any Parquet: `verify` checks them.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datastore.dataset.query.readable import Part, Readable
from datastore.dataset.shards.files import read_documents, read_token_table
from datastore.errors import ConfigError, DependencyError
from datastore.formats.arrow import array_of, numbers_of, types_within
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.evolution import schema_id
from datastore.formats.tokens import ColumnType, Offsets, token_schema
from datastore.threads import in_parallel

if TYPE_CHECKING:
    import pyarrow.dataset

__all__ = ["Views"]


class Views(Readable):
    """The part of `Dataset` that speaks to other libraries."""

    @property
    def token_schema(self) -> pa.Schema:
        """The columns of token shards: `tokens`, as wide as any shard needs, and what lies beside each token."""
        itemsize = self.segments.itemsize
        dtype = "uint32" if itemsize.size and int(itemsize.max()) == 4 else "uint16"
        return token_schema(dtype, columns=[ColumnType(c.name, c.dtype, c.width) for c in self.segments.columns])

    @property
    def row_schema(self) -> pa.Schema:
        """The columns of `rows`: those of the records; or of the documents, `tokens` being the tokens themselves."""
        if self.kind == "records":
            return self.schema
        tokens, *others = self.token_schema
        columns = [tokens if field.name == "tokens" else field for field in DOCUMENTS_SCHEMA]
        return pa.schema([*columns, *others])

    def older_shards(self) -> frozenset[str]:
        """Return the uids of the record shards that have an older schema: their files have other columns than `rows`."""
        if self.kind != "records" or not schema_id(self.schema):
            return frozenset()
        return frozenset(shard.uid for shard in self.segments if shard.layout.schema_id != schema_id(self.schema))

    def rows(self, index: int) -> pa.Table:
        """Return the rows of shard `index` that are not deleted, as `row_schema`; the whole shard is read and checked.

        Raises:
            MissingError: a file is gone.
            CorruptError: a file is damaged.
        """
        if self.kind == "records":
            return self.live_records(index)
        columns = dict(zip(DOCUMENTS_SCHEMA.names, self.documents(index).columns, strict=True))
        columns |= dict(zip(self.token_schema.names, self.token_lists(index).columns, strict=True))
        joined = pa.table([columns[name] for name in self.row_schema.names], schema=self.row_schema)
        live = self.live_rows(index)
        return joined if live is None else joined.filter(array_of(live))

    def lengths(self, *, most_shards: int = 16) -> list[int]:
        """Return how many documents have so many bits of tokens: number i counts those of 2**(i - 1) to 2**i - 1 tokens.

        Only `most_shards` shards are looked at, evenly spread over the dataset, and of each its documents file; deleted
        documents do not count. It costs a read of some kilobytes each.

        Raises:
            ConfigError: the dataset holds records.
            MissingError, CorruptError: a file is gone or damaged.
        """
        if self.kind != "tokens":
            raise ConfigError("records have no tokens to count", url=self.url, hint="Open a dataset of tokens.")
        count = len(self.segments)
        chosen = np.unique(np.linspace(0, count - 1, min(count, most_shards), dtype=np.int64)).tolist() if count else []

        def bits(index: int) -> npt.NDArray[np.int64]:
            documents = read_documents(self.storage, self.segments.shard(index), columns=["tokens"])
            lengths, live = numbers_of(documents.column("tokens")), self.live_rows(index)
            kept = lengths if live is None else lengths[live]
            return np.bincount(np.frexp(kept.astype(np.float64))[1], minlength=64)

        found = sum(in_parallel(bits, chosen), start=np.zeros(64, dtype=np.int64))
        return [int(count) for count in np.trim_zeros(found, "b")]

    def token_lists(self, index: int) -> pa.Table:
        """Return all of token shard `index` as `token_schema`, deleted documents too.

        Raises:
            MissingError: the file is gone.
            CorruptError: the file is damaged.
        """
        found = read_token_table(self.storage, self.segments.shard(index))
        arrays = {"tokens": found.values, **found.columns}
        schema = self.token_schema
        return pa.table([_lists(arrays[field.name], found.offsets, field.type) for field in schema], schema=schema)

    def to_arrow(self, *, columns: Sequence[str] | None = None, tokens: bool = False) -> pa.Table:
        """Return everything as one table: all records; or all documents, with `tokens` together with their tokens.

        Deleted rows are left out. All of it is in memory: `to_batches` takes one shard at a time.

        Raises:
            ConfigError: there is no such column.
        """
        whole = tokens or self.kind == "records"
        schema = self.row_schema if whole else DOCUMENTS_SCHEMA
        wanted = _checked_names(schema, columns)
        read = self.rows if whole else self.live_documents
        parts = [read(index).select(wanted) for index in range(len(self.segments))]
        return pa.concat_tables([pa.Table.from_batches([], schema=schema).select(wanted), *parts])

    def to_batches(self, *, columns: Sequence[str] | None = None) -> pa.RecordBatchReader:
        """Return all rows, as `row_schema`, as a stream with at most one shard in memory; it can be read once.

        Raises:
            ConfigError: there is no such column.
        """
        wanted = _checked_names(self.row_schema, columns)
        schema = pa.schema([self.row_schema.field(name) for name in wanted])

        def batches() -> Iterator[pa.RecordBatch]:
            for index in range(len(self.segments)):
                yield from self.rows(index).select(wanted).to_batches()

        found = self.iter_batches(columns=columns) if self.kind == "records" else batches()
        return pa.RecordBatchReader.from_batches(schema, (batch.select(wanted) for batch in found))

    def to_pandas(self, *, columns: Sequence[str] | None = None, tokens: bool = False) -> Any:
        """Return `to_arrow` of the same arguments as a pandas data frame, in memory.

        Raises:
            ConfigError: pandas has no form of a column's type, or of a value in it.
            DependencyError: pandas is not installed.
        """
        return _converted(self.to_arrow(columns=columns, tokens=tokens), lambda table: table.to_pandas(), to="pandas")

    def to_polars(self, *, columns: Sequence[str] | None = None, tokens: bool = False) -> Any:
        """Return `to_arrow` of the same arguments as a Polars data frame, which shares its memory where it can.

        Raises:
            ConfigError: Polars has no form of a column's type.
            DependencyError: Polars is not installed.
        """
        try:
            import polars as pl  # noqa: PLC0415 - an extra
        except ModuleNotFoundError:
            raise _missing_library("polars") from None
        return _converted(self.to_arrow(columns=columns, tokens=tokens), pl.from_arrow, to="Polars")

    def to_hf(self) -> Any:
        """Return a `datasets.Dataset` of the records, or of the tokens: a column `tokens`, one row per document.

        It maps the shards where they are on this machine, copies nothing, and goes through `map` and worker processes
        without a copy, too; elsewhere the shards are read into memory. Deleted rows are left out by an index. Class labels
        and other features that the rows came with are there again.

        Raises:
            ConfigError: `datasets` does not have the type of a column.
            DependencyError: `datasets` is not installed.
        """
        try:
            from datastore.dataset.query.hf import mapped_dataset  # noqa: PLC0415 - an extra
        except ModuleNotFoundError:
            raise _missing_library("datasets") from None
        return mapped_dataset(self)

    def sql(self, query: str) -> pa.Table:
        """Return the result of one SELECT over the table `documents`, or for a record dataset `records`.

        DuckDB runs it and reads only the columns and row groups that it needs. Deleted rows are not there, and nothing
        but these tables can be reached.

        Raises:
            ConfigError: the query is wrong, or is no SELECT.
            DependencyError: DuckDB is not installed.
        """
        try:
            from datastore.dataset.query.sql import run_query  # noqa: PLC0415 - an extra
        except ModuleNotFoundError:
            raise _missing_library("duckdb", extra="sql") from None
        return run_query(self, query)

    def arrow_dataset(self, part: Part = "rows", *, ignore_deletions: bool = False) -> "pyarrow.dataset.Dataset":
        """Return a `pyarrow.dataset.Dataset` over the files, for whatever scans those: Ray Data, Polars, DuckDB.

        `part` is `rows` (records, or tokens as one column of lists) or `documents`. Files are read when they are
        scanned, column by column, without a check of their digests.

        Raises:
            ConfigError: a scan of files would show deleted rows or columns of an older schema; or a record dataset is
                asked for documents.
        """
        from datastore.dataset.query.scan import scan_shards  # noqa: PLC0415 - pyarrow.dataset takes 30 ms to load

        return scan_shards(self, part, ignore_deletions=ignore_deletions)


def _missing_library(name: str, *, extra: str = "") -> DependencyError:
    """Return the error for an optional library that is not installed."""
    command = f"pip install 'llm-datastore[{extra}]'" if extra else f"pip install {name}"
    return DependencyError(f"{name} is not installed", hint=f"Run {command}.")


def _lists(values: "npt.NDArray[Any]", offsets: Offsets, kind: Any) -> Any:
    """Return list `i`, which is `values[offsets[i]:offsets[i + 1]]`, for each `i` as an Arrow array of type `kind`."""
    lists: Any = pa.ListArray
    fixed: Any = pa.FixedSizeListArray
    inner = kind.value_type if values.ndim == 1 else kind.value_type.value_type
    flat = array_of(values.reshape(-1)).cast(inner)
    items = flat if values.ndim == 1 else fixed.from_arrays(flat, type=kind.value_type)
    return lists.from_arrays(array_of(offsets.astype(np.int32)), items, type=kind)


def _converted(table: pa.Table, convert: Callable[[pa.Table], Any], *, to: str) -> Any:
    """Return what `convert` makes of `table`; where it fails, the column that it fails on is named."""
    if to == "Polars":
        for field in table.schema:
            if any(map(_ends_polars, types_within(field.type))):
                raise _no_form(field, "its reader of Arrow does not know it", to)
    try:
        return convert(table)
    except Exception as error:  # noqa: BLE001 - Polars has exceptions of its own
        for field in table.schema:
            try:
                convert(table.select([field.name]))
            except Exception as reason:  # noqa: BLE001 - whatever it is, it is this column's
                raise _no_form(field, str(reason), to) from None
        raise ConfigError(f"{to} has no form of these rows: {error}", hint="Read them as Arrow.") from None


def _no_form(field: "pa.Field[Any]", reason: str, to: str) -> ConfigError:
    return ConfigError(
        f"{to} has no form of a column: {(reason or 'no reason given').splitlines()[0]}",
        column=field.name,
        type=str(field.type),
        hint="Name the other columns with `columns`, or read Arrow.",
    )


def _ends_polars(kind: Any) -> bool:
    """Return whether Polars 2.1.0 panics at a type, with a trace of its own, instead of refusing it."""
    return pa.types.is_decimal256(kind) or (pa.types.is_fixed_size_list(kind) and not kind.list_size)


def _checked_names(schema: pa.Schema, columns: Sequence[str] | None) -> list[str]:
    unknown = sorted(set(columns or ()) - set(schema.names))
    if unknown:
        raise ConfigError("no such column", columns=unknown, hint=f"There are: {', '.join(schema.names)}.")
    return list(schema.names if columns is None else columns)
