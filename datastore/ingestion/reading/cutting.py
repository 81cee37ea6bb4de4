"""A file cut into its records: lines, what lies between separators, the whole file, or the elements of a JSON array.

Nothing is parsed here. What an element of an array is worth is for the parser of a line to say. Where the array itself is damaged,
nobody can know where the next element begins, so that ends the ingest: what follows would be lost with one reject.
"""

import re
from collections.abc import Iterator

from datastore.dataset.journal import SourceFile
from datastore.errors import ConfigError, CorruptError
from datastore.formats.decompression import SourceStream
from datastore.ingestion.reading.streams import HEAD_BYTES, RecordPiece, split_records
from datastore.ingestion.settings import IngestSettings
from datastore.interop.base import Span

__all__ = ["cut_records", "separator_of", "split_array"]

_BOM = b"\xef\xbb\xbf"

_SIGNS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[][{},]|"', re.DOTALL)
"""Strings, what gives an array its shape, and the beginning of a string that goes on past the bytes at hand."""

_TIMES_LIMIT = 4
"""An element may be so many times as long as a document, for it has more than its text."""


def separator_of(file: SourceFile, settings: IngestSettings) -> bytes:
    """Return what parts the records of `file`; empty if it is one record, or an array of them."""
    if file.format in {"jsonl", "lines"}:
        return b"\n"
    return settings.separator.encode() if file.format == "text" else b""


def cut_records(
    stream: SourceStream, *, file: SourceFile, span: Span, settings: IngestSettings
) -> Iterator[RecordPiece]:
    """Yield the records of `file` that begin in `span`; `stream` is fed from `lookback` on.

    Raises:
        CorruptError: the file is a JSON array, and damaged.
    """
    if file.format == "json":
        return split_array(stream, limit_bytes=settings.max_document_bytes, where=file.path)
    return split_records(
        stream,
        separator=separator_of(file, settings),
        start=span[0],
        stop=None if file.codec else span[1],
        limit_bytes=settings.max_document_bytes,
    )


def split_array(stream: SourceStream, *, limit_bytes: int, where: str) -> Iterator[RecordPiece]:
    """Yield the elements of the JSON array that `stream` is, with their byte offsets. Memory: four times `limit_bytes`.

    Raises:
        CorruptError: it is no array, does not end, or something follows it.
        ConfigError: an element is longer than that.
    """
    scan = _Scan(where)
    for chunk in stream:
        for piece in scan.feed(chunk):
            yield piece if piece.length <= limit_bytes else piece._replace(data=piece.data[:HEAD_BYTES])
        if len(scan.rest) > _TIMES_LIMIT * limit_bytes:
            raise ConfigError(
                "an element of the array is too long", file=where, offset=scan.begin, hint="Raise `max_document_bytes`."
            )
    if stream.fault is None:
        scan.finish()


class _Scan:
    """Invariant: `rest` begins at byte `begin` of the file; before `at`, and at `depth`, everything in it is known."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.rest = b""
        self.begin = 0
        self.at = 0
        self.depth = 0
        self.ended = False

    def feed(self, chunk: bytes) -> Iterator[RecordPiece]:
        self.rest += chunk
        start = 0
        for sign in _SIGNS.finditer(self.rest, self.at):
            found = sign.group()
            if found == b'"':  # The string goes on: it is looked at again with what follows.
                break
            if not self.depth and (self.ended or found != b"[" or self.rest[start : sign.start()].strip(_BOM).strip()):
                break
            self.at = sign.end()
            closes = found in {b"]", b"}"}
            if self.depth == 1 and (found == b"," or closes):
                yield from self._element(start, sign.start(), closes=closes)
                start = self.at
            if found in {b"[", b"{"}:
                start = self.at if not self.depth else start
                self.depth += 1
            elif closes:
                self.depth -= 1
                self.ended = not self.depth
        self.rest, self.begin, self.at = self.rest[start:], self.begin + start, self.at - start
        if not self.depth and self.rest.strip(_BOM).strip():
            raise self._damaged("something follows it" if self.ended else "it does not begin with a bracket")

    def finish(self) -> None:
        if not self.ended:
            raise self._damaged("it does not end")

    def _element(self, start: int, stop: int, *, closes: bool) -> Iterator[RecordPiece]:
        data = self.rest[start:stop]
        offset = self.begin + start + len(data) - len(data.lstrip())
        data = data.strip()
        if data:
            yield RecordPiece(offset, data, len(data), ended=True)
        elif not closes:
            raise self._damaged("an element is missing")

    def _damaged(self, reason: str) -> CorruptError:
        return CorruptError(
            f"the JSON array is damaged: {reason}",
            where=self.where,
            offset=self.begin,
            begins=self.rest[:40].decode("utf-8", "backslashreplace"),
            hint="Restore the file from a copy, or write one object a line.",
        )
