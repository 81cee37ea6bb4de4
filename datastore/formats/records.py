"""A record shard: rows of any schema in batches that are worth a request, as an Arrow IPC or a Parquet file.

Each batch (a record batch, or a row group) is one byte range of the file, at least 2 MiB unless it is the last; what
is before, between and after the batches is the file's *frame*. Frame and batch are all that a reader of one batch
needs. Arrow costs nothing to decode; Parquet takes less space, and CPU time to decode.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import Buffer

from datastore.errors import ConfigError, CorruptError
from datastore.formats.fitting import without_hidden_indices
from datastore.formats.joining import fit_together, join_chunks
from datastore.formats.schema import check_names, no_rows

__all__ = [
    "BATCH_BYTES",
    "BatchSpan",
    "EncodedRecords",
    "RecordFormat",
    "check_format",
    "decode_batch",
    "decode_message",
    "decode_records",
    "decoded_bytes",
    "encode_parts",
    "encode_records",
    "read_frame",
]

BATCH_BYTES = 2 * 2**20
"""What a batch holds at least, unless it is the last of its shard; the row that reaches it ends the batch."""

_MOST_COMPRESSED = 4.0
"""A row group has at most this many times `BATCH_BYTES` before it is compressed: what a reader needs in memory."""

_SHORT_BYTES = 64
"""Row groups state the least and the largest value of a column of texts only if these are shorter on the average."""

_MAGIC_BYTES = 8
"""Before the first message of an Arrow file."""

RecordFormat = Literal["arrow", "parquet"]


class BatchSpan(NamedTuple):
    """Bytes `[start, stop)` of the file hold `rows` rows."""

    start: int
    stop: int
    rows: int


@dataclass(frozen=True, slots=True)
class EncodedRecords:
    """A record shard as it is stored, and where its batches lie."""

    data: memoryview
    batches: tuple[BatchSpan, ...]


def encode_records(
    table: pa.Table,
    *,
    format: RecordFormat = "arrow",  # noqa: A002
    batch_bytes: int = BATCH_BYTES,
) -> EncodedRecords:
    """Return the shard that holds the rows of `table`.

    Raises:
        ConfigError: a dictionary has more values than its indices can number; `joining.cut_to_fit` makes several tables of it.
    """
    whole = without_hidden_indices(join_chunks(table))
    return _encode_parquet([whole], batch_bytes) if format == "parquet" else _encode_arrow(whole, batch_bytes)


def encode_parts(parts: Iterable[pa.Table], *, batch_bytes: int = BATCH_BYTES) -> EncodedRecords:
    """Return the Parquet shard that holds the rows of all `parts`, of which there is one at least.

    In memory there are the shard and a row group beside one of the parts, however large the rows are without compression.
    """
    return _encode_parquet(map(without_hidden_indices, parts), batch_bytes)


def check_format(schema: pa.Schema, *, format: RecordFormat) -> None:  # noqa: A002
    """Refuse columns that a file of that format does not give back as they were.

    Raises:
        ConfigError: there is one; the message names it.
    """
    if format == "arrow":
        return
    for field in schema:
        try:
            _check_parquet_type(field.type)
            rows = pa.table([pa.nulls(1, field.type)], schema=pa.schema([field.with_nullable(True)]))
            decode_records(encode_records(rows, format=format).data, format=format).cast(rows.schema)
        except (pa.ArrowException, OSError, CorruptError, ValueError) as error:
            raise ConfigError(
                f"a column cannot be stored as Parquet: {str(error).splitlines()[0]}",
                column=field.name,
                type=str(field.type),
                hint="Store the records as Arrow, or the column as another type.",
            ) from None


def _check_parquet_type(kind: Any) -> None:
    """Raise ValueError for a type that pyarrow 26 writes without complaint, and cannot read."""
    if pa.types.is_fixed_size_list(kind) and not kind.list_size:
        raise ValueError("lists of no items")
    for index in range(kind.num_fields):
        inner = kind.field(index).type
        if pa.types.is_dictionary(inner):
            raise ValueError("a dictionary inside of another type")
        _check_parquet_type(inner)


def decode_records(raw: Buffer, *, format: RecordFormat = "arrow") -> pa.Table:  # noqa: A002
    """Return the rows of a record shard; of an Arrow file without a copy of `raw`.

    Raises:
        CorruptError: not a file of that format, or its buffers do not fit its schema.
    """
    try:
        source = pa.BufferReader(pa.py_buffer(raw))
        is_parquet = format == "parquet"
        table = _all_row_groups(pq.ParquetFile(source)) if is_parquet else pa.ipc.open_file(source).read_all()
        table.validate(full=True)
        check_names(table.schema)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _not_a_shard(error) from None
    return table


def decoded_bytes(sizes: Sequence[int]) -> int:
    """Return about how many bytes the rows of a Parquet shard take in memory, from the sizes of its row groups.

    A row group much smaller than a batch was as large as it may be before it was compressed; the last one says less.
    """
    most = int(BATCH_BYTES * _MOST_COMPRESSED)
    full = sum(most if size < BATCH_BYTES // 2 else size for size in sizes[:-1])
    return full + sum(min(most, int(size * _MOST_COMPRESSED)) for size in sizes[-1:])


def read_frame(raw: Buffer, *, format: RecordFormat) -> pa.Schema:  # noqa: A002
    """Return the schema of a shard of which `raw` has the frame at least.

    Raises:
        CorruptError: it is not the frame of a file of that format.
    """
    try:
        source = pa.BufferReader(pa.py_buffer(raw))
        schema = pq.ParquetFile(source).schema_arrow if format == "parquet" else pa.ipc.open_file(source).schema
        check_names(schema)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _not_a_shard(error) from None
    return schema


def decode_batch(
    raw: Buffer,
    index: int,
    *,
    format: RecordFormat,  # noqa: A002 - what it is called everywhere
    columns: Sequence[str] | None = None,
) -> pa.RecordBatch:
    """Return batch `index` of a shard of which `raw` has the frame and this batch at least, each at its place.

    Raises:
        CorruptError: as `decode_records`; or there is no such batch.
    """
    try:
        source = pa.BufferReader(pa.py_buffer(raw))
        if format == "parquet":
            batch = _row_group(pq.ParquetFile(source), index, columns)
        else:
            batch = pa.ipc.open_file(source).get_batch(index)
        if columns is not None:
            batch = batch.select(list(columns))
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, IndexError, MemoryError) as error:
        raise _not_a_shard(error) from None
    return batch


def decode_message(raw: Buffer, schema: pa.Schema, *, columns: Sequence[str]) -> pa.RecordBatch:
    """Return `columns` of a batch of an Arrow shard from its bytes alone: nothing in `schema` is a dictionary. Nothing is copied.

    Raises:
        CorruptError: as `decode_batch`.
    """
    try:
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(raw)), schema).select(list(columns))
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        raise _not_a_shard(error) from None
    return batch


def _encode_arrow(table: pa.Table, batch_bytes: int) -> EncodedRecords:
    sink = pa.BufferOutputStream()
    rows = []
    with pa.ipc.new_file(sink, table.schema) as writer:
        start = 0
        while start < table.num_rows:
            part = table.slice(start, _rows_for(table, start, batch_bytes))
            # More than one where a column has more than fits one array.
            for batch in join_chunks(part).to_batches():
                writer.write_batch(batch)
                rows.append(batch.num_rows)
            start += part.num_rows
    data = sink.getvalue()
    spans = _record_batches(data)
    return EncodedRecords(
        memoryview(data), tuple(BatchSpan(*span, count) for span, count in zip(spans, rows, strict=True))
    )


def _record_batches(data: pa.Buffer) -> Iterator[tuple[int, int]]:
    """Yield where the messages lie that are record batches; what they need comes before all of them."""
    reader = pa.BufferReader(data)
    reader.seek(_MAGIC_BYTES)
    while True:
        start = reader.tell()
        try:
            message = pa.ipc.read_message(reader)
        except EOFError:
            return
        if message.type == "record batch":
            yield start, reader.tell()


def _encode_parquet(parts: Iterable[pa.Table], batch_bytes: int) -> EncodedRecords:
    coming = iter(parts)
    table = next(coming)
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        version="2.6",
        data_page_version="1.0",
        # Our readers check digests; others can check these.
        write_page_checksum=True,
        write_statistics=_short_columns(table),
        # The names that the schema has, not those that the standard recommends: rows come back as they were.
        use_compliant_nested_type=False,
    ) as writer:
        ratio = 1.0

        def write(rows: pa.Table) -> None:
            nonlocal ratio
            before = sink.tell()
            for group in join_chunks(rows).to_batches():
                writer.write_batch(group, row_group_size=group.num_rows)
            ratio = min(max(rows.nbytes / max(1, sink.tell() - before), 1.0), _MOST_COMPRESSED)

        start = 0
        while True:
            count = _rows_for(table, start, int(batch_bytes * ratio)) if start < table.num_rows else 0
            if start + count < table.num_rows:
                write(table.slice(start, count))
                start += count
                continue
            rest, more = table.slice(start), next(coming, None)
            if more is None:
                break
            start, table = 0, pa.concat_tables([rest, more])
            if not fit_together(table):
                write(rest)
                table = more
        if rest.num_rows:
            write(rest)
    data = sink.getbuffer()
    return EncodedRecords(data, tuple(_row_groups(pq.read_metadata(pa.BufferReader(pa.py_buffer(data))))))


def _short_columns(table: pa.Table) -> list[str]:
    """Return the columns whose extremes say something to a reader, and are small beside a row group.

    Not those of floating-point numbers: extremes leave NaN out, and readers that trust them lose rows. pyarrow 26 does so
    for `!=`, for counts and for `isin`, DuckDB 2.0 for `isnan`.
    """
    return [
        name
        for name, column in zip(table.column_names, table.columns, strict=True)
        if not column.type.num_fields
        and not pa.types.is_floating(column.type)
        and column.nbytes <= _SHORT_BYTES * max(1, table.num_rows)
    ]


def _row_groups(metadata: pq.FileMetaData) -> Iterator[BatchSpan]:
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        chunks = [group.column(column) for column in range(group.num_columns)]
        starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
        stops = [start + chunk.total_compressed_size for start, chunk in zip(starts, chunks, strict=True)]
        yield BatchSpan(min(starts), max(stops), group.num_rows)


def _all_row_groups(file: pq.ParquetFile) -> pa.Table:
    try:
        return file.read(use_threads=False)
    except pa.ArrowNotImplementedError:  # Lists or structs of more bytes than one array can have (pyarrow 26.0.1).
        return pa.concat_tables([file.read_row_group(index, use_threads=False) for index in range(file.num_row_groups)])


def _row_group(file: pq.ParquetFile, index: int, columns: Sequence[str] | None) -> pa.RecordBatch:
    if not 0 <= index < file.num_row_groups:
        raise IndexError(f"no row group {index}")
    # Names are prefixes of dotted paths here: further columns may come along, and are dropped by the caller.
    table = file.read_row_group(index, columns=None if columns is None else list(columns), use_threads=False)
    batches = table.combine_chunks().to_batches()
    if len(batches) > 1:
        raise ValueError("a row group is larger than an array")
    return batches[0] if batches else no_rows(table.schema)


def _rows_for(table: pa.Table, start: int, size_bytes: int) -> int:
    """Return how many rows from `start` on reach `size_bytes`, or how many there are."""
    # What an empty slice has belongs to all rows: a dictionary.
    shared = table.slice(start, 0).nbytes
    low, high = 1, table.num_rows - start
    # Gallop, then bisect: each look is a few sums, however many rows there are.
    step = 1
    while step < high and table.slice(start, step).nbytes - shared < size_bytes:
        low, step = step, 2 * step
    high = min(high, step)
    while low < high:
        middle = (low + high) // 2
        if table.slice(start, middle).nbytes - shared < size_bytes:
            low = middle + 1
        else:
            high = middle
    return low


def _not_a_shard(error: BaseException) -> CorruptError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CorruptError(f"not a record shard: {reason}", hint="Restore this file from a copy, or write it again.")
