"""WARC and WET archives: every page arrives, whatever its encodings, and what does not is counted or named."""

import base64
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brotli
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from warcio.archiveiterator import ArchiveIterator

import datastore as ds
from datastore.errors import CorruptError, RejectedError
from datastore.formats.warc import split_warc
from datastore.ingestion.report import IngestReport

HTML = b"<html><body><main>" + b"<p>hello w\xc3\xb6rld, this is a page.</p>" * 20 + b"</main></body></html>"


def record(kind: str, block: bytes, uri: str, *fields: str) -> bytes:
    name = hashlib.sha1(uri.encode()).hexdigest()
    lines = [f"WARC-Type: {kind}", f"WARC-Record-ID: <urn:x:{name}>", f"WARC-Target-URI: {uri}", *fields]
    head = "\r\n".join(["WARC/1.1", *lines, f"Content-Length: {len(block)}"])
    return f"{head}\r\n\r\n".encode() + block + b"\r\n\r\n"


AS_HTTP = "Content-Type: application/http; msgtype=response"


def answered(body: bytes, *headers: str, uri: str = "http://x/page", status: str = "200 OK") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", *headers])
    return record(
        "response", f"{head}\r\n\r\n".encode() + body, uri, "Content-Type: application/http; msgtype=response"
    )


def chunked(body: bytes, size: int = 100, extension: str = "") -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension.encode(), part) for part in parts) + b"0\r\n\r\n"


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


TYPE = "Content-Type: text/html; charset=utf-8"

BODIES: dict[str, bytes] = {
    "plain": answered(HTML, TYPE),
    "no type": answered(HTML),
    "chunked": answered(chunked(HTML), TYPE, "Transfer-Encoding: chunked"),
    "chunked in other letters": answered(chunked(HTML), TYPE, "TRANSFER-ENCODING: Chunked"),
    "chunks with extensions": answered(chunked(HTML, extension="; a=1"), TYPE, "Transfer-Encoding: chunked"),
    "chunked, but plain": answered(HTML, TYPE, "Transfer-Encoding: chunked"),
    "gzip": answered(gzip.compress(HTML), TYPE, "Content-Encoding: gzip"),
    "gzip of two members": answered(
        gzip.compress(HTML[:99]) + gzip.compress(HTML[99:]), TYPE, "Content-Encoding: gzip"
    ),
    "x-gzip": answered(gzip.compress(HTML), TYPE, "Content-Encoding: x-gzip"),
    "gzip, but plain": answered(HTML, TYPE, "Content-Encoding: gzip"),
    "gzip in chunks": answered(
        chunked(gzip.compress(HTML), 20), TYPE, "Content-Encoding: gzip", "Transfer-Encoding: chunked"
    ),
    "gzip twice": answered(gzip.compress(gzip.compress(HTML)), TYPE, "Content-Encoding: gzip, gzip"),
    "deflate": answered(zlib.compress(HTML), TYPE, "Content-Encoding: deflate"),
    "deflate without its head": answered(raw_deflate(HTML), TYPE, "Content-Encoding: deflate"),
    "zstd": answered(zstandard.compress(HTML), TYPE, "Content-Encoding: zstd"),
    "brotli": answered(brotli.compress(HTML), TYPE, "Content-Encoding: br"),
    "folded header": answered(HTML, "X-Long: a\r\n  b", TYPE),
    "line feeds": record("response", f"HTTP/1.1 200 OK\n{TYPE}\n\n".encode() + HTML, "http://x/p", AS_HTTP).replace(
        b"\r\n", b"\n"
    ),
    "no HTTP version": answered(HTML, TYPE).replace(b"HTTP/1.1 200 OK", b"ICY      200 OK"),
    "resource": record("resource", HTML, "http://x/page", TYPE),
    "latin-1": answered(HTML.decode().encode("latin-1"), "Content-Type: text/html; charset=ISO-8859-1"),
    "digests": answered(HTML, TYPE),
}

WET = [
    record("conversion", f"Text {i}: wörld\n".encode(), f"http://x/{i}", "Content-Type: text/plain") for i in range(9)
]


Ingested = Callable[..., tuple[IngestReport, list[dict[str, Any]]]]


@pytest.fixture
def ingested(tmp_path: Path) -> Ingested:
    def run(archive: bytes, name: str = "a.warc", **settings: Any) -> tuple[IngestReport, list[dict[str, Any]]]:
        (tmp_path / name).write_bytes(archive)
        to = str(tmp_path / "data")
        report = ds.ingest(str(tmp_path / name), to, settings=ds.IngestSettings(workers=1, **settings))
        return report, list(ds.open(to).iter_records())

    return run


@pytest.mark.parametrize("name", BODIES)
def test_a_page_is_what_the_server_sent_whatever_its_encodings(name: str, ingested: Ingested) -> None:
    report, rows = ingested(BODIES[name])
    assert [row["text"] for row in rows] == [HTML.decode()]
    assert report.rejected == {}


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.warc", b"".join),
        ("a.warc.gz", lambda parts: b"".join(map(gzip.compress, parts))),
        ("one-member.warc.gz", lambda parts: gzip.compress(b"".join(parts))),
        ("a.warc.zst", lambda parts: b"".join(map(zstandard.compress, parts))),
        ("no-suffix", lambda parts: b"".join(map(gzip.compress, parts))),
    ],
)
def test_an_archive_is_told_by_its_bytes_however_it_is_packed(
    name: str, pack: Callable[[Any], bytes], ingested: Ingested
) -> None:
    _, rows = ingested(pack(WET), name)
    assert [row["text"] for row in rows] == [f"Text {i}: wörld\n" for i in range(9)]
    assert rows[1]["source"] == name
    assert rows[1]["offset"] == len(WET[0])
    assert rows[1]["id"].startswith("urn:x:")


def test_texts_of_a_wet_archive_are_those_that_warcio_reads(ingested: Ingested) -> None:
    archive = b"".join(map(gzip.compress, WET))
    theirs = [each.content_stream().read().decode() for each in ArchiveIterator(io.BytesIO(archive))]
    assert [row["text"] for row in ingested(archive, "a.warc.gz")[1]] == theirs


def test_records_that_are_no_pages_are_counted_by_kind(ingested: Ingested) -> None:
    archive = b"".join(
        [
            record("warcinfo", b"software: x\r\n", "http://x/i"),
            record("request", b"GET / HTTP/1.1\r\n\r\n", "http://x/q", "Content-Type: application/http"),
            record("metadata", b"a: b\r\n", "http://x/m"),
            record("revisit", b"HTTP/1.1 200 OK\r\n\r\n", "http://x/r", "Content-Type: application/http"),
            answered(b"\x89PNG", "Content-Type: image/png", uri="http://x/png"),
            answered(b"not found", "Content-Type: text/plain", uri="http://x/404", status="404 Not Found"),
            answered(HTML, TYPE),
        ]
    )
    report, rows = ingested(archive)
    assert len(rows) == 1
    assert report.skipped == {"about_records": 3, "revisit": 1, "not_text": 1, "http_status": 1}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_of_an_archive_cut_in_the_middle_all_whole_pages_arrive_and_the_cut_is_named(
    pack: Callable[[bytes], bytes], ingested: Ingested
) -> None:
    stored = [pack(each) for each in WET]
    report, rows = ingested(b"".join(stored)[:-20], "a.warc", max_reject_ratio=0.5)
    assert len(rows) == 8
    assert report.rejected == {"truncated": 1}
    line = json.loads(next(Path(report.rejects).glob("*.jsonl")).read_text())
    assert (line["source"], line["offset"]) == ("a.warc", sum(map(len, WET[:-1])))


DAMAGED: dict[str, tuple[bytes, str]] = {
    "junk": (b"some junk\r\nand more\r\n\r\n", "bad_record"),
    "no length": (WET[0].replace(b"Content-Length", b"Content-Width"), "bad_record"),
    "length too short": (WET[0].replace(b"Content-Length: 15", b"Content-Length: 3"), "bad_record"),
    "length too long": (WET[0].replace(b"Content-Length: 15", b"Content-Length: 300"), "bad_record"),
    "length past the end": (WET[0].replace(b"Content-Length: 15", b"Content-Length: 30000"), "bad_record"),
    "negative length": (WET[0].replace(b"Content-Length: 15", b"Content-Length: -15"), "bad_record"),
    "too long": (record("conversion", b"x" * 50_000, "http://x/y"), "too_long"),
    "empty": (record("conversion", b"", "http://x/y"), "empty_text"),
    "no UTF-8": (record("conversion", b"\xff\xfe", "http://x/y"), "invalid_utf8"),
    "unknown character set": (answered(HTML, "Content-Type: text/html; charset=klingon"), "invalid_utf8"),
    "half a gzip body": (answered(gzip.compress(HTML)[:-30], TYPE, "Content-Encoding: gzip"), "truncated"),
    "last chunk missing": (answered(chunked(HTML)[:-300], TYPE, "Transfer-Encoding: chunked"), "truncated"),
    "unknown encoding": (answered(HTML, TYPE, "Content-Encoding: lzh"), "unknown_encoding"),
    "other block digest": (
        record("conversion", b"abc", "http://x/y", f"WARC-Block-Digest: sha1:{'A' * 32}"),
        "digest_mismatch",
    ),
    "other payload digest": (
        record("resource", b"abc", "http://x/y", "Content-Type: text/plain", f"WARC-Payload-Digest: md5:{'0' * 32}"),
        "digest_mismatch",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_one_damaged_record_costs_one_record(name: str, ingested: Ingested) -> None:
    damaged, reason = DAMAGED[name]
    report, rows = ingested(b"".join([WET[1], damaged, *WET[2:]]), max_reject_ratio=0.5, max_document_bytes=10_000)
    assert [row["text"][:6] for row in rows] == [f"Text {i}" for i in range(1, 9)]
    assert report.rejected == {reason: 1}


@pytest.mark.parametrize(
    "spell", [lambda d: base64.b32encode(d).decode(), lambda d: d.hex(), lambda d: d.hex().upper()]
)
@pytest.mark.parametrize("body", [HTML, chunked(HTML), chunked(gzip.compress(HTML))], ids=["plain", "chunked", "gzip"])
def test_a_digest_of_any_stage_of_the_payload_is_right(
    body: bytes, spell: Callable[[bytes], str], ingested: Ingested
) -> None:
    headers = ["Transfer-Encoding: chunked", "Content-Encoding: gzip"]
    raw = answered(body, TYPE, *headers)
    said = f"WARC-Payload-Digest: sha1:{spell(hashlib.sha1(HTML).digest())}"
    assert ingested(raw.replace(b"WARC-Type", f"{said}\r\nWARC-Type".encode(), 1))[0].documents == 1


def test_rows_have_every_record_with_what_it_says_of_itself(ingested: Ingested) -> None:
    archive = BODIES["chunked"] + record("revisit", b"", "http://x/r", "WARC-Date: 2026-01-02T03:04:05.123456789Z")
    report, rows = ingested(archive, take="rows")
    assert report.rejected == {}
    first, second = rows
    assert (first["type"], first["status"], first["mime"], first["url"]) == (
        "response",
        200,
        "text/html",
        "http://x/page",
    )
    assert first["body"] == HTML
    assert second["date"] == "2026-01-02T03:04:05.123456789Z"
    with pytest.raises(CorruptError, match="truncated"):
        ingested(archive[:-20], "cut.warc", take="rows")


def test_the_url_may_be_the_id_and_then_a_page_is_there_once(ingested: Ingested) -> None:
    archive = BODIES["plain"] + WET[0] + BODIES["gzip"]
    report, rows = ingested(archive, id_key="url", max_reject_ratio=0.5)
    assert [row["id"] for row in rows] == ["http://x/page", "http://x/0"]
    assert report.rejected == {"duplicate_id": 1}


def test_html_may_become_its_text(ingested: Ingested) -> None:
    pytest.importorskip("resiliparse")
    _, rows = ingested(BODIES["gzip"] + WET[0], html_text=True)
    assert rows[0]["text"].startswith("hello wörld, this is a page.")
    assert "<" not in rows[0]["text"]
    assert rows[1]["text"] == "Text 0: wörld\n"


def test_an_archive_without_a_page_is_refused_with_the_reason(ingested: Ingested) -> None:
    with pytest.raises(RejectedError):
        ingested(b"WARC/1.0\r\n" + b"nonsense\r\n" * 3)


@given(st.lists(st.integers(1, 400)), st.data())
def test_cuts_between_chunks_change_nothing(sizes: list[int], data: st.DataObject) -> None:
    archive = bytearray(b"".join([*WET[:3], BODIES["chunked"]]))
    for _ in range(data.draw(st.integers(0, 3))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    whole = list(split_warc([bytes(archive)], limit_bytes=5000))
    chunks, at = [], 0
    for size in sizes:
        chunks.append(bytes(archive[at : at + size]))
        at += size
    assert list(split_warc([*chunks, bytes(archive[at:])], limit_bytes=5000)) == whole
