"""SQL over one version, by DuckDB: columns and predicates go down to the files, deleted rows are not there.

Shards without deletions are scanned as files. Those with some, or of an older schema, are read first, into a temporary
table that DuckDB keeps on disk where memory is short: a scan of a file does not say which row is which. The query sees
these tables and nothing else; no file, network or extension can be reached from it.
"""

import tempfile
from collections.abc import Iterator

import duckdb
import pyarrow as pa

from datastore.dataset.query.readable import Readable
from datastore.dataset.query.scan import scan_files
from datastore.errors import ConfigError
from datastore.formats.documents import DOCUMENTS_SCHEMA

__all__ = ["run_query"]


def run_query(dataset: Readable, query: str) -> pa.Table:
    """Return what `Dataset.sql` promises."""
    name = "records" if dataset.kind == "records" else "documents"
    with tempfile.TemporaryDirectory(prefix="datastore-sql-") as spill, duckdb.connect(":memory:") as connection:
        connection.execute("SET temp_directory = ?", [spill])
        connection.execute("SET python_enable_replacements = false")  # A name must not find the caller's variables.
        _register(connection, dataset, name)
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        try:
            return _result(connection, query)
        except duckdb.Error as error:
            columns = dataset.schema.names if dataset.kind == "records" else DOCUMENTS_SCHEMA.names
            raise ConfigError(
                f"the query failed: {' '.join(str(error).split())}", hint=f"Columns of {name}: {', '.join(columns)}."
            ) from None


def _register(connection: duckdb.DuckDBPyConnection, dataset: Readable, name: str) -> None:
    """Make the view `name`: the files of untouched shards, and the live rows of the others."""
    touched = dataset.deletions.uids | dataset.older_shards()
    untouched = (shard for shard in dataset.segments if shard.uid not in touched)
    connection.register("_files", scan_files(dataset, "rows" if name == "records" else "documents", untouched))
    union = "SELECT * FROM _files"
    if touched:
        connection.register("_reader", _live_rows(dataset, name, touched))
        connection.execute("CREATE TEMP TABLE _live AS SELECT * FROM _reader")
        connection.unregister("_reader")
        union += " UNION ALL SELECT * FROM _live"
    connection.execute(f"CREATE VIEW {name} AS {union}")


def _live_rows(dataset: Readable, name: str, uids: frozenset[str]) -> pa.RecordBatchReader:
    schema = dataset.schema if name == "records" else DOCUMENTS_SCHEMA
    read = dataset.live_records if name == "records" else dataset.live_documents

    def batches() -> Iterator[pa.RecordBatch]:
        for index, shard in enumerate(dataset.segments):
            if shard.uid in uids:
                yield from read(index).to_batches()

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
