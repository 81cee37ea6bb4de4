"""The documents of one part of a source, in order, and what was wrong with the others.

A part is a range of a file. It is read in chunks, so memory does not grow with the file; that the file still is the
one that was planned is checked at its end, before anything of it is marked done.

From the bytes of a record to its text, or to the reason why it has none, is a pure function, and strict on purpose:
bytes that are no UTF-8 are never replaced, a missing text is never an empty one. What a model learns from is exactly what
the file says, and the rest is counted by reason and kept aside.

Of sources that are tables, in the formats of other libraries, it gives the rows, or the texts in one of their columns.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from datastore.dataset.journal import SourceFile
from datastore.errors import ConfigError, ConflictError, MissingError, StorageError
from datastore.formats.decompression import SourceStream, open_stream
from datastore.ingestion.reading.cutting import cut_records, separator_of
from datastore.ingestion.reading.listing import SkipReason
from datastore.ingestion.reading.rejects import Reason, Reject, decode_rejects, encode_rejects, reject
from datastore.ingestion.reading.rows import is_table, read_rows
from datastore.ingestion.reading.streams import RecordPiece, lookback, read_chunks
from datastore.ingestion.reading.texts import Template, parse_template
from datastore.ingestion.reading.warc import Page, read_pages
from datastore.ingestion.settings import IngestSettings
from datastore.interop.base import Span
from datastore.interop.cells import is_binary, is_text
from datastore.storage.base import Storage

__all__ = [
    "Reason",
    "Reject",
    "TextRecord",
    "check_unchanged",
    "decode_rejects",
    "encode_rejects",
    "line_parser",
    "read_part",
    "read_texts",
    "reject",
    "text_parser",
]

_PROBE_BYTES = 8192
"""Where a NUL makes a file of a folder binary; git looks about as far."""


class TextRecord(NamedTuple):
    """One document: bytes `[offset, offset + length)` of its source hold it."""

    id: str
    source: str
    offset: int
    length: int
    text: str
    named: bool
    """Whether the id stands in the data, so that another document may have it, too."""


def read_part(
    storage: Storage,
    key: str,
    *,
    file: SourceFile,
    span: tuple[int, int],
    settings: IngestSettings,
    parser: "Parser | None" = None,
) -> Iterator[TextRecord | Reject | SkipReason]:
    """Yield what the records of `file` that begin in the byte range `span` are, in order.

    A file of a folder that proves to be binary yields the one word `binary`. Offsets into a compressed file count its
    decompressed bytes.

    Raises:
        ConflictError: the file is no longer what was planned.
        StorageError: it cannot be read.
    """
    separator = separator_of(file, settings)
    start, _ = span
    if is_table(file):
        yield from read_texts(storage, key, file=file, span=span, settings=settings)
        check_unchanged(storage, key, file=file)
        return
    try:
        if separator and _may_be_binary(file) and _is_binary(storage, key, file):
            yield "binary"
            return
        stored = read_chunks(storage, key, start=lookback(start, separator), size_bytes=file.size_bytes)
        stream = open_stream(stored, codec=file.codec, max_expansion=settings.max_expansion)
        if file.format == "warc":
            for found in read_pages(stream, file=file, settings=settings):
                yield _record_of_page(found, file, settings) if isinstance(found, Page) else found
            check_unchanged(storage, key, file=file)
            return
        pieces = cut_records(stream, file=file, span=span, settings=settings)
        yield from _records_of(pieces, stream, parser or _parser(file, settings), file=file, settings=settings)
    except (MissingError, StorageError) as error:
        if isinstance(error, StorageError) and error.fact != "the object ends too early":
            raise
        raise _changed(file) from None
    check_unchanged(storage, key, file=file)


def check_unchanged(storage: Storage, key: str, *, file: SourceFile) -> None:
    """Raise unless `file` still is what was planned.

    Raises:
        ConflictError: it is not.
    """
    try:
        found = storage.stat(key)
    except MissingError:
        raise _changed(file) from None
    if (found.size_bytes, found.modified) != (file.size_bytes, file.modified):
        raise _changed(file)


def _records_of(
    pieces: Iterator[RecordPiece], stream: SourceStream, parse: "Parser", *, file: SourceFile, settings: IngestSettings
) -> Iterator[TextRecord | Reject | SkipReason]:
    separator = separator_of(file, settings)
    end = 0
    for piece in pieces:
        if not separator and _may_be_binary(file) and b"\0" in piece.data[:_PROBE_BYTES]:
            yield "binary"
            return
        if stream.fault is not None and not piece.ended:
            yield reject(file.path, piece.offset, stream.fault, piece.data)
            return
        end = piece.offset + piece.length + len(separator)
        found = parse(piece)
        if found is not None:
            yield found
    if stream.fault is not None:
        yield reject(file.path, end, stream.fault, b"")


Parser = Callable[[RecordPiece], TextRecord | Reject | None]


def _parser(file: SourceFile, settings: IngestSettings) -> Parser:
    if file.format in {"jsonl", "json"}:
        template = parse_template(settings.template) if settings.template else None
        return line_parser(file.path, text_key=settings.text_key, id_key=settings.id_key, template=template)
    if file.format == "lines":
        parse = text_parser(file.path, whole=False)
        return lambda piece: parse(_without_return(piece))
    return text_parser(file.path, whole=not settings.separator)


def _without_return(piece: RecordPiece) -> RecordPiece:
    """Return a line without the carriage return that some systems end it with."""
    if piece.length > len(piece.data) or not piece.data.endswith(b"\r"):
        return piece
    return piece._replace(data=piece.data[:-1], length=piece.length - 1)


def _may_be_binary(file: SourceFile) -> bool:
    return file.format == "text" and not file.lone and not file.codec


def _is_binary(storage: Storage, key: str, file: SourceFile) -> bool:
    return b"\0" in storage.get_ranges(key, [(0, min(_PROBE_BYTES, file.size_bytes))])[0]


def _changed(file: SourceFile) -> ConflictError:
    return ConflictError(
        "a source file changed while it was ingested",
        file=file.path,
        hint="Run the same command again when nothing writes to the source; what is done and unchanged is kept.",
    )


_BOM = b"\xef\xbb\xbf"


def text_parser(source: str, *, whole: bool) -> Parser:
    """Return the parser for a text file: the piece is the document, without a byte order mark.

    If it is the `whole` file, the document is called after it, otherwise after its byte offset, too.
    """

    def parse(piece: RecordPiece) -> TextRecord | Reject | None:
        offset, data, length = piece.offset, piece.data, piece.length
        if offset == 0 and data.startswith(_BOM):
            offset, data, length = 3, data[3:], length - 3
        if length > len(data):
            return reject(source, offset, "too_long", data)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return reject(source, offset, "invalid_utf8", data)
        if not whole and not text.strip():
            return None
        reason = _text_reason(text)
        if reason is not None:
            return reject(source, offset, reason, data)
        return TextRecord(source if whole else f"{source}#{offset}", source, offset, length, text, named=False)

    return parse


def line_parser(source: str, *, text_key: str, id_key: str, template: Template | None = None) -> Parser:
    """Return the parser for JSON lines: an object with the text under one key, or several, and perhaps an id under another.

    A blank line is no record.
    """
    load = _loader(text_key, template)

    def parse(piece: RecordPiece) -> TextRecord | Reject | None:
        offset, data = piece.offset, piece.data
        if offset == 0 and data.startswith(_BOM):
            data = data[3:]
        if piece.length > len(piece.data):
            return reject(source, offset, "too_long", data)
        try:
            row = load(data)
        except orjson.JSONDecodeError:
            return reject(source, offset, _why_not_json(data), data) if data.strip() else None
        text = row.get(text_key) if isinstance(row, dict) else None
        if type(text) is not str or not text or "\0" in text:
            return reject(source, offset, _why_no_text(row, text_key), data)
        name = row.get(id_key)
        if name is None:
            return TextRecord(f"{source}#{offset}", source, offset, piece.length, text, named=False)
        if type(name) not in {str, int} or name == "":
            return reject(source, offset, "id_not_text", data)
        return TextRecord(str(name), source, offset, piece.length, text, named=True)

    return parse


def _loader(text_key: str, template: Template | None) -> Callable[[bytes], Any]:
    return orjson.loads if template is None else partial(_load_filled, template=template, text_key=text_key)


def _load_filled(data: bytes, *, template: Template, text_key: str) -> Any:
    """Return the row `data` with the text of its fields under `text_key`, or what the first bad one of them holds."""
    row = orjson.loads(data)
    if not isinstance(row, dict):
        return row
    text = template.fill(row)
    if text is not None:
        return {**row, text_key: text}
    bad = next(name for name in template.fields if not isinstance(row.get(name), str))
    rest = {name: value for name, value in row.items() if name != text_key}
    return {**rest, text_key: row[bad]} if bad in row else rest


def _text_reason(text: str) -> Reason | None:
    if not text:
        return "empty_text"
    return "nul" if "\0" in text else None


def _why_no_text(row: Any, text_key: str) -> Reason:
    if not isinstance(row, dict):
        return "invalid_json"
    if text_key not in row:
        return "missing_text"
    text = row[text_key]
    if text is None:
        return "null_text"
    return (_text_reason(text) or "text_not_string") if isinstance(text, str) else "text_not_string"


def _why_not_json(data: bytes) -> Reason:
    """Return why orjson refused `data`: it is right, but does not say whether bytes, syntax or surrogates are wrong."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "invalid_utf8"
    try:
        row = json.loads(text)
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "lone_surrogate"
    except (ValueError, RecursionError):
        return "invalid_json"
    return "invalid_json"  # NaN and the like: json takes what the standard forbids.


def read_texts(
    storage: Storage, key: str, *, file: SourceFile, span: Span, settings: IngestSettings
) -> Iterator[TextRecord | Reject]:
    """Yield what the texts of those rows are; the offset of a document is the number of its row in the file.

    Raises:
        ConfigError: there is no column of texts.
        CorruptError: the file is damaged.
    """
    for first, table in read_rows(storage, key, file=file, span=span, settings=settings):
        texts = _texts(table, settings, file)
        names = table.column(settings.id_key).to_pylist() if settings.id_key in table.column_names else None
        for row, value in enumerate(texts):
            name = names[row] if names is not None else None
            yield _record_of_row(value, name, file.path, row=first + row, limit_bytes=settings.max_document_bytes)


def _texts(table: pa.Table, settings: IngestSettings, file: SourceFile) -> list[Any]:
    if not settings.template:
        return _column(table, settings.text_key, file)
    template = parse_template(settings.template)
    return template.fill_all({name: _column(table, name, file) for name in template.fields})


def _column(table: pa.Table, name: str, file: SourceFile) -> list[Any]:
    kind = table.schema.field(name).type if name in table.column_names else None
    if kind is None or not (is_text(kind) or is_binary(kind)):
        raise ConfigError(
            "the rows have no such column of text",
            file=file.path,
            text_key=name,
            columns=table.column_names,
            hint="Name the column of texts: `text_key=COLUMN`.",
        )
    return table.column(name).to_pylist()


def _record_of_page(page: Page, file: SourceFile, settings: IngestSettings) -> TextRecord | Reject:
    limit = settings.max_document_bytes
    found = _record_of_row(page.text, page.name, file.path, row=page.offset, limit_bytes=limit)
    return found._replace(length=page.length) if isinstance(found, TextRecord) else found


def _record_of_row(value: Any, name: Any, source: str, *, row: int, limit_bytes: int) -> TextRecord | Reject:
    if value is None:
        return reject(source, row, "null_text", b"")
    raw = value if isinstance(value, bytes) else value.encode()
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return reject(source, row, "invalid_utf8", raw)
    reason = _reason(text, raw, limit_bytes)
    if reason is not None:
        return reject(source, row, reason, raw)
    if name is None:
        return TextRecord(f"{source}#{row}", source, row, len(raw), text, named=False)
    if type(name) not in {str, int} or name == "":
        return reject(source, row, "id_not_text", raw)
    return TextRecord(str(name), source, row, len(raw), text, named=True)


def _reason(text: str, raw: bytes, limit_bytes: int) -> Reason | None:
    if len(raw) > limit_bytes:
        return "too_long"
    if not text:
        return "empty_text"
    return "nul" if "\0" in text else None
