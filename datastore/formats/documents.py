"""The documents of a token shard: plain Parquet, row `i` describes row `i` of the shard.

It answers "where does this text come from" for every token: a source (a path or URL), the byte range in it, and a
digest of the text. DuckDB, Polars and Spark read it as it is. The price of a second file per shard is one more
request when a document is traced; training never reads it.
"""

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import Buffer

from datastore.errors import ConfigError, CorruptError

__all__ = ["DOCUMENTS_SCHEMA", "decode_documents", "encode_documents"]

_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "source": pa.string(),
    "offset": pa.int64(),
    "length": pa.int64(),
    "tokens": pa.int64(),
    "digest": pa.binary(16),
}

DOCUMENTS_SCHEMA = pa.schema(pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items())
"""`id` and `source` of the document; it is bytes `[offset, offset + length)` of its source; `tokens` counts its row in
the shard, the end-of-text id included; `digest` is the xxh3_128 of its text as UTF-8."""

_ROW_GROUP_ROWS = 65_536


def encode_documents(table: pa.Table) -> bytes:
    """Return `table` as Parquet; the same rows give the same bytes (for one version of pyarrow).

    Raises:
        ConfigError: its columns are not those of `DOCUMENTS_SCHEMA`, or a value is null.
    """
    try:
        exact = table.select(DOCUMENTS_SCHEMA.names).cast(DOCUMENTS_SCHEMA)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise _wrong_columns(str(error)) from None
    if len(table.column_names) != len(DOCUMENTS_SCHEMA):
        raise _wrong_columns("unexpected columns")
    sink = io.BytesIO()
    # One chunk per column: where a page ends would otherwise depend on how the caller cut the table.
    pq.write_table(
        exact.combine_chunks(),
        sink,
        compression="zstd",
        row_group_size=_ROW_GROUP_ROWS,
        store_schema=False,
        version="2.6",
        data_page_version="1.0",
    )
    return sink.getvalue()


def decode_documents(raw: Buffer, *, columns: Sequence[str] = DOCUMENTS_SCHEMA.names) -> pa.Table:
    """Return the documents of a shard, with all or only some of the columns of `DOCUMENTS_SCHEMA`.

    Raises:
        CorruptError: not Parquet, or other columns than `DOCUMENTS_SCHEMA`.
    """
    try:
        table = pq.ParquetFile(pa.BufferReader(pa.py_buffer(raw))).read(columns=list(columns), use_threads=False)
        table = table.cast(pa.schema([DOCUMENTS_SCHEMA.field(name) for name in columns]))
        table.validate(full=True)  # Parquet may hold texts that are no UTF-8.
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise CorruptError(
            f"not a documents file: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="Restore this file from a copy, or ingest it again.",
        ) from None
    return table


def _wrong_columns(reason: str) -> ConfigError:
    return ConfigError(
        f"not a documents table: {reason}", hint=f"It has the columns {', '.join(DOCUMENTS_SCHEMA.names)}, none null."
    )
