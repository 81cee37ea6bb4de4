"""Make bad files, ingest each beside good records, and write docs/bad-input.md, the page of what becomes of them.

    python tools/bad_input.py [--check]

Each case is a folder with `good.jsonl` (two records), and a bad file. With `--check`, says whether the page is what happens now.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call

PAGE = Path(__file__).resolve().parent.parent / "docs" / "bad-input.md"

GOOD = b'{"text": "first"}\n{"text": "second"}\n'
ROW = b'{"text": "also good"}\n'
DEEP = 10_000


class Case(NamedTuple):
    """A bad file."""

    what: str
    name: str
    make: "bytes | Callable[[Path], None]"
    good: int = 0
    """Good records in the bad file itself."""


class Outcome(NamedTuple):
    """What became of it."""

    code: int
    arrived: int
    wanted: int
    rejected: dict[str, int]
    skipped: dict[str, int]
    message: str


def lines(*bad: bytes) -> bytes:
    """Return bad lines between two good ones."""
    return ROW + b"".join(line + b"\n" for line in bad) + ROW


def table(texts: list[Any]) -> bytes:
    """Return a Parquet file."""
    out = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), out)
    return out.getvalue()


def tar(members: dict[str, bytes]) -> bytes:
    """Return a tar."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    """Return a zip archive."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def warc(text: bytes, length: int | None = None) -> bytes:
    """Return a record of a WET archive."""
    size = len(text) if length is None else length
    return b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %d\r\n\r\n%s\r\n\r\n" % (size, text)


def encrypted() -> bytes:
    """Return a zip archive whose one member says that it has a password."""
    raw = bytearray(zipped({"a.txt": b"secret"}))
    raw[raw.index(b"PK\3\4") + 6] |= 1
    raw[raw.index(b"PK\1\2") + 8] |= 1
    return bytes(raw)


def loop(path: Path) -> None:
    """Make a link that leads to itself."""
    path.symlink_to(path.name)


def outside(path: Path) -> None:
    """Make a link that leads out of the source."""
    path.symlink_to("/etc/hostname")


_MANY = ROW * 200
_WARC = [warc(b"one"), warc(b"two"), warc(b"three")]
_TABLE = table(["x"] * 1000)
_FRAMES = zstandard.compress(ROW) + b"\x50\x2a\x4d\x18\x03\0\0\0abc" + zstandard.compress(ROW)

CASES = (
    Case("a line that is no JSON", "bad.jsonl", lines(b"{no json"), 2),
    Case("a line that is no object", "bad.jsonl", lines(b"[1, 2]", b'"text"', b"7", b"null"), 2),
    Case("half a line at the end", "bad.jsonl", ROW + b'{"text": "hal', 1),
    Case("no text", "bad.jsonl", lines(b'{"id": "x"}'), 2),
    Case("a text that is null", "bad.jsonl", lines(b'{"text": null}'), 2),
    Case("an empty text", "bad.jsonl", lines(b'{"text": ""}'), 2),
    Case("a text that is a number, a list, an object", "bad.jsonl",
         lines(b'{"text": 1}', b'{"text": ["a"]}', b'{"text": {}}'), 2),
    Case("an id that is a list", "bad.jsonl", lines(b'{"text": "x", "id": [1]}'), 2),
    Case("the same id twice", "bad.jsonl", lines(b'{"text": "x", "id": 1}', b'{"text": "y", "id": 1}'), 3),
    Case("a byte that is no UTF-8", "bad.jsonl", lines(b'{"text": "caf\xe9"}'), 2),
    Case("UTF-8 that is longer than it may be", "bad.jsonl", lines(b'{"text": "\xc0\xaf"}'), 2),
    Case("half of a surrogate pair", "bad.jsonl", lines(b'{"text": "\\ud800"}'), 2),
    Case("half of a surrogate pair, as bytes", "bad.jsonl", lines(b'{"text": "\xed\xa0\x80"}'), 2),
    Case("NUL in a text", "bad.jsonl", lines(b'{"text": "a\\u0000b"}'), 2),
    Case("NaN and infinity", "bad.jsonl", lines(b'{"text": "x", "n": NaN}', b'{"text": "x", "n": Infinity}'), 2),
    Case("a number past 2^63 (good)", "bad.jsonl", lines(b'{"text": "x", "n": 99999999999999999999}'), 3),
    Case("the same key twice: the last counts (good)", "bad.jsonl", lines(b'{"text": "x", "text": "y"}'), 3),
    Case("JSON that is 10,000 deep", "bad.jsonl", lines(b'{"text": "x", "a": ' + b"[" * DEEP + b"]" * DEEP + b"}"), 2),
    Case("a line of 17 MiB", "bad.jsonl", lines(b'{"text": "' + b"x" * (17 * 2**20) + b'"}'), 2),
    Case("lines that end with CR LF (good)", "bad.jsonl", lines(b'{"text": "x"}\r'), 3),
    Case("U+2028 in a text (good)", "bad.jsonl", lines('{"text": "a\u2028b"}'.encode()), 3),
    Case("a byte order mark (good)", "bad.jsonl", b"\xef\xbb\xbf" + ROW, 1),
    Case("blank lines (good)", "bad.jsonl", ROW + b"\n  \n\n" + ROW, 2),
    Case("UTF-16", "bad.jsonl", "".join(['{"text": "x"}\n'] * 3).encode("utf-16")),
    Case("nothing", "bad.jsonl", b""),
    Case("a text in UTF-16", "bad.txt", "Some text. ".encode("utf-16")),
    Case("a text in latin-1", "bad.txt", b"caf\xe9"),
    Case("a text with NUL", "bad.txt", b"a\0b"),
    Case("a gzip member without its end", "bad.jsonl.gz", gzip.compress(_MANY)[:-8], 200),
    Case("garbage behind a gzip member", "bad.jsonl.gz", gzip.compress(_MANY) + b"garbage", 200),
    Case("zeros behind a gzip member (good)", "bad.jsonl.gz", gzip.compress(_MANY) + bytes(512), 200),
    Case("two gzip members (good)", "bad.jsonl.gz", gzip.compress(ROW) + gzip.compress(ROW), 2),
    Case("a gzip member with a wrong checksum", "bad.jsonl.gz", gzip.compress(_MANY)[:-8] + bytes(8)),
    Case("a gzip file that is none", "bad.jsonl.gz", _MANY),
    Case("a gzip bomb", "bad.jsonl.gz", gzip.compress(bytes(100 * 2**20))),
    Case("zstd with a skippable frame between (good)", "bad.jsonl.zst", _FRAMES, 2),
    Case("half a zstd frame", "bad.jsonl.zst", zstandard.compress(_MANY)[:-3]),
    Case("a bzip2 file without its end", "bad.jsonl.bz2", bz2.compress(_MANY)[:-9], 200),
    Case("an xz file without its end", "bad.jsonl.xz", lzma.compress(_MANY)[:-9], 200),
    Case("a JSON array without its end", "bad.json", b'[{"text": "x"}, {"text": "y"'),
    Case("something behind a JSON array", "bad.json", b'[{"text": "x"}] more'),
    Case("CSV with a quote that is never closed", "bad.csv", b'id,text\n1,"never closed\n2,x\n'),
    Case("CSV with a row that is too short", "bad.csv", b"id,text\n1,x\n2\n"),
    Case("a Parquet file without its end", "bad.parquet", _TABLE[:-10]),
    Case("a Parquet file with a wrong footer", "bad.parquet", _TABLE[:-60] + bytes(52) + _TABLE[-8:]),
    Case("Parquet: null, empty, and bytes that are no UTF-8", "bad.parquet",
         table([b"good", None, b"", b"\xff"]), 1),
    Case("a table without a column of text", "bad.parquet", table([1, 2])),
    Case("an Arrow file that is cut", "bad.arrow", b"ARROW1\0\0" + bytes(20)),
    Case("a tar with members that lead out (never unpacked)", "bad.tar",
         tar({"../../up.text": b"one", "/top.text": b"two"}), 2),
    Case("a tar that is cut", "bad.tar", tar({"a.txt": b"x" * 2000})[:1500]),
    Case("a zip with a password", "bad.zip", encrypted()),
    Case("a zip with names that lead out", "bad.zip", zipped({"../up.txt": b"up", "in.txt": b"in"}), 1),
    Case("a zip that is cut", "bad.zip", zipped({"a.txt": b"x" * 2000})[:1000]),
    Case("a WET archive that is cut", "bad.warc", b"".join(_WARC)[:-6], 2),
    Case("a WET record with a wrong length", "bad.warc", _WARC[0] + warc(b"wrong", 2) + _WARC[2], 2),
    Case("junk between WET records", "bad.warc", _WARC[0] + b"junk\r\n" + _WARC[2], 2),
    Case("an image that is none", "bad.png", b"no image"),
    Case("a link in a circle", "bad.txt", loop),
    Case("a link that leads out", "bad.txt", outside),
    Case("a pipe", "bad.txt", os.mkfifo),
    Case("a hidden file", ".bad.txt", b"hidden"),
)  # fmt: skip


def outcome(case: Case, folder: Path) -> Outcome:
    """Ingest `case` in the empty `folder`."""
    with contextlib.chdir(folder):
        Path("src").mkdir()
        Path("src", "good.jsonl").write_bytes(GOOD)
        path = Path("src", case.name)
        path.write_bytes(case.make) if isinstance(case.make, bytes) else case.make(path)
        command = ["ingest", "src", "--to", "data", "--workers", "1", "--max-reject-ratio", "0.9", "--json"]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = call(cli, command, CliSession())
    said = json.loads(out.getvalue() or "{}") if code == 0 else {}
    message = (err.getvalue().strip().splitlines() or [""])[-1] if code else ""
    message = message.partition(" See: ")[0]  # the same for all of a code
    counts = [said.get(name, {}) for name in ("rejected", "skipped")]
    return Outcome(code, said.get("documents", 0), 2 + case.good, *counts, message.replace(f"{folder.resolve()}/", ""))


def outcomes() -> Iterator[tuple[Case, Outcome]]:
    """Yield each case and what became of it."""
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            yield case, outcome(case, Path(folder))


def page() -> str:
    """Return the page."""
    rows = [f"| {case.what} | `{case.name}` | {_cells(found)} |" for case, found in outcomes()]
    return "\n".join([*_HEAD, *rows, ""])


def _cells(found: Outcome) -> str:
    counts = [f"{count} `{name}`" for kind in (found.rejected, found.skipped) for name, count in kind.items()]
    told = re.sub(r"\|", "\\|", found.message) or ", ".join(counts)
    return f"{found.code} | {found.arrived} of {found.wanted} | {told}"


_HEAD = (
    "# Bad input",
    "",
    "Each of these files lay in a folder beside `good.jsonl`, which has two records, and was ingested with `--max-reject-ratio 0.9`: with",
    "the default, 0.001, more bad records than that end the ingest with exit code 3, and nothing is committed. This page is written by",
    "`python tools/bad_input.py`, which makes the files, and a test holds it against what happens.",
    "",
    "With exit code 0, every good record has arrived, also those in the bad file itself, and the others are counted: [rejected](howto/ingest.md#what-is-rejected), with",
    "source and byte offset kept, or left out. Where nobody can know which records a damaged file had, the ingest ends with one line that",
    "names it, and nothing is committed: repair it, or leave it out by `--exclude`.",
    "",
    "| file | name | exit | arrived | counted, or the line |",
    "|---|---|---|---|---|",
)


if __name__ == "__main__":
    now = page()
    if "--check" not in sys.argv:
        PAGE.write_text(now, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != now:
        sys.exit("docs/bad-input.md is not what happens: run python tools/bad_input.py")
