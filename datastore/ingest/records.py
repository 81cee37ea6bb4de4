"""From the bytes of a record to its text, or to the reason why it has none: a pure function.

Strict on purpose. Bytes that are no UTF-8 are never replaced, a missing text is never an empty one: what a model
learns from is exactly what the file says, and the rest is counted by reason and kept aside.
"""

import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import orjson

from datastore.ingest.split import HEAD_BYTES, Piece

__all__ = ["Reason", "Record", "Reject", "line_parser", "reject", "text_parser"]

Reason = Literal[
    "bomb",
    "corrupt_stream",
    "duplicate_id",
    "empty_text",
    "id_not_text",
    "invalid_json",
    "invalid_utf8",
    "lone_surrogate",
    "missing_text",
    "no_tokens",
    "nul",
    "null_text",
    "special_token",
    "text_not_string",
    "token_out_of_range",
    "too_long",
    "truncated",
]
"""Why a document was rejected; `docs/` explains each."""

_BOM = b"\xef\xbb\xbf"


class Record(NamedTuple):
    """One document: bytes `[offset, offset + length)` of its source hold it."""

    id: str
    source: str
    offset: int
    length: int
    text: str
    named: bool
    """Whether the id stands in the data, so that another document may have it, too."""


class Reject(NamedTuple):
    """One record that gives no document."""

    source: str
    offset: int
    reason: Reason
    excerpt: str
    """Its first 200 bytes; those that are no UTF-8 as `\\xNN`."""


Parser = Callable[[Piece], Record | Reject | None]


def reject(source: str, offset: int, reason: Reason, data: bytes | str) -> Reject:
    """Return the reject for the record that begins with `data`."""
    raw = data if isinstance(data, bytes) else data[:HEAD_BYTES].encode("utf-8", "surrogatepass")
    return Reject(source, offset, reason, raw[:HEAD_BYTES].decode("utf-8", "backslashreplace"))


def text_parser(source: str, *, whole: bool) -> Parser:
    """Return the parser for a text file: the piece is the document, without a byte order mark.

    If it is the `whole` file, the document is called after it, otherwise after its byte offset, too.
    """

    def parse(piece: Piece) -> Record | Reject | None:
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
        return Record(source if whole else f"{source}#{offset}", source, offset, length, text, named=False)

    return parse


def line_parser(source: str, *, text_key: str, id_key: str) -> Parser:
    """Return the parser for JSON lines: an object with the text under one key and perhaps an id under another.

    A blank line is no record.
    """

    def parse(piece: Piece) -> Record | Reject | None:
        offset, data = piece.offset, piece.data
        if offset == 0 and data.startswith(_BOM):
            data = data[3:]
        if piece.length > len(piece.data):
            return reject(source, offset, "too_long", data)
        try:
            row = orjson.loads(data)
        except orjson.JSONDecodeError:
            return reject(source, offset, _why_not_json(data), data) if data.strip() else None
        text = row.get(text_key) if isinstance(row, dict) else None
        if type(text) is not str or not text or "\0" in text:
            return reject(source, offset, _why_no_text(row, text_key), data)
        name = row.get(id_key)
        if name is None:
            return Record(f"{source}#{offset}", source, offset, piece.length, text, named=False)
        if type(name) not in {str, int} or name == "":
            return reject(source, offset, "id_not_text", data)
        return Record(str(name), source, offset, piece.length, text, named=True)

    return parse


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
