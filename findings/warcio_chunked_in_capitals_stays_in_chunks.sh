#!/usr/bin/env bash
# warcio 1.8.1, 2026-11-28.
# content_stream() undoes chunked transfer only where the header spells it `chunked`. HTTP's names
# of transfer codings have no case (RFC 9112, 7), and of `Chunked` the page keeps the signs of its
# chunks: hexadecimal numbers between any two of its words. And where trailers follow the last
# chunk (RFC 9112, 7.1.2), they and the chunk's sign end up at the end of the page. No error.
# Why it matters: text taken from such pages has numbers in the midst of sentences, and nobody is
# told; digests of the decoded page and deduplication see another page than the one that was sent.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq warcio==1.8.1
cd "$tmp"
cat > seen.py <<'PY'
import io

from warcio.archiveiterator import ArchiveIterator

PAGE = b"<p>one page that came in two chunks</p>"


def read(coding, trailers=b""):
    chunks = b"14\r\n" + PAGE[:20] + b"\r\n13\r\n" + PAGE[20:] + b"\r\n0\r\n" + trailers + b"\r\n"
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: " + coding + b"\r\n\r\n" + chunks
    fields = b"WARC-Type: response\r\nWARC-Target-URI: http://x/\r\nContent-Type: application/http\r\n"
    archive = b"WARC/1.1\r\n%sContent-Length: %d\r\n\r\n%s\r\n\r\n" % (fields, len(answer), answer)
    return [each.content_stream().read() for each in ArchiveIterator(io.BytesIO(archive))]


assert len(PAGE) == 20 + 0x13
print("chunked          ", read(b"chunked"))
print("Chunked          ", read(b"Chunked"))
print("chunked, trailers", read(b"chunked", b"Digest: x\r\n"))
assert read(b"chunked") == [PAGE]
assert read(b"Chunked") != [PAGE] and b"\r\n13\r\n" in read(b"Chunked")[0]
assert read(b"chunked", b"Digest: x\r\n")[0] not in (PAGE, b"")
PY
"$tmp/v/bin/python" seen.py
