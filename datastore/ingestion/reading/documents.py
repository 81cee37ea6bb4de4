"""The documents of one part of a source, in order, and what was wrong with the others.

A part is a range of a file. It is read in chunks, so memory does not grow with the file; that the file still is the
one that was planned is checked at its end, before anything of it is marked done.
"""

from collections.abc import Iterator

from datastore.errors import ConflictError, MissingError, StorageError
from datastore.ingest.records import Parser, Record, Reject, line_parser, reject, text_parser
from datastore.ingest.split import Piece, lookback, split_records
from datastore.ingest.tables import is_table, read_texts
from datastore.ingestion.reading.listing import SkipReason
from datastore.ingestion.reading.sources import SourceFile
from datastore.ingestion.reading.streams import Stream, open_stream, read_chunks
from datastore.ingestion.settings import IngestSettings
from datastore.storage.base import Storage

__all__ = ["check_unchanged", "read_part", "separator_of"]

_PROBE_BYTES = 8192
"""Where a NUL makes a file of a folder binary; git looks about as far."""


def separator_of(file: SourceFile, settings: IngestSettings) -> bytes:
    """Return what parts the records of `file`; empty if it is one record."""
    return b"\n" if file.format == "jsonl" else settings.separator.encode()


def read_part(
    storage: Storage, key: str, *, file: SourceFile, span: tuple[int, int], settings: IngestSettings
) -> Iterator[Record | Reject | SkipReason]:
    """Yield what the records of `file` that begin in the byte range `span` are, in order.

    A file of a folder that proves to be binary yields the one word `binary`. Offsets into a compressed file count its
    decompressed bytes.

    Raises:
        ConflictError: the file is no longer what was planned.
        StorageError: it cannot be read.
    """
    separator = separator_of(file, settings)
    start, stop = span
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
        pieces = split_records(
            stream,
            separator=separator,
            start=start,
            stop=None if file.codec else stop,
            limit_bytes=settings.max_document_bytes,
        )
        yield from _parsed(pieces, stream, file=file, settings=settings)
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


def _parsed(
    pieces: Iterator[Piece], stream: Stream, *, file: SourceFile, settings: IngestSettings
) -> Iterator[Record | Reject | SkipReason]:
    parse, separator = _parser(file, settings), separator_of(file, settings)
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


def _parser(file: SourceFile, settings: IngestSettings) -> Parser:
    if file.format == "jsonl":
        return line_parser(file.path, text_key=settings.text_key, id_key=settings.id_key)
    return text_parser(file.path, whole=not settings.separator)


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
