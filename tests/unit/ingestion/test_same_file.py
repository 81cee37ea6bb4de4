"""The column "ours" of docs/readers.md: what becomes of a file on which readers disagree."""

import bz2
import gzip
import lzma
import struct
from pathlib import Path
from typing import Any

import pytest
import zstandard

import datastore as ds
from datastore.errors import ConfigError, CorruptError
from datastore.ingestion.settings import IngestSettings

A, B = b'{"text": "a"}\n', b'{"text": "b"}\n'
ROWS = IngestSettings(take="rows")


def taken(folder: Path, name: str, raw: bytes) -> list[dict[str, Any]]:
    (folder / name).write_bytes(raw)
    ds.ingest(folder / name, folder / "set", settings=ROWS)
    found: list[dict[str, Any]] = ds.open(folder / "set").to_arrow().to_pylist()
    return found


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b'{"text": "one", "text": "two"}', {"text": "two"}),
        (b'{"n": 0.1234567890123456789, "text": ""}', {"n": 0.12345678901234568, "text": ""}),
        (b'{"n": 9223372036854775807, "text": ""}', {"n": 2**63 - 1, "text": ""}),
        (b'{"text": "2020-01-01T00:00:00Z"}', {"text": "2020-01-01T00:00:00Z"}),
        (b'\xef\xbb\xbf{"text": "a"}', {"text": "a"}),
        ('{"text": "a\u2028b"}'.encode(), {"text": "a\u2028b"}),
        (b'{"text": "a\\u0000b"}', {"text": "a\0b"}),
    ],
)
def test_lines_that_are_taken(tmp_path: Path, line: bytes, row: dict[str, Any]) -> None:
    assert taken(tmp_path, "x.jsonl", line + b"\n\n") == [row]


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"n": 9223372036854775808}', ConfigError),
        (b'{"n": 18446744073709551616}', ConfigError),
        (b'{"n": NaN}', CorruptError),
        (b'{"n": 1e400}', CorruptError),
        (b'{"text": "a\\ud800b"}', CorruptError),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: bytes, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"x\.jsonl"):
        taken(tmp_path, "x.jsonl", b'{"n": 1, "text": "a"}\n' + line + b"\n")


def test_a_number_beyond_63_bits_goes_into_a_column_that_has_room(tmp_path: Path) -> None:
    with ds.record_writer(tmp_path / "set", schema={"n": "uint64"}) as out:
        out.write([{"n": 1}])
    assert taken(tmp_path, "x.jsonl", b'{"n": 9223372036854775808}\n') == [{"n": 1}, {"n": 2**63}]


def frame(raw: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(raw)


SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"meta"

PACKED = {
    "members": ("x.jsonl.gz", gzip.compress(A) + gzip.compress(b"") + gzip.compress(B)),
    "zeros behind": ("x.jsonl.gz", gzip.compress(A + B) + bytes(512)),
    "frames": ("x.jsonl.zst", frame(A) + frame(b"") + frame(B)),
    "skippable first": ("x.jsonl.zst", SKIPPABLE + frame(A + B)),
    "skippable between": ("x.jsonl.zst", frame(A) + SKIPPABLE + frame(B)),
    "bz2 streams": ("x.jsonl.bz2", bz2.compress(A) + bz2.compress(B)),
    "xz streams": ("x.jsonl.xz", lzma.compress(A) + lzma.compress(B)),
    "xz padding": ("x.jsonl.xz", lzma.compress(A) + bytes(8) + lzma.compress(B)),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_files_are_read_to_their_end(tmp_path: Path, case: str) -> None:
    name, raw = PACKED[case]
    assert taken(tmp_path, name, raw) == [{"text": "a"}, {"text": "b"}]
