"""A record shard: an Arrow IPC file of any schema, in record batches of 2 MiB or a little more.

A batch is what a reader asks for at a time. The price of plain Arrow over Parquet is size (text is not compressed);
what it buys is that a shard on disk is mapped, and that one batch of a remote shard is one byte range.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
from typing_extensions import Buffer

from datastore.errors import ConfigError, CorruptError

__all__ = ["BATCH_BYTES", "check_schema", "decode_records", "decode_schema", "encode_records", "encode_schema"]

BATCH_BYTES = 2 * 2**20
"""What a record batch holds at least, unless it is the last of its shard; the row that reaches it ends the batch."""


def encode_records(table: pa.Table) -> bytes:
    """Return the shard that holds the rows of `table`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        for part in _cut(table.combine_chunks()):
            for batch in part.to_batches():
                writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def decode_records(raw: Buffer) -> pa.Table:
    """Return the rows of a record shard, without a copy of `raw`.

    Raises:
        CorruptError: not an Arrow file, or its buffers do not fit its schema.
    """
    try:
        table = pa.ipc.open_file(pa.py_buffer(raw)).read_all()
        table.validate(full=True)
        _check_names(table.schema)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise CorruptError(
            f"not a record shard: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="Restore this file from a copy, or write it again.",
        ) from None
    return table


def encode_schema(schema: pa.Schema) -> bytes:
    """Return `schema` as an encapsulated Arrow IPC message."""
    return schema.serialize().to_pybytes()


def decode_schema(raw: Buffer) -> pa.Schema:
    """Return the schema that `encode_schema` wrote.

    Raises:
        CorruptError: not an Arrow schema message.
    """
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(raw))
        _check_names(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptError(f"not an Arrow schema: {error}", hint="Restore this file from a copy.") from None
    return schema


def _check_names(fields: Iterable["pa.Field[Any]"]) -> None:
    """Raise UnicodeDecodeError for a name that is not UTF-8, at any depth; pyarrow decodes names when they are used."""
    for field in fields:
        _ = field.name
        _check_names(field.type.field(index) for index in range(field.type.num_fields))


def _cut(table: pa.Table) -> Iterator[pa.Table]:
    """Yield `table` in parts of about `BATCH_BYTES`; at least one, so that an empty shard keeps its schema."""
    if not table.num_rows:
        return
    # Rows vary in size: halve a part until it is small enough, so a few huge rows do not make all batches tiny.
    pending = [table]
    while pending:
        part = pending.pop()
        if part.num_rows == 1 or part.get_total_buffer_size() == 0 or part.nbytes < 2 * BATCH_BYTES:
            yield part
            continue
        middle = part.num_rows // 2
        pending += [part.slice(middle), part.slice(0, middle)]


def check_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `table` with exactly the columns of `schema`, in its order.

    Raises:
        ConfigError: a column is missing, unexpected, or of a type that cannot become the other without loss.
    """
    try:
        ordered = table.select(schema.names) if set(table.column_names) == set(schema.names) else table
        return ordered.cast(schema)
    except (pa.ArrowException, ValueError) as error:
        raise ConfigError(f"rows do not fit the schema: {error}", hint="Write rows of the dataset's schema.") from None
