"""The answer of a web server, as a WARC keeps it: status, headers, and the body without its encodings.

Chunked transfer is undone first, then content encodings, the last one first. Both are undone only where the body is what its
headers say: crawlers often keep the headers of a body that they have decoded.
"""

import re
import zlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from datastore.formats.decompression import codec_of, open_stream
from datastore.formats.warc import fields_of

__all__ = ["BodyFault", "Response", "charset_of", "decode_body", "split_response", "unchunked"]

BodyFault = Literal["bomb", "corrupt_stream", "truncated", "unknown_encoding"]

_BLANK = re.compile(rb"\r?\n\r?\n")

_CHUNK = re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(?:;[^\r\n]*)?\r?\n")

_META = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)""", re.IGNORECASE)

_META_BYTES = 4096

_AS_BROWSERS = {
    "iso-8859-1": "cp1252",
    "latin1": "cp1252",
    "latin-1": "cp1252",
    "ascii": "cp1252",
    "us-ascii": "cp1252",
}
"""Browsers read these by another name, and pages are written for browsers: https://encoding.spec.whatwg.org/#names-and-labels"""


class Response(NamedTuple):
    """An answer; its body as it was sent."""

    status: int | None
    fields: Mapping[str, str]
    body: bytes


def split_response(block: bytes) -> Response:
    r"""Return the parts of an answer. One that has no headers is all body.

    >>> split_response(b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\nhello")
    Response(status=200, fields={'server': 'x'}, body=b'hello')
    """
    blank = _BLANK.search(block)
    line, _, head = block[: blank.start() if blank else None].partition(b"\n")
    words = line.split(None, 2)
    if len(words) < 2 or not words[1].isdigit() or b"<" in words[0]:
        return Response(None, {}, block)
    return Response(int(words[1][:4]), fields_of(head), block[blank.end() :] if blank else b"")


def unchunked(body: bytes) -> tuple[bytes, BodyFault | None]:
    r"""Return what chunks hold, and whether the last one is missing; a body that does not begin with a chunk as it is.

    >>> unchunked(b"3;name=value\r\nabc\r\n0\r\n\r\n")
    (b'abc', None)
    >>> unchunked(b"plain")
    (b'plain', None)
    """
    found = _CHUNK.match(body)
    if found is None:
        return body, None
    parts: list[bytes] = []
    while found is not None:
        size = int(found[1], 16)
        if size == 0:
            return b"".join(parts), None
        part = body[found.end() : found.end() + size]
        parts.append(part)
        if len(part) < size:
            break
        at = found.end() + size
        at += 2 if body.startswith(b"\r\n", at) else body.startswith(b"\n", at)
        found = _CHUNK.match(body, at)
    return b"".join(parts), "truncated"


def decode_body(response: Response, *, limit_bytes: int, max_expansion: int) -> tuple[bytes, BodyFault | None]:
    """Return the body of `response` without its encodings, and why it is not all there; no more than about `limit_bytes`."""
    body = response.body
    if "chunked" in response.fields.get("transfer-encoding", "").lower():
        body, fault = unchunked(body)
        if fault:
            return body, fault
    names = response.fields.get("content-encoding", "").lower().split(",")
    for name in reversed([name.strip() for name in names]):
        body, fault = _decoded(body, name, limit_bytes=limit_bytes, max_expansion=max_expansion)
        if fault:
            return body, fault
    return body, None


def _decoded(body: bytes, name: str, *, limit_bytes: int, max_expansion: int) -> tuple[bytes, BodyFault | None]:
    if name in {"", "identity", "none", "utf-8"} or not body:
        return body, None
    if name in {"gzip", "x-gzip", "zstd"}:
        codec = codec_of(body)
        return _streamed(body, codec, limit_bytes, max_expansion) if codec in {"gz", "zst"} else (body, None)
    if name == "deflate":
        return _inflated(body, limit_bytes)
    return (_unbrotlied(body, limit_bytes) if name == "br" else None) or (body, "unknown_encoding")


def _streamed(body: bytes, codec: Any, limit_bytes: int, max_expansion: int) -> tuple[bytes, BodyFault | None]:
    stream = open_stream([body], codec=codec, max_expansion=max_expansion)
    parts, size = [], 0
    for part in stream:
        parts.append(part)
        size += len(part)
        if size > limit_bytes:
            break
    return b"".join(parts), stream.fault


def _inflated(body: bytes, limit_bytes: int) -> tuple[bytes, BodyFault | None]:
    """Undo `deflate`, which is zlib by the standard, and without its head by some servers."""
    for bits in (zlib.MAX_WBITS, -zlib.MAX_WBITS):
        inflater = zlib.decompressobj(wbits=bits)
        try:
            data = inflater.decompress(body, limit_bytes + 1)
        except zlib.error:
            continue
        return data, None if inflater.eof or len(data) > limit_bytes else "truncated"
    return (body, None) if body.lstrip()[:1] == b"<" else (body, "corrupt_stream")


def _unbrotlied(body: bytes, limit_bytes: int) -> tuple[bytes, BodyFault | None] | None:
    """Undo `br`; None if the library for it is not installed."""
    try:
        import brotli  # noqa: PLC0415 - optional
    except ImportError:
        return None
    decompressor = brotli.Decompressor()
    try:
        data = bytes(decompressor.process(body, output_buffer_limit=limit_bytes + 1))
        while len(data) <= limit_bytes and not decompressor.is_finished():
            more = decompressor.process(b"", output_buffer_limit=limit_bytes + 1)
            if not more:
                return data, "truncated"
            data += more
    except brotli.error:
        return (body, None) if body.lstrip()[:1] == b"<" else (body, "corrupt_stream")
    return data, None


def charset_of(content_type: str, body: bytes) -> str:
    """Return the character set that the header names, else the page itself, else UTF-8.

    >>> charset_of("text/html; charset=ISO-8859-1", b"")
    'cp1252'
    >>> charset_of("text/html", b'<html><meta charset="shift_jis">')
    'shift_jis'
    """
    _, mark, named = content_type.lower().partition("charset=")
    found = _META.search(body[:_META_BYTES]) if not mark else None
    name = re.split(r"[;,\s]", named.strip("\"' "))[0].strip("\"'") if mark else ""
    name = found[1].decode("ascii", "replace").lower() if found else name
    return _AS_BROWSERS.get(name, name) or "utf-8"
