"""Sources that are tables, in the formats of other libraries: their rows, or the texts in one of their columns."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from datastore.errors import ConfigError
from datastore.ingest.records import Reason, Record, Reject, reject
from datastore.ingestion.reading.sources import SourceFile
from datastore.ingestion.settings import IngestSettings
from datastore.interop.base import Rows, Span
from datastore.interop.cells import is_binary, is_text
from datastore.interop.formats import FORMATS
from datastore.storage.base import Storage

__all__ = ["is_cuttable", "is_table", "read_rows", "read_texts"]


def is_table(file: SourceFile) -> bool:
    """Return whether `file` holds rows and columns."""
    return file.format in FORMATS


def is_cuttable(file: SourceFile) -> bool:
    """Return whether ranges of `file` can be read apart."""
    return is_table(file) and FORMATS[file.format].can_be_cut


def read_rows(storage: Storage, key: str, *, file: SourceFile, span: Span) -> Iterator[Rows]:
    """Yield the rows that begin in the byte range `span` of `file`, in order.

    Raises:
        CorruptError: the file is damaged.
        ConfigError: it holds what cannot, or must not, be read.
    """
    yield from FORMATS[file.format].read(storage, key, span)


def read_texts(
    storage: Storage, key: str, *, file: SourceFile, span: Span, settings: IngestSettings
) -> Iterator[Record | Reject]:
    """Yield what the texts of those rows are; the offset of a document is the number of its row in the file.

    Raises:
        ConfigError: there is no column of texts.
        CorruptError: the file is damaged.
    """
    for first, table in read_rows(storage, key, file=file, span=span):
        texts = _texts(table, settings.text_key, file)
        names = table.column(settings.id_key).to_pylist() if settings.id_key in table.column_names else None
        for row, value in enumerate(texts):
            name = names[row] if names is not None else None
            yield _parsed(value, name, file.path, row=first + row, limit_bytes=settings.max_document_bytes)


def _texts(table: pa.Table, name: str, file: SourceFile) -> list[Any]:
    kind = table.schema.field(name).type if name in table.column_names else None
    if kind is None or not (is_text(kind) or is_binary(kind)):
        raise ConfigError(
            "the rows have no such column of text",
            file=file.path,
            text_key=name,
            columns=table.column_names,
            hint="Set text_key to the column of texts.",
        )
    return table.column(name).to_pylist()


def _parsed(value: Any, name: Any, source: str, *, row: int, limit_bytes: int) -> Record | Reject:
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
        return Record(f"{source}#{row}", source, row, len(raw), text, named=False)
    if type(name) not in {str, int} or name == "":
        return reject(source, row, "id_not_text", raw)
    return Record(str(name), source, row, len(raw), text, named=True)


def _reason(text: str, raw: bytes, limit_bytes: int) -> Reason | None:
    if len(raw) > limit_bytes:
        return "too_long"
    if not text:
        return "empty_text"
    return "nul" if "\0" in text else None
