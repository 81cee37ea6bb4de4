"""SQL over one version, by DuckDB: columns and predicates go down to the files, deleted rows are not there.

Shards without deletions are scanned as files. Those with some, or of an older schema, are read first, into a temporary
table that DuckDB keeps on disk where memory is short: a scan of a file does not say which row is which. The query sees
these tables and nothing else; no file, network or extension can be reached from it.

Columns of types that DuckDB lacks (16-bit floats, wide decimals, those with a negative scale) are not in the view, and neither are columns whose names
differ only in case, which DuckDB cannot tell apart: a query for one is refused by name, and all others are answered.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import duckdb
import pyarrow as pa

from datastore.dataset.query.readable import Readable
from datastore.dataset.query.scan import scan_files
from datastore.errors import ConfigError, DatastoreError
from datastore.formats.arrow import types_within
from datastore.formats.documents import DOCUMENTS_SCHEMA

__all__ = ["run_query"]


def run_query(dataset: Readable, query: str) -> pa.Table:
    """Return what `Dataset.sql` promises."""
    try:
        return _run(dataset, query, scan=True)
    except _UnreadableError:
        # Whoever reads whole shards checks them, goes on with another copy where there is one, and says what is damaged.
        return _run(dataset, query, scan=False)


class _UnreadableError(Exception):
    """A file could not be scanned."""


def _run(dataset: Readable, query: str, *, scan: bool) -> pa.Table:
    """Return the answer; without `scan`, every shard is read and checked first."""
    name = "records" if dataset.kind == "records" else "documents"
    damage: list[DatastoreError] = []
    with tempfile.TemporaryDirectory(prefix="datastore-sql-") as spill, duckdb.connect(":memory:") as connection:
        connection.execute("SET temp_directory = ?", [spill])
        connection.execute("SET python_enable_replacements = false")  # A name must not find the caller's variables.
        left_out: list[str] = []
        try:
            left_out = _register(connection, dataset, name, scan=scan, damage=damage)
            connection.execute("SET enable_external_access = false")
            connection.execute("SET lock_configuration = true")
            return _result(connection, query)
        except duckdb.Error as error:
            if damage:  # DuckDB has made a text of it.
                raise damage[0] from None
            if scan and "_files" in str(error):  # It says which table it could not read.
                raise _UnreadableError from None
            columns = dataset.schema.names if dataset.kind == "records" else DOCUMENTS_SCHEMA.names
            hint = f"Columns of {name}: {', '.join(column for column in columns if column not in left_out)}."
            if left_out:
                hint += f" SQL cannot name {', '.join(left_out)}: read them with to_batches()."
            raise ConfigError(f"the query failed: {' '.join(str(error).split())}", hint=hint) from None


def _register(
    connection: duckdb.DuckDBPyConnection, dataset: Readable, name: str, *, scan: bool, damage: list[DatastoreError]
) -> list[str]:
    """Make the view `name`: the files of untouched shards, and the live rows of the others; return the columns left out."""
    touched = dataset.deletions.uids | dataset.older_shards()
    if not scan:
        touched = frozenset(shard.uid for shard in dataset.segments)
    untouched = (shard for shard in dataset.segments if shard.uid not in touched)
    files: Any = scan_files(dataset, "rows" if name == "records" else "documents", untouched)
    left_out = _unknown_to(connection, files.schema)
    schema = _without(files.schema, left_out)
    union = "SELECT * FROM _files"
    if touched:

        def make(schema: pa.Schema) -> None:
            connection.register("_reader", _live_rows(dataset, name, touched, schema, damage))
            try:
                connection.execute("CREATE OR REPLACE TEMP TABLE _live AS SELECT * FROM _reader")
            finally:
                connection.unregister("_reader")

        try:
            make(schema)
        except duckdb.ConversionException:  # A value that DuckDB does not hold must not close the other columns.
            left_out += [field.name for field in schema if not _goes(partial(make, pa.schema([field])))]
            schema = _without(files.schema, left_out)
            make(schema)
        union += " UNION ALL SELECT * FROM _live"
    connection.register("_files", files.replace_schema(schema) if left_out else files)
    connection.execute(f"CREATE VIEW {name} AS {union}")
    return left_out


def _without(schema: pa.Schema, names: list[str]) -> pa.Schema:
    return pa.schema([field for field in schema if field.name not in names])


def _goes(make: Callable[[], None]) -> bool:
    try:
        make()
    except duckdb.ConversionException:
        return False
    return True


def _unknown_to(connection: duckdb.DuckDBPyConnection, schema: pa.Schema) -> list[str]:
    """Return the columns that a query cannot name."""
    names = Counter(name.casefold() for name in schema.names)
    left_out = [field.name for field in schema if names[field.name.casefold()] > 1]
    for field in schema:
        # DuckDB 2.0.1 takes the sign of a scale for a large number, and is of no use after that.
        if _has_negative_scale(field.type):
            left_out.append(field.name)
            continue
        try:
            connection.from_arrow(pa.Table.from_batches([], pa.schema([field]))).fetchall()
        except (duckdb.NotImplementedException, pa.ArrowException):
            left_out.append(field.name)
    return left_out


def _has_negative_scale(kind: Any) -> bool:
    return any(pa.types.is_decimal(inner) and inner.scale < 0 for inner in types_within(kind))


def _live_rows(
    dataset: Readable, name: str, uids: frozenset[str], schema: pa.Schema, damage: list[DatastoreError]
) -> pa.RecordBatchReader:
    read = dataset.live_records if name == "records" else dataset.live_documents

    def batches() -> Iterator[pa.RecordBatch]:
        for index, shard in enumerate(dataset.segments):
            if shard.uid in uids:
                try:
                    found = read(index)
                except DatastoreError as error:
                    damage.append(error)
                    raise
                yield from found.select(schema.names).to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())


def _result(connection: duckdb.DuckDBPyConnection, query: str) -> pa.Table:
    statements = connection.extract_statements(query)
    kinds = {duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN}
    if len(statements) != 1 or statements[0].type not in kinds:
        raise ConfigError(
            "not one SELECT", statements=len(statements), hint="A dataset is read through SQL, never written."
        )
    found: pa.Table = connection.sql(query).to_arrow_table()
    return found
