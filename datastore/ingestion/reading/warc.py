"""The records of a WARC or WET archive: pages with a text, or rows with everything in them.

A page is a `conversion` (the text of a WET archive), or a `response` or `resource` that is text by its media type, if the server
said that all was well. The other records of an archive say how it was made, and are counted. HTML stays as it is, or becomes its
text by resiliparse. A page in another character set is decoded as it says of itself, strictly.

What a record's digest says is checked. Of the digest of a payload nobody knows whether it was taken before or after the chunks
and encodings were undone, so one of the three must agree.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from datastore.dataset.journal import SourceFile
from datastore.errors import CorruptError, DependencyError
from datastore.formats.decompression import SourceStream
from datastore.formats.http import Response, charset_of, decode_body, split_response, unchunked
from datastore.formats.warc import WarcRecord, digest_agrees, split_warc
from datastore.ingestion.reading.listing import SkipReason
from datastore.ingestion.reading.rejects import Reason, Reject, reject
from datastore.ingestion.settings import IngestSettings

__all__ = ["WARC_SCHEMA", "Page", "read_pages", "warc_rows"]

_TIMES_LIMIT = 4
"""A block may be so many times as long as a document, for it has more than its text."""

_TEXT_TYPES = {"application/xhtml+xml", "application/json", "application/xml"}

_PAGES = {"response", "resource", "conversion"}
"""Types of records that may hold a page."""

_HTML_TYPES = {"text/html", "application/xhtml+xml"}

_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "type": pa.string(),
    "url": pa.string(),
    "date": pa.string(),
    "status": pa.int32(),
    "mime": pa.string(),
    "truncated": pa.string(),
    "offset": pa.int64(),
    "body": pa.binary(),
}

WARC_SCHEMA = pa.schema(pa.field(name, kind) for name, kind in _COLUMNS.items())
"""A row for each record; `body` without chunks and encodings, `truncated` why the crawler cut it."""


class Page(NamedTuple):
    """A record with a text."""

    offset: int
    length: int
    name: Any
    """Its id; None if it has none."""

    text: bytes
    """In UTF-8."""


def read_pages(
    stream: SourceStream, *, file: SourceFile, settings: IngestSettings
) -> Iterator[Page | Reject | SkipReason]:
    """Yield what the records of the archive `file` are, whose plain bytes are `stream`.

    Raises:
        DependencyError: the text of HTML is wanted, and resiliparse is not installed.
    """
    to_text = _html_to_text() if settings.html_text else None
    end = 0
    for record in split_warc(stream, limit_bytes=_TIMES_LIMIT * settings.max_document_bytes):
        end = record.offset + record.length
        if record.flaw == "truncated" and stream.fault is not None:
            end = record.offset
            break
        yield _page(record, file, settings, to_text)
    if stream.fault is not None:
        yield reject(file.path, end, stream.fault, b"")


def warc_rows(
    stream: SourceStream, *, file: SourceFile, settings: IngestSettings
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield a row of `WARC_SCHEMA` for each record, and its size.

    Raises:
        CorruptError: a record is damaged, or the archive ends in it.
    """
    limit = _TIMES_LIMIT * settings.max_document_bytes
    for record in split_warc(stream, limit_bytes=limit):
        parts = None if record.flaw else _Parts.of(record, settings)
        flaw = record.flaw if parts is None else parts.flaw
        if parts is None or flaw is not None:
            raise CorruptError(
                f"a record of the archive is damaged: {flaw}",
                where=file.path,
                offset=record.offset,
                hint="Take only texts, which sets damaged records aside; or restore the file from a copy.",
            )
        fields = record.fields
        yield (
            record.length,
            {
                "id": _id_of(record),
                "type": fields.get("warc-type"),
                "url": fields.get("warc-target-uri"),
                "date": fields.get("warc-date"),
                "status": parts.response.status,
                "mime": parts.content_type.partition(";")[0].strip().lower() or None,
                "truncated": fields.get("warc-truncated"),
                "offset": record.offset,
                "body": parts.body,
            },
        )
    if stream.fault is not None:
        raise CorruptError(f"the file is damaged: {stream.fault}", where=file.path, hint="Restore it from a copy.")


class _Parts(NamedTuple):
    """A record taken apart."""

    response: Response
    body: bytes
    """Without chunks and encodings."""

    content_type: str
    flaw: Reason | None

    @property
    def mime(self) -> str:
        """The media type; where it is not said, that of HTML or of text."""
        said = self.content_type.partition(";")[0].strip().lower()
        return said or ("text/html" if self.body.lstrip()[:1] == b"<" else "text/plain")

    def text(self) -> str | None:
        """Return the body in its character set, or None if it is not in it."""
        try:
            return self.body.decode(charset_of(self.content_type, self.body if self.mime in _HTML_TYPES else b""))
        except (LookupError, ValueError):
            return None

    @classmethod
    def of(cls, record: WarcRecord, settings: IngestSettings) -> "_Parts":
        fields, block = record.fields, record.block
        response, body, flaw = Response(None, {}, block), block, None
        content_type = fields.get("content-type", "")
        if content_type.lower().startswith("application/http") and _type_of(record) != "request":
            response = split_response(block)
            content_type = response.fields.get("content-type", "")
            body, flaw = decode_body(
                response, limit_bytes=_TIMES_LIMIT * settings.max_document_bytes, max_expansion=settings.max_expansion
            )
        return cls(response, body, content_type, flaw if _is_sound(record, response, body) else "digest_mismatch")


def _is_sound(record: WarcRecord, response: Response, body: bytes) -> bool:
    """Return whether the record is what its digests say."""
    said = record.fields.get("warc-block-digest", "")
    if said and not digest_agrees(said, record.block):
        return False
    said = record.fields.get("warc-payload-digest", "")
    if not said or _type_of(record) not in _PAGES:
        return True  # The digest of a revisit is that of the record which it stands for.
    return digest_agrees(said, response.body) or digest_agrees(said, unchunked(response.body)[0], body)


def _page(
    record: WarcRecord, file: SourceFile, settings: IngestSettings, to_text: Callable[[str], str] | None
) -> Page | Reject | SkipReason:
    kind = _type_of(record)
    if record.flaw is None and kind not in _PAGES:
        return "revisit" if kind == "revisit" else "about_records"
    parts = None if record.flaw else _Parts.of(record, settings)
    if parts is None or parts.flaw == "digest_mismatch":
        return reject(file.path, record.offset, record.flaw or "digest_mismatch", record.block)
    left_out = _left_out(parts)
    if left_out is not None:
        return left_out
    text = parts.text()
    if text is None or parts.flaw is not None:
        return reject(file.path, record.offset, parts.flaw or "invalid_utf8", parts.body)
    if to_text is not None and parts.mime in _HTML_TYPES:
        text = to_text(text)
    name = _id_of(record) if settings.id_key == "id" else _named(record, settings.id_key)
    return Page(record.offset, record.length, name, text.encode("utf-8", "surrogatepass"))


def _left_out(parts: _Parts) -> SkipReason | None:
    """Return why there is no page in a sound record that could be one."""
    if parts.response.status is not None and parts.response.status // 100 != 2:
        return "http_status"
    is_text = parts.mime.startswith("text/") or parts.mime in _TEXT_TYPES
    return None if is_text else "not_text"


def _named(record: WarcRecord, id_key: str) -> str | None:
    fields = {"url": "warc-target-uri", "date": "warc-date"}
    return record.fields.get(fields.get(id_key, id_key.lower()))


def _type_of(record: WarcRecord) -> str:
    return record.fields.get("warc-type", "").lower()


def _id_of(record: WarcRecord) -> str | None:
    name = record.fields.get("warc-record-id", "").strip()
    return name.removeprefix("<").removesuffix(">") or None


def _html_to_text() -> Callable[[str], str]:
    try:
        from resiliparse.extract.html2text import extract_plain_text  # noqa: PLC0415 - optional
    except ImportError:
        raise DependencyError(
            "resiliparse is not installed", hint="pip install 'llm-datastore[warc]', or take HTML as it is."
        ) from None
    return lambda html: str(extract_plain_text(html, main_content=True))
