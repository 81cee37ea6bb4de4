"""The rows of a file that is a table, or of JSON lines, with all their columns.

Rows are taken over as they are, and strictly: one that is damaged, or has a key or a type that the columns have not, ends
the ingest and is named. A key that a line lacks is null. JSON has no types of columns, so a new dataset gets those that the
first file shows at its beginning; whoever knows better makes the dataset first, with a schema of their own.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from datastore.dataset.journal import SourceFile
from datastore.errors import ConfigError, CorruptError
from datastore.formats.decompression import open_stream
from datastore.formats.plain import table_of_rows
from datastore.formats.schema import check_names
from datastore.ingestion.reading.cutting import cut_records, separator_of
from datastore.ingestion.reading.streams import RecordPiece, lookback, read_chunks
from datastore.ingestion.reading.warc import WARC_SCHEMA, warc_rows
from datastore.ingestion.settings import IngestSettings
from datastore.interop.base import Rows, Span
from datastore.interop.formats import FORMATS
from datastore.storage.base import Storage

__all__ = ["first_schema", "is_cuttable", "is_table", "is_token_column", "read_rows", "require_rows", "rows_schema"]

_HEAD_ROWS = 65_536
"""Lines of the first file that say which columns there are."""

_BATCH_BYTES = 4 * 2**20

_BOM = b"\xef\xbb\xbf"

_MEDIA = {"bytes", "path"}
"""How Hugging Face keeps an image or a sound."""

_LONG_NUMBER = re.compile(rb"\d{19}")


def is_table(file: SourceFile) -> bool:
    """Return whether `file` holds rows and columns."""
    return file.format in FORMATS


def is_cuttable(file: SourceFile) -> bool:
    """Return whether ranges of the table `file` can be read apart."""
    return is_table(file) and FORMATS[file.format].can_be_cut


def is_token_column(schema: pa.Schema, name: str) -> bool:
    """Return whether the column `name` is there and holds lists of whole numbers."""
    kind: Any = schema.field(name).type if name in schema.names else None
    is_list = kind is not None and (kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))
    return bool(is_list and kinds.is_integer(kind.value_type))


def require_rows(file: SourceFile) -> None:
    """Raise unless `file` holds rows.

    Raises:
        ConfigError: it is plain text.
    """
    if file.format in {"text", "lines"}:
        raise ConfigError(
            "a file of text has no rows",
            file=file.path,
            hint="Take its text: `take=text`; or leave it out: `include=*.jsonl`; or say the `format` of the files.",
        )


def rows_schema(storage: Storage, key: str, *, file: SourceFile, settings: IngestSettings) -> pa.Schema:
    """Return the columns of `file`: of JSON lines, those that its first 65,536 lines show; none of an empty file.

    Raises:
        ConfigError: it has none, or a column has values of several types.
        CorruptError: it is damaged.
    """
    if is_table(file):
        return FORMATS[file.format].schema(storage, key)
    if file.format == "warc":
        return WARC_SCHEMA
    found = islice(_json_rows(storage, key, file=file, span=(0, file.size_bytes), settings=settings), _HEAD_ROWS)
    rows = [row for _, row in found]
    if not rows:
        return pa.schema([])
    names = list(dict.fromkeys(name for row in rows for name in row))
    schema = pa.schema([(name, _type_of([row.get(name) for row in rows], name, file)) for name in names])
    if not names:
        raise ConfigError("the lines have no keys", file=file.path, hint="Name a file with a JSON object in each line.")
    check_names(schema)
    return schema


def first_schema(files: Iterable[SourceFile], read: Callable[[SourceFile], pa.Schema]) -> tuple[SourceFile, pa.Schema]:
    """Return the first of `files` that says which columns it has, and those; empty parts do not.

    Raises:
        ConfigError: none does.
    """
    for file in files:
        schema = read(file)
        if schema.names:
            return file, schema
    raise ConfigError("the source is empty: no file of it has a column", hint="Name files with rows.")


def read_rows(
    storage: Storage,
    key: str,
    *,
    file: SourceFile,
    span: Span,
    settings: IngestSettings,
    schema: pa.Schema | None = None,
) -> Iterator[Rows]:
    """Yield the rows that begin in the byte range `span` of `file`, in order; those of JSON lines have the columns `schema`.

    Raises:
        CorruptError: the file is damaged.
        ConfigError: it holds what cannot, or must not, be read; or a line that does not fit the columns.
    """
    if is_table(file):
        for first, table in FORMATS[file.format].read(storage, key, span):
            _require_bytes(table, file)
            yield first, table
        return
    if file.format == "warc":
        yield from _warc_rows(storage, key, file=file, settings=settings)
        return
    wanted = schema if schema is not None else _token_columns(rows_schema(storage, key, file=file, settings=settings))
    first, size = 0, 0
    batch: list[tuple[RecordPiece, dict[str, Any]]] = []
    for piece, row in _json_rows(storage, key, file=file, span=span, settings=settings):
        batch.append((piece, row))
        size += piece.length
        if size >= _BATCH_BYTES:
            yield first, _table(batch, wanted, file, whole=schema is not None)
            first, size, batch = first + len(batch), 0, []
    if batch:
        yield first, _table(batch, wanted, file, whole=schema is not None)


def _require_bytes(table: pa.Table, file: SourceFile) -> None:
    """Raise unless images and sounds are in `table`, which may name files that lie elsewhere instead.

    Raises:
        ConfigError: one is not.
    """
    for field in table.schema:
        if (
            not kinds.is_struct(field.type)
            or {field.type.field(at).name for at in range(field.type.num_fields)} != _MEDIA
        ):
            continue
        column = table.column(field.name)
        only_named = pc.and_(pc.is_valid(pc.struct_field(column, "path")), pc.is_null(pc.struct_field(column, "bytes")))
        if pc.any(only_named).as_py():
            path = pc.struct_field(column, "path").filter(only_named)[0].as_py()
            raise ConfigError(
                "an image or a sound is not in the file, only its path",
                file=file.path,
                column=field.name,
                path=path,
                hint="Ingest the `datasets` object itself, which puts the bytes in; or write the file anew without the column.",
            )


def _warc_rows(storage: Storage, key: str, *, file: SourceFile, settings: IngestSettings) -> Iterator[Rows]:
    stored = read_chunks(storage, key, start=0, size_bytes=file.size_bytes)
    stream = open_stream(stored, codec=file.codec, max_expansion=settings.max_expansion)
    first, size = 0, 0
    batch: list[dict[str, Any]] = []
    for length, row in warc_rows(stream, file=file, settings=settings):
        batch.append(row)
        size += length
        if size >= _BATCH_BYTES:
            yield first, pa.Table.from_pylist(batch, WARC_SCHEMA)
            first, size, batch = first + len(batch), 0, []
    if batch:
        yield first, pa.Table.from_pylist(batch, WARC_SCHEMA)


def _token_columns(schema: pa.Schema) -> pa.Schema:
    """Return the columns of which something is taken over where tokens are: lists of numbers, and what names a document."""
    named = {"id", "source", "offset", "length"}
    return pa.schema([field for field in schema if field.name in named or kinds.is_list(field.type)])


def _json_rows(
    storage: Storage, key: str, *, file: SourceFile, span: Span, settings: IngestSettings
) -> Iterator[tuple[RecordPiece, dict[str, Any]]]:
    stored = read_chunks(
        storage, key, start=lookback(span[0], separator_of(file, settings)), size_bytes=file.size_bytes
    )
    stream = open_stream(stored, codec=file.codec, max_expansion=settings.max_expansion)
    pieces = cut_records(stream, file=file, span=span, settings=settings)
    for piece in pieces:
        if stream.fault is not None and not piece.ended:
            break
        data = piece.data.removeprefix(_BOM) if piece.offset == 0 else piece.data
        if data.strip():
            yield piece, _object(piece, data, file)
    if stream.fault is not None:
        raise CorruptError(f"the file is damaged: {stream.fault}", where=file.path, hint="Restore it from a copy.")


def _object(piece: RecordPiece, data: bytes, file: SourceFile) -> dict[str, Any]:
    where = {"file": file.path, "offset": piece.offset}
    if piece.length > len(piece.data):
        raise ConfigError("a line is too long", **where, bytes=piece.length, hint="Raise `max_document_bytes`.")
    try:
        row = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise CorruptError(f"a line is not JSON: {error}", **where, hint="Correct the line, or leave it out.") from None
    if _LONG_NUMBER.search(data):
        row = json.loads(data)  # orjson makes a whole number beyond 64 bits another one, a float.
    if not isinstance(row, dict):
        raise ConfigError("a line is no JSON object", **where, hint="Correct the line, or leave it out.")
    return row


def _type_of(values: list[Any], name: str, file: SourceFile) -> pa.DataType:
    """Return the type of a column; text where nothing says which."""
    try:
        return _settled(pa.array(values).type)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ConfigError(
            f"a column has values of several types: {error}",
            file=file.path,
            column=name,
            hint="Write values of one type; or make the dataset first, with a schema, and ingest into that.",
        ) from None


def _settled(kind: pa.DataType) -> pa.DataType:
    """Return `kind` with text in the place of nothing but nulls."""
    if kinds.is_null(kind):
        return pa.string()
    if kinds.is_list(kind):
        return pa.list_(_settled(kind.value_type))
    if kinds.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct([(field.name, _settled(field.type)) for field in fields])
    return kind


def _table(
    batch: list[tuple[RecordPiece, dict[str, Any]]], schema: pa.Schema, file: SourceFile, *, whole: bool
) -> pa.Table:
    """Return `batch` in the columns `schema`; where it is the `whole` row, no other key may be there."""
    names = set(schema.names)
    for piece, row in batch if whole else ():
        unknown = sorted(set(row) - names)
        if unknown:
            raise _does_not_fit(f"no column is called {unknown[0]!r}", piece, file)
    kind = pa.struct(list(schema))
    rows = [_filled(row if whole else {name: row.get(name) for name in names}, kind) for _, row in batch]
    try:
        return table_of_rows(rows, schema)
    except ConfigError as error:
        for (piece, _), row in zip(batch, rows, strict=True):  # Which one it is, Arrow does not always say.
            try:
                table_of_rows([row], schema)
            except ConfigError as reason:
                raise _does_not_fit(_told(reason), piece, file) from None
        raise _does_not_fit(_told(error), batch[0][0], file) from None


def _filled(value: Any, kind: Any) -> Any:
    """Return `value` with null for each key that an object in it lacks."""
    if isinstance(value, dict) and kinds.is_struct(kind):
        fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        filled = {name: _filled(value.get(name), inner) for name, inner in fields.items()}
        return filled | {name: inner for name, inner in value.items() if name not in fields}
    if isinstance(value, list) and hasattr(kind, "value_type") and kinds.is_nested(kind.value_type):
        return [_filled(each, kind.value_type) for each in value]
    return value


def _told(error: ConfigError) -> str:
    """Return what an error says of a value, in one clause."""
    shown = ", ".join(f"{name} {error.values[name]!r}" for name in ("column", "value") if name in error.values)
    return f"{error.fact.removeprefix('rows do not fit the schema: ')}{f' ({shown})' if shown else ''}"


def _does_not_fit(reason: str, piece: RecordPiece, file: SourceFile) -> ConfigError:
    return ConfigError(
        f"a line does not fit the columns: {reason}",
        file=file.path,
        offset=piece.offset,
        hint="Correct the line; or make the dataset first, with a schema that fits, and ingest into that.",
    )
