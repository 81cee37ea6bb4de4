"""Rows taken over with all their columns, above all those of JSON lines, which say no types."""

import bz2
import gzip
import itertools
import lzma
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

import datastore as ds
from datastore.errors import ConfigError, CorruptError, DatastoreError
from datastore.ingestion.estimate import estimate
from datastore.ingestion.settings import IngestSettings, Take
from datastore.interop.formats import FORMATS

LINES = b'{"a": 1, "b": "x", "c": [1.5, 2], "d": {"e": true}}\n\n{"b": "y", "a": null, "c": [], "d": {"e": false}}\n{"a": 3}'
ROWS = [
    {"a": 1, "b": "x", "c": [1.5, 2.0], "d": {"e": True}},
    {"a": None, "b": "y", "c": [], "d": {"e": False}},
    {"a": 3, "b": None, "c": None, "d": None},
]


def ingest(source: Path, to: Path, **settings: Any) -> ds.Dataset:
    ds.ingest([str(source)], str(to), settings=IngestSettings(workers=1, **settings))
    return ds.open(to)


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "jsonl.bz2", "jsonl.xz"])
def test_the_rows_of_json_lines_become_records(tmp_path: Path, suffix: str) -> None:
    packed = {
        "jsonl.bz2": bz2.compress(LINES),
        "jsonl.xz": lzma.compress(LINES),
        "jsonl": LINES,
        "jsonl.gz": gzip.compress(LINES),
        "jsonl.zst": zstandard.compress(LINES),
    }[suffix]
    (tmp_path / f"x.{suffix}").write_bytes(packed)
    dataset = ingest(tmp_path / f"x.{suffix}", tmp_path / "data", take="rows")
    assert list(dataset.iter_records()) == ROWS
    assert [str(field.type) for field in dataset.schema][:2] == ["int64", "string"]


def test_a_file_in_many_parts_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"n": n, "text": "word " * (n % 7)} for n in range(2000)]
    (tmp_path / "src").mkdir()
    lines = "".join(f'{{"n": {row["n"]}, "text": "{row["text"]}"}}\n' for row in rows)
    (tmp_path / "src/x.jsonl").write_text(lines)
    dataset = ingest(tmp_path / "src", tmp_path / "data", take="rows", task_bytes=2048)
    assert len(dataset.segments) > 5
    assert list(dataset.iter_records()) == rows


def test_a_dataset_that_is_there_says_which_types_its_columns_have(tmp_path: Path) -> None:
    with ds.record_writer(tmp_path / "data", schema=pa.schema([("a", pa.int32()), ("b", pa.string())])):
        pass
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"b": "z"}\n')
    dataset = ingest(tmp_path / "x.jsonl", tmp_path / "data", take="rows")
    assert list(dataset.iter_records()) == [{"a": 1, "b": None}, {"a": None, "b": "z"}]
    assert dataset.schema.field("a").type == pa.int32()


@pytest.mark.parametrize(
    ("line", "error", "reason"),
    [
        (b'{"a": 1, "new": 2}', ConfigError, "no column is called 'new'"),
        (b'{"a": "one"}', ConfigError, "does not fit the columns"),
        (b'{"a": 1.5}', ConfigError, "does not fit the columns"),
        (b'{"a": 18446744073709551616}', ConfigError, "does not fit the columns"),
        (b'{"d": {"e": true, "f": 1}}', ConfigError, r"would not read back.*\['e', 'f'\]"),
        (b'{"c": [true]}', ConfigError, r"would not read back.*value True"),
        (b'{"a": ', CorruptError, "not JSON"),
        (b'{"a": NaN}', CorruptError, "not JSON"),
        (b"[1]", ConfigError, "no JSON object"),
    ],
)
def test_a_line_that_does_not_fit_ends_it_and_is_named(
    tmp_path: Path, line: bytes, error: type[DatastoreError], reason: str
) -> None:
    ingest_first = tmp_path / "first.jsonl"
    ingest_first.write_bytes(LINES)
    ingest(ingest_first, tmp_path / "data", take="rows")
    (tmp_path / "x.jsonl").write_bytes(LINES + b"\n" + line + b"\n")
    with pytest.raises(error, match=reason) as found:
        ingest(tmp_path / "x.jsonl", tmp_path / "data", take="rows")
    assert found.value.values["file"] == "x.jsonl"
    assert found.value.values["offset"] == len(LINES) + 1
    assert ds.open(tmp_path / "data").version == 1


def test_a_column_of_several_types_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": "x"}\n')
    with pytest.raises(ConfigError, match=r"values of several types.*column='a'"):
        ingest(tmp_path / "x.jsonl", tmp_path / "data", take="rows")


def test_token_ids_of_json_lines_are_taken_over(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"tokens": [1, 2, 3], "note": "x"}\n{"tokens": [4]}\n')
    dataset = ingest(tmp_path / "x.jsonl", tmp_path / "data", take="tokens", task_bytes=1024)
    assert [row["tokens"] for row in dataset.rows(0).to_pylist()] == [[1, 2, 3], [4]]
    assert [row["id"] for row in dataset.rows(0).to_pylist()] == ["x.jsonl#0", "x.jsonl#1"]


def test_lines_that_were_taken_as_text_can_be_taken_as_rows_too(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n')
    ingest(tmp_path / "x.jsonl", tmp_path / "text")
    assert ingest(tmp_path / "x.jsonl", tmp_path / "rows", take="rows").totals.documents == 1


def sources(folder: Path) -> dict[str, Path]:
    """Return a source of each kind: tables, JSON lines, text."""
    table = pa.table({"text": ["one", "two"], "tokens": pa.array([[1, 2], [3]], pa.list_(pa.int64()))})
    (folder / "text").mkdir()
    (folder / "text/a.txt").write_text("one")
    (folder / "jsonl").mkdir()
    (folder / "jsonl/a.jsonl").write_text('{"text": "one", "tokens": [1, 2]}\n')
    (folder / "base").mkdir()
    pq.write_table(table, folder / "base/a.parquet")
    made = ingest(folder / "base", folder / "rows", format="parquet", take="rows")
    tokens = ingest(folder / "base", folder / "ids", format="parquet", take="tokens")
    for kind in FORMATS:
        if kind == "megatron":
            ds.export_dataset(tokens, str(folder / kind), format=kind)
        elif kind in {"csv", "tsv"}:
            (folder / kind).mkdir()
            (folder / kind / f"a.{kind}").write_text("text,b\none,two\n".replace(",", "," if kind == "csv" else "\t"))
        elif kind == "arrow":
            (folder / "arrow").mkdir()
            pyarrow.feather.write_feather(table, folder / "arrow/a.arrow")
        else:
            columns = ["text"] if kind in {"mds", "litdata", "webdataset"} else None
            ds.export_dataset(made, str(folder / kind), format=kind, columns=columns)
    return {name: folder / name for name in ("text", "jsonl", *FORMATS)}


def test_every_kind_of_source_can_be_taken_in_every_way_or_is_refused_in_words(tmp_path: Path) -> None:
    taken, hints = set(), []
    takes = [take for take in get_args(Take) if take not in {"chats", "pairs"}]
    for (name, source), take in itertools.product(sources(tmp_path).items(), takes):
        settings = IngestSettings(take=take, format="" if name in {"text", "jsonl"} else name, workers=1)
        to = tmp_path / f"{name}-as-{take}"
        try:
            expected = estimate([str(source)], str(to), settings=settings)
            ds.ingest([str(source)], str(to), settings=settings)
        except ConfigError as error:
            hints.append(error.hint)
        else:
            assert (expected.documents > 0) == (ds.open(to).totals.documents > 0)
            taken.add((name, take))
    assert all(hints)
    assert {("jsonl", take) for take in takes} <= taken
    assert {(name, "rows") for name in FORMATS if name != "megatron"} <= taken
    assert {(name, "auto") for name in (*FORMATS, "jsonl", "text")} <= taken
    assert ("text", "rows") not in taken
