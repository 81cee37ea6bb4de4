"""One Parquet file: its footer says where everything is, and a row group is the least that is read.

Of a row group only the byte ranges of the columns that are asked for are fetched, neighbours in one request, into an image of
the file in which the rest is empty: memory that nobody touches costs nothing. The footer is read once more by every process
that reads the file, and has to be the one that was indexed.

Source: https://parquet.apache.org/docs/file-format (the footer's length and the magic bytes end the file)
"""

import mmap
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from datastore.digest import digest_hex
from datastore.errors import ConfigError, CorruptError
from datastore.formats.schema import no_rows
from datastore.storage.base import Storage

__all__ = ["Footer", "not_readable", "read_footer", "read_group", "rows_of_nothing"]

_TAIL_BYTES = 64 * 2**10
"""Fetched from the end of a file at once: most footers are shorter."""

_MAGIC, _END_BYTES = b"PAR1", 8

_SLACK_BYTES = 100
"""Old writers did not count the header of a dictionary page (PARQUET-816), so pyarrow reads on for so many bytes."""

_GAP_BYTES = 64 * 2**10
"""Columns that lie this near to each other are fetched in one request."""


class Footer:
    """The footer of a file, and its digest."""

    def __init__(self, raw: bytes, *, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        """Size of the file."""
        self.digest = digest_hex(raw)
        # A file that is nothing but its footer: what the footer says of other places is not looked at.
        self.metadata = pq.read_metadata(pa.BufferReader(pa.py_buffer(_MAGIC + raw)))
        self.schema: pa.Schema = self.metadata.schema.to_arrow_schema()

    def groups(self) -> Iterator[tuple[int, int]]:
        """Yield the rows of each row group, and its bytes before compression."""
        for index in range(self.metadata.num_row_groups):
            group = self.metadata.row_group(index)
            yield group.num_rows, group.total_byte_size


def read_footer(storage: Storage, key: str, *, size_bytes: int) -> Footer:
    """Return the footer of the file `key`: one range read, or two if it is long.

    Raises:
        CorruptError: it is no Parquet file.
        ConfigError: it is an encrypted one.
        MissingError, StorageError: it cannot be read.
    """
    start = max(0, size_bytes - _TAIL_BYTES)
    tail = storage.get_ranges(key, [(start, size_bytes)])[0] if size_bytes else b""
    if tail[-4:] == b"PARE":
        raise ConfigError("the Parquet file is encrypted", where=key, hint="Write it without encryption.")
    length = int.from_bytes(tail[-_END_BYTES:-4], "little") + _END_BYTES
    if size_bytes < len(_MAGIC) + _END_BYTES or tail[-4:] != _MAGIC or length > size_bytes - len(_MAGIC):
        raise CorruptError(
            "not a Parquet file: it does not end as one", where=key, hint="Write it again, or remove it."
        )
    if length > len(tail):
        tail = storage.get_ranges(key, [(size_bytes - length, start)])[0] + tail
    try:
        return Footer(tail[-length:], size_bytes=size_bytes)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise not_readable(error, key) from None


def read_group(
    storage: Storage, key: str, index: int, *, footer: Footer, columns: Sequence[str] | None
) -> pa.RecordBatch:
    """Return a row group, `columns` of it.

    Raises:
        CorruptError: it is damaged, as far as that can be seen: by checksums of its pages, if its writer made any.
        ConfigError: a column of it has more than one array can hold.
        MissingError, StorageError: it cannot be read.
    """
    group = footer.metadata.row_group(index)
    leaves = [
        leaf
        for leaf in range(group.num_columns)
        if columns is None or _is_read(footer.metadata.schema.column(leaf).path, columns)
    ]
    if not leaves:
        return rows_of_nothing(group.num_rows)
    spans = list(_joined(_span(group.column(leaf), footer.size_bytes) for leaf in leaves))
    size_bytes = max(stop for _, stop in spans)
    image = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for (start, stop), piece in zip(spans, storage.get_ranges(key, spans), strict=True):
        image[start:stop] = piece
    try:
        file = pq.ParquetFile(
            pa.BufferReader(pa.py_buffer(image)), metadata=footer.metadata, page_checksum_verification=True
        )
        names = None if columns is None else list(columns)
        table = file.read_row_group(index, columns=names, use_threads=False)
        table = table if names is None else table.select(names)
        batches = table.combine_chunks().to_batches()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise not_readable(error, f"{key}, row group {index}") from None
    if len(batches) > 1:
        raise ConfigError(
            "a row group is larger than an Arrow array can be",
            where=f"{key}, row group {index}",
            rows=group.num_rows,
            hint="Write the file again with smaller row groups, or ingest it.",
        )
    return batches[0] if batches else no_rows(table.schema)


def rows_of_nothing(rows: int) -> pa.RecordBatch:
    """Return so many rows without a column."""
    return pa.record_batch([pa.nulls(rows)], names=["-"]).select([])


def not_readable(error: Exception, where: str) -> CorruptError:
    """Return the error for what pyarrow says of a file."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CorruptError(f"the file cannot be read: {reason}", where=where, hint="Write it again, or remove it.")


def _is_read(path: str, columns: Sequence[str]) -> bool:
    """Return whether pyarrow reads the leaf at `path`: names are prefixes of dotted paths there, so `a` brings along `a.b`."""
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _span(chunk: pq.ColumnChunkMetaData, size_bytes: int) -> tuple[int, int]:
    starts = [chunk.data_page_offset]
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        starts.append(chunk.dictionary_page_offset)
    return min(starts), min(min(starts) + chunk.total_compressed_size + _SLACK_BYTES, size_bytes)


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield `spans` in order, those that lie near to each other as one."""
    first, last = -1, -1
    for start, stop in sorted(spans):
        if first < 0:
            first, last = start, stop
        elif start <= last + _GAP_BYTES:
            last = max(last, stop)
        else:
            yield first, last
            first, last = start, stop
    yield first, last
