"""The records of a WARC or WET archive, from its plain bytes.

A record is a head of named fields, a block as long as the head says, and an empty line. Nothing is taken on trust: a head
that is none, or a block that is not followed by the next record or the end, is one bad record, and reading goes on at the next
line that begins a record. So one damaged record costs one record, and the caller is told where it stood.

Written here, because the libraries for it (warcio 1.8.1, FastWARC 2.0.1) end at such a place, the one with a cut record as if it
were whole, and refuse archives whose members hold more than one record.

Source: ISO 28500, https://iipc.github.io/warc-specifications/specifications/warc-format/warc-1.1/
"""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

__all__ = ["Flaw", "WarcRecord", "digest_agrees", "fields_of", "split_warc"]

Flaw = Literal["bad_record", "too_long", "truncated"]

_HEAD_BYTES = 2**20
"""No head is longer."""

_KEPT_BYTES = 200
"""What is kept of a block that is too long."""

_BEGINS = re.compile(rb"WARC/\d+\.\d+[ \t]*\r?\n")

_NEXT = re.compile(rb"\nWARC/\d+\.\d+[ \t]*\r?\n")

_BLANK = re.compile(rb"\r?\n\r?\n")

_LINE_ENDS = re.compile(rb"[\r\n]*")

_LONGEST_BEGIN = 32
"""Bytes that may have to be seen twice to find `_NEXT`."""

_HASHES = {"md5", "sha1", "sha256", "sha384", "sha512"}


class WarcRecord(NamedTuple):
    """One record, or what stands where one should."""

    offset: int
    fields: Mapping[str, str]
    """By their names in lower case; none of a `bad_record`."""

    block: bytes
    """Its beginning only, if it has a flaw."""

    length: int
    """Bytes of head and block."""

    flaw: Flaw | None = None


def fields_of(head: bytes) -> dict[str, str]:
    r"""Return the fields of a head by their names in lower case: of those with one name the first, folded lines put together.

    >>> fields_of(b"Content-Type: text/plain\r\nX-Long: a\r\n  b\r\n")
    {'content-type': 'text/plain', 'x-long': 'a b'}
    """
    fields: dict[str, str] = {}
    name = ""
    for line in head.decode("utf-8", "replace").split("\n"):
        if line[:1] in {" ", "\t"} and name:
            fields[name] = f"{fields[name]} {line.strip()}"
            continue
        key, colon, value = line.partition(":")
        name = key.strip().lower() if colon and key.strip().lower() not in fields else ""
        if name:
            fields[name] = value.strip()
    return fields


def split_warc(chunks: Iterable[bytes], *, limit_bytes: int) -> Iterator[WarcRecord]:
    """Yield the records of the archive that `chunks` are. A block of more than `limit_bytes` is `too_long`, and passed over.

    Memory: twice that, and a chunk.
    """
    scan = _Scan(chunks)
    while scan.pass_blank():
        offset = scan.at
        head = scan.head()
        fields = fields_of(head) if head else {}
        size = fields.get("content-length", "")
        if head is None and scan.is_cut_head():
            yield WarcRecord(offset, {}, scan.peek(_KEPT_BYTES), len(scan.rest), "truncated")
            return
        if not (size.isascii() and size.isdigit()):
            yield WarcRecord(offset, {}, scan.peek(_KEPT_BYTES), 0, "bad_record")
            if not scan.find_next():
                return
            continue
        yield from _block(scan, offset, fields, size=int(size), limit_bytes=limit_bytes)


def _block(
    scan: "_Scan", offset: int, fields: Mapping[str, str], *, size: int, limit_bytes: int
) -> Iterator[WarcRecord]:
    """Yield the record whose head was just read."""
    if size > limit_bytes:
        begin = scan.peek(_KEPT_BYTES)
        flaw: Flaw = "too_long" if scan.skip(size) else "truncated"
        yield WarcRecord(offset, fields, begin, scan.at - offset, flaw)
        return
    block = scan.peek(size)
    if len(block) < size:
        # The archive may be cut here; or the length is wrong, and records follow all the same.
        found = scan.find_next()
        yield WarcRecord(offset, fields, block[:_KEPT_BYTES], size, "bad_record" if found else "truncated")
        return
    behind = scan.peek(2 * _LONGEST_BEGIN, behind=size)
    if not (behind.startswith(b"\r\n\r\n") or _BEGINS.match(behind.lstrip(b"\r\n")) or not behind.strip(b"\r\n")):
        yield WarcRecord(offset, fields, block[:_KEPT_BYTES], 0, "bad_record")
        scan.find_next()
        return
    scan.skip(size)
    yield WarcRecord(offset, fields, block, scan.at - offset)


class _Scan:
    """A place in the archive: byte `at` is the first of `rest`."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self.at = 0
        self.rest = bytearray()
        self._chunks = iter(chunks)

    def peek(self, size: int, *, behind: int = 0) -> bytes:
        """Return the next `size` bytes `behind` so many others, fewer at the end, and stay."""
        while len(self.rest) < behind + size and self._more():
            pass
        with memoryview(self.rest) as rest:
            return bytes(rest[behind : behind + size])

    def skip(self, size: int) -> bool:
        """Go on by `size` bytes; return whether there are so many."""
        while size > len(self.rest):
            size -= len(self.rest)
            self._drop(len(self.rest))
            if not self._more():
                return False
        self._drop(size)
        return True

    def pass_blank(self) -> bool:
        """Go on to the next byte that ends no line; return whether there is one."""
        while True:
            found = _LINE_ENDS.match(self.rest)
            self._drop(found.end() if found else 0)
            if self.rest:
                return True
            if not self._more():
                return False

    def head(self) -> bytes | None:
        """Return the fields of the head here and go on behind its empty line, or None, and stay, if there is no whole head."""
        if not _BEGINS.match(self.peek(_LONGEST_BEGIN)):
            return None
        looked = 0
        while True:
            found = _BLANK.search(self.rest, max(0, looked - 3))
            if found:
                head = bytes(self.rest[: found.start()])
                if _NEXT.search(head):  # The head of a record has no empty line, and another record begins.
                    return None
                self._drop(found.end())
                return head.split(b"\n", 1)[-1]
            looked = len(self.rest)
            if looked > _HEAD_BYTES or not self._more():
                return None

    def is_cut_head(self) -> bool:
        """Return whether the archive ends within the head that begins here."""
        begins = _BEGINS.match(self.rest) or (len(self.rest) < _LONGEST_BEGIN and self.rest.startswith(b"WARC/"))
        return bool(begins) and not self._more() and not _NEXT.search(self.rest)

    def find_next(self) -> bool:
        """Go on to the next line that begins a record; return whether there is one. What stands here is passed over."""
        begin = 1
        while True:
            found = _NEXT.search(self.rest, begin)
            if found:
                self._drop(found.start() + 1)
                return True
            surplus = max(0, len(self.rest) - _LONGEST_BEGIN)
            self._drop(surplus)
            begin = 0 if surplus else begin
            if not self._more():
                self._drop(len(self.rest))
                return False

    def _more(self) -> bool:
        chunk = next(self._chunks, None)
        if chunk is not None:
            self.rest += chunk
        return chunk is not None

    def _drop(self, size: int) -> None:
        del self.rest[:size]
        self.at += size


def digest_agrees(said: str, *data: bytes) -> bool:
    """Return whether the digest `said`, such as `sha1:` and base32 or hex, is that of one of `data`, or of a kind unknown here.

    >>> digest_agrees("sha1:3I42H3S6NNFQ2MSVX7XZKYAYSCX5QBYJ", b"")
    True
    """
    name, _, value = said.strip().partition(":")
    name = name.strip().lower().replace("-", "")
    if name not in _HASHES:
        return True
    value = value.strip().rstrip("=").lower()
    for each in data:
        digest = hashlib.new(name, each, usedforsecurity=False)
        if value in {digest.hexdigest(), base64.b32encode(digest.digest()).decode().rstrip("=").lower()}:
            return True
    return False
