"""Tables of text: CSV, TSV, and those parted by semicolons or bars; also compressed.

The first line names the columns. All of them are text: what looks like a number in one part of a file may be none in
another. A quote that is never closed would make one value of the rest of the file, without a word from pyarrow (26.0.1); it
is an error here.
"""

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
from typing_extensions import override

from datastore.errors import ConfigError, CorruptError
from datastore.interop.base import Format, Rows, Span, damaged, whole_files
from datastore.interop.plainly import PlainFile
from datastore.storage.base import Storage
from datastore.units import format_bytes

__all__ = ["CSV", "TSV"]

_CSV_BLOCKS = (2**20, 2**24, 2**28, 2**30)
"""Bytes that pyarrow takes at once; a row must fit."""

_HEAD_BYTES = 2**16

_END = "end of rows (datastore)"
"""The first value of a row that is added: if it does not come out as a row, a quote was not closed before."""


class _WholeLineEnds(io.RawIOBase):
    """A file that is never read up to the middle of a CRLF.

    On the border of two of its blocks pyarrow takes the line feed of one in quotes for an end of line (26.0.1), and loses it.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._held = b""

    @override
    def readable(self) -> bool:
        return True

    @override
    def read(self, size: int = -1, /) -> bytes:
        data = self._held + self._file.read(size - len(self._held) if size >= 0 else -1)
        self._held = b""
        if len(data) > 1 and data.endswith(b"\r"):
            self._held, data = data[-1:], data[:-1]
        return data


class _WithEnd(io.RawIOBase):
    """The bytes of a file, and one row more: `_END` and empty values."""

    def __init__(self, file: IO[bytes], end: bytes) -> None:
        self._file = file
        self._end = end

    @override
    def readable(self) -> bool:
        return True

    @override
    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        if not data:
            data, self._end = self._end, b""
        return data


@contextmanager
def _reader(storage: Storage, key: str, *, delimiter: str, block_bytes: int, schema: pa.Schema | None) -> Iterator[Any]:
    end = f"\n{_END}{delimiter * (len(schema) - 1)}\n" if schema else ""
    whole: Any = _WithEnd(io.BufferedReader(PlainFile(storage, key)), end.encode())
    source: Any = pa.PythonFile(_WholeLineEnds(whole), mode="r")
    with pyarrow.csv.open_csv(
        source,
        read_options=pyarrow.csv.ReadOptions(block_size=block_bytes),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(column_types=schema, strings_can_be_null=False),
    ) as reader:
        yield reader


def _delimiter_of(storage: Storage, key: str) -> str:
    """Return what parts the names in the first line: a comma if there is one."""
    head = io.BufferedReader(PlainFile(storage, key)).read(_HEAD_BYTES)
    names = re.sub(rb'"[^"]*"', b"", head).partition(b"\n")[0]
    return next((each for each in ",\t;|" if each.encode() in names), ",")


def _tab(_storage: Storage, _key: str) -> str:
    return "\t"


_Delimiter = Callable[[Storage, str], str]


def _schema(storage: Storage, key: str, *, delimiter_of: _Delimiter) -> pa.Schema:
    if not storage.stat(key).size_bytes:  # An empty part, without even a header.
        return pa.schema([])
    delimiter = delimiter_of(storage, key)
    for block_bytes in _CSV_BLOCKS:
        try:
            with _reader(storage, key, delimiter=delimiter, block_bytes=block_bytes, schema=None) as reader:
                return pa.schema([(name, pa.string()) for name in reader.schema.names])
        except (pa.ArrowException, OSError, ValueError) as error:
            if not _is_too_long(error):
                raise damaged(error, key, "CSV") from None
    raise _too_long(key)


def _read(storage: Storage, key: str, _span: Span, *, delimiter_of: _Delimiter) -> Iterator[Rows]:
    """Yield the rows.

    A row longer than a block of pyarrow's makes it begin again with larger ones, past what was handed out already.
    """
    schema, done = _schema(storage, key, delimiter_of=delimiter_of), 0
    if not schema.names:
        return
    delimiter = delimiter_of(storage, key)
    for block_bytes in _CSV_BLOCKS:
        row = 0
        try:
            with _reader(storage, key, delimiter=delimiter, block_bytes=block_bytes, schema=schema) as reader:
                for batch in _without_end(reader, key):
                    part = batch.slice(max(0, done - row))
                    row += batch.num_rows
                    if part.num_rows:
                        yield done, pa.Table.from_batches([part])
                        done = row
        except (pa.ArrowException, OSError, ValueError) as error:
            if not _is_too_long(error):
                raise damaged(error, key, "CSV") from None
        else:
            return
    raise _too_long(key)


def _without_end(batches: Iterator[pa.RecordBatch], key: str) -> Iterator[pa.RecordBatch]:
    """Yield `batches` without the row that was added at their end."""
    held: pa.RecordBatch | None = None
    for batch in batches:
        if batch.num_rows:
            if held is not None:
                yield held
            held = batch
    last = held.num_rows - 1 if held is not None else 0
    if held is None or held.column(0)[last].as_py() != _END:
        raise CorruptError(
            "a quote is opened and never closed: all that follows would be one value",
            where=key,
            hint="Close it, or write it twice; `format=lines` takes the lines as they are.",
        )
    yield held.slice(0, last)


def _is_too_long(error: Exception) -> bool:
    """Return whether a row is longer than a block: pyarrow has no other sign of it than its text."""
    return "straddling" in str(error)


def _too_long(key: str) -> ConfigError:
    longest = format_bytes(_CSV_BLOCKS[-1])
    return ConfigError(f"a row is longer than {longest}", where=key, hint="Store it as Parquet or JSON lines.")


def _delimited(suffix: str, delimiter_of: _Delimiter) -> Format:
    return Format(
        files=whole_files(suffix, *(f"{suffix}.{codec}" for codec in ("gz", "zst", "bz2", "xz"))),
        schema=partial(_schema, delimiter_of=delimiter_of),
        read=partial(_read, delimiter_of=delimiter_of),
    )


CSV = _delimited(".csv", _delimiter_of)
TSV = _delimited(".tsv", _tab)
