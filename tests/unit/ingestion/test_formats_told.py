"""A source is what its bytes say, whatever it is called; structured data is never raw text unless asked for."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import datastore as ds
from datastore.errors import ConfigError, CorruptError, MissingError
from datastore.formats.decompression import open_stream
from datastore.ingestion.reading.cutting import split_array
from datastore.ingestion.reading.listing import split_glob
from datastore.ingestion.reading.sources import list_sources
from datastore.ingestion.report import IngestReport
from datastore.ingestion.settings import IngestSettings
from datastore.storage.backends.memory import MemoryStorage

ROWS = [{"id": f"d{i}", "text": f'número {i}\n"quoted", and more', "n": i} for i in range(50)]
TABLE = pa.Table.from_pylist(ROWS)
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def made_by(write: Callable[[Any], None]) -> bytes:
    out = io.BytesIO()
    write(out)
    return out.getvalue()


def stream_of(table: pa.Table) -> bytes:
    def write(out: Any) -> None:
        with pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)

    return made_by(write)


def delimited(delimiter: str) -> bytes:
    options = pyarrow.csv.WriteOptions(delimiter=delimiter)
    return made_by(lambda out: pyarrow.csv.write_csv(TABLE, out, options))


FILES: dict[str, bytes] = {
    "lines.json": LINES,
    "lines": LINES,
    "lines.txt": LINES,
    "bom.json": b"\xef\xbb\xbf" + LINES,
    "c4.json.gz": gzip.compress(LINES),
    "no-suffix-gz": gzip.compress(LINES),
    "lines.json.zst": zstandard.compress(LINES),
    "lines.json.bz2": bz2.compress(LINES),
    "lines.json.xz": lzma.compress(LINES),
    "array.json": json.dumps(ROWS).encode(),
    "pretty.json": json.dumps(ROWS, indent=2).encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv": delimited(","),
    "semicolons.csv": delimited(";"),
    "a.tsv": delimited("\t"),
    "a.csv.gz": gzip.compress(delimited(",")),
    "a.tsv.zst": zstandard.compress(delimited("\t")),
    "a.parquet": made_by(lambda out: pq.write_table(TABLE, out)),
    "parquet-without-suffix": made_by(lambda out: pq.write_table(TABLE, out)),
    "a.feather": made_by(lambda out: pyarrow.feather.write_feather(TABLE, out)),
    "stream.arrow": stream_of(TABLE),
    "arrow-without-suffix": stream_of(TABLE),
}


def ingested(source: Any, to: Path, **settings: Any) -> IngestReport:
    return ds.ingest(source, str(to), settings=IngestSettings(workers=1, **settings))


def texts_of(to: Path) -> list[str]:
    return [row["text"] for row in ds.open(to).iter_records()]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("alone", [True, False], ids=["file", "in a folder"])
def test_each_text_arrives_and_a_second_ingest_adds_nothing(tmp_path: Path, name: str, *, alone: bool) -> None:
    source = tmp_path / "src" / name
    source.parent.mkdir()
    source.write_bytes(FILES[name])
    for added in (True, False):
        report = ingested(source if alone else source.parent, tmp_path / "set")
        assert (report.added, report.skipped) == (added, {})
    assert texts_of(tmp_path / "set") == TEXTS


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("a.csv") and not name.endswith("csv")])
def test_rows_arrive_with_all_their_columns(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    ingested(tmp_path / name, tmp_path / "set", take="rows")
    found = [row | {"n": int(row["n"])} for row in ds.open(tmp_path / "set").iter_records()]
    assert found == ROWS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("package.json", b'{"name": "x", "version": 1}\n'),
        ("settings.json", b'{\n  "a": 1\n}\n'),
        ("numbers.json", b"[1, 2, 3]\n"),
        ("log", b"{}\nnot json\nnor this\n"),
        ("braces.c", b"{}\n{}\n"),
        ("index.json", b'{"shards": 3}'),
    ],
)
def test_a_json_document_and_code_stay_text(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / name).write_bytes(content)
    ingested(tmp_path / "src", tmp_path / "set")
    assert texts_of(tmp_path / "set") == [content.decode()]


@pytest.mark.parametrize("name", ["lines.json", "array.json", "a.csv", "a.tsv"])
def test_raw_text_is_taken_if_asked_for(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    ingested(tmp_path / name, tmp_path / "set", format="text")
    assert texts_of(tmp_path / "set") == [FILES[name].decode()]


def test_lines_of_text_are_documents_without_their_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n  two \n{}\nthree")
    ingested(tmp_path / "a.txt", tmp_path / "set", format="lines")
    assert texts_of(tmp_path / "set") == ["one", "  two ", "{}", "three"]
    assert [row["offset"] for row in ds.open(tmp_path / "set").iter_records()] == [3, 9, 16, 19]


def test_cut_lines_are_the_same_as_whole_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"".join(b"line %d\n" % number for number in range(2000)))
    ingested(tmp_path / "a.txt", tmp_path / "set", format="lines", task_bytes=1024)
    assert texts_of(tmp_path / "set") == [f"line {number}" for number in range(2000)]


def test_tables_without_text_among_texts_are_left_out_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "notes.md").write_text("notes")
    (tmp_path / "src" / "a.csv").write_bytes(FILES["a.csv"])
    (tmp_path / "src" / "numbers.csv").write_text("x,y\n1,2\n")
    report = ingested(tmp_path / "src", tmp_path / "set")
    assert (report.documents, report.skipped) == (51, {"no_text_column": 1})
    assert "src/numbers.csv" in caplog.text


@pytest.mark.parametrize("kind", ["hf", "mds", "litdata", "webdataset", "parquet", "jsonl"])
def test_the_folders_of_other_libraries_are_known(tmp_path: Path, kind: Any) -> None:
    with ds.record_writer(str(tmp_path / "rows"), schema=TABLE.schema) as out:
        out.write(TABLE)
    columns = ["text"] if kind == "webdataset" else None
    ds.export_dataset(ds.open(tmp_path / "rows"), str(tmp_path / "src" / "deep"), format=kind, columns=columns)
    for name, folder in {"whole": tmp_path / "src" / "deep", "deep": tmp_path / "src"}.items():
        for added in (True, False):
            report = ingested(folder, tmp_path / name)
            assert (report.documents if added else 50, report.added, report.skipped) == (50, added, {})
        assert texts_of(tmp_path / name) == TEXTS


def test_megatron_is_known_by_its_index(tmp_path: Path) -> None:
    with ds.token_writer(str(tmp_path / "tokens"), vocab_size=10) as out:
        out.write([1, 2, 3], id="a")
        out.write([4, 5], id="b")
    ds.export_dataset(ds.open(tmp_path / "tokens"), str(tmp_path / "src"), format="megatron")
    (tmp_path / "src" / "other.bin").write_bytes(b"\0")
    report = ingested(tmp_path / "src", tmp_path / "set")
    assert (report.kind, report.documents, report.tokens, report.skipped) == ("tokens", 2, 5, {"binary": 1})
    assert ingested(next((tmp_path / "src").glob("*.idx")), tmp_path / "one").tokens == 5


def test_what_lies_beside_a_dataset_of_another_library_is_counted(tmp_path: Path) -> None:
    with ds.record_writer(str(tmp_path / "rows"), schema=TABLE.schema) as out:
        out.write(TABLE)
    ds.export_dataset(ds.open(tmp_path / "rows"), str(tmp_path / "src"), format="mds")
    (tmp_path / "src" / "README.md").write_text("read me")
    assert ingested(tmp_path / "src", tmp_path / "set").skipped == {"beside_dataset": 1}


def test_bad_elements_of_an_array_are_set_aside_and_the_others_arrive(tmp_path: Path) -> None:
    elements = [
        '{"text": "one"}',
        '{"body": "x"}',
        "3",
        '{"text": "two"}',
        '{"text": null}',
        '{"text": "' + "x" * 200 + '"}',
    ]
    (tmp_path / "a.json").write_text(f"[{', '.join(elements)}]")
    report = ingested(tmp_path / "a.json", tmp_path / "set", max_reject_ratio=1.0, max_document_bytes=100)
    assert report.rejected == {"invalid_json": 1, "missing_text": 1, "null_text": 1, "too_long": 1}
    assert texts_of(tmp_path / "set") == ["one", "two"]


def test_a_quote_that_is_never_closed_is_no_value_of_all_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"open\n2\tb\n3\tc\n')
    with pytest.raises(CorruptError, match="a quote is opened and never closed"):
        ingested(tmp_path / "a.tsv", tmp_path / "set")
    (tmp_path / "b.tsv").write_text('id\ttext\n1\tsay "hi"\n2\t5" wide\n')
    ingested(tmp_path / "b.tsv", tmp_path / "set")
    assert texts_of(tmp_path / "set") == ['say "hi"', '5" wide']


@pytest.mark.parametrize("name", ["a.csv.gz", "a.tsv.zst"])
def test_a_compressed_table_that_is_cut_is_damaged(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name][:-5])
    with pytest.raises(CorruptError, match="the file is damaged"):
        ingested(tmp_path / name, tmp_path / "set")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\,]}[{é\n')),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.sampled_from('"],')), inner, max_size=3),
)


def split(raw: bytes, size: int) -> list[tuple[int, bytes]]:
    chunks = [raw[at : at + size] for at in range(0, len(raw), size)]
    stream = open_stream(chunks, codec="", max_expansion=1)
    return [(piece.offset, piece.data) for piece in split_array(stream, limit_bytes=2**20, where="a")]


@given(st.lists(VALUES, max_size=5), st.integers(1, 30), st.sampled_from([None, 1]), st.data())
def test_an_array_is_cut_into_its_elements_whatever_the_chunks(
    elements: list[Any], size: int, indent: int | None, data: st.DataObject
) -> None:
    raw = json.dumps(elements, indent=indent).encode()
    found = split(raw, size)
    assert [json.loads(element) for _, element in found] == elements
    assert all(raw[offset:].startswith(element) for offset, element in found)
    with pytest.raises(CorruptError, match="the JSON array is damaged"):
        split(raw[: data.draw(st.integers(0, len(raw) - 1))], size)
    with pytest.raises(CorruptError, match="the JSON array is damaged"):
        split(raw + b" []", size)


def test_rows_of_a_program_are_a_source(tmp_path: Path) -> None:
    for added in (True, False):
        assert ingested((row for row in ROWS), tmp_path / "set").added == added
    assert texts_of(tmp_path / "set") == TEXTS
    assert ingested([*ROWS, {"text": "more"}], tmp_path / "set", max_reject_ratio=1.0).documents == 51


@pytest.mark.parametrize(
    "value", [float("nan"), [1.0, float("inf")], {"deep": float("nan")}, b"bytes", 2**70, "\ud800"]
)
def test_a_row_that_json_would_change_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"cannot be taken over as it is.*row=1"):
        ingested([{"text": "a"}, {"text": "b", "x": value}], tmp_path / "set")
    with pytest.raises(ConfigError, match=r"a row is no dict.*row=1"):
        ingested([{"text": "a"}, "b"], tmp_path / "set")


def test_a_single_name_and_a_path_are_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    assert ingested(str(tmp_path / "a.txt"), tmp_path / "set").documents == 1
    assert not ingested(tmp_path / "a.txt", tmp_path / "set").added


def test_the_standard_input_is_a_source(tmp_path: Path) -> None:
    for said in ("added", "nothing new"):
        command = [sys.executable, "-m", "datastore", "ingest", "-", "--to", str(tmp_path / "set"), "--workers", "1"]
        done = subprocess.run(command, input=LINES, capture_output=True, check=True, timeout=120)
        assert said in done.stdout.decode()
    assert texts_of(tmp_path / "set") == TEXTS


def test_a_glob_takes_what_matches_and_folders_whole(tmp_path: Path) -> None:
    for name in ("en/a-1.txt", "en/a-2.txt", "en/b.txt", "de/a-1.txt", "de/deep/c.txt"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    storage = MemoryStorage("globbed")
    for path in (tmp_path / "src").rglob("*.txt"):
        storage.put(str(path.relative_to(tmp_path / "src")), path.read_bytes())

    def listed(glob: str) -> list[str]:
        both = [
            [file.path.partition("/")[2] for file in list_sources([f"{root}/{glob}"], IngestSettings())[0].files]
            for root in (tmp_path / "src", "memory://globbed")
        ]
        assert both[0] == both[1]
        return both[0]

    assert listed("*/a-1*") == ["de/a-1.txt", "en/a-1.txt"]
    assert listed("e?/a-[!1]*") == ["en/a-2.txt"]
    assert listed("**/c*") == ["de/deep/c.txt"]
    assert listed("d*") == ["de/a-1.txt", "de/deep/c.txt"]
    assert split_glob("https://host/a?b=*") == ("https://host/a?b=*", None)
    with pytest.raises((MissingError, ConfigError), match="source"):
        list_sources([str(tmp_path / "nowhere" / "*.txt")], IngestSettings())
    (tmp_path / "src" / "odd[1].txt").write_text("odd")
    assert len(list_sources([str(tmp_path / "src" / "odd[1].txt")], IngestSettings())[0].files) == 1
