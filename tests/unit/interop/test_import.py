"""An import is an ingest: planned, in tasks, resumable, one commit. And what comes from strangers is not trusted."""

import csv
import io
import json
import struct
import tarfile
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from datastore.dataset.journal import Journal
from datastore.dataset.operations.evolve import evolve
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, ConflictError, CorruptError, DatastoreError
from datastore.formats.schema import without_views
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.importing import import_dataset
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.interop.delimited import CSV
from datastore.interop.export import export
from datastore.interop.formats import FORMATS
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_dataset

SMALL = IngestSettings(workers=1, task_bytes=1024, shard_bytes=1024)


def tokens_of(dataset: Dataset) -> list[list[int]]:
    found: list[list[int]] = dataset.to_arrow(tokens=True)["tokens"].to_pylist()
    return found


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "set", [[30, 1, 500], [400, 41], [300], [200] * 5])


@pytest.fixture
def megatron(tmp_path: Path, dataset: Dataset) -> Path:
    export(dataset, str(tmp_path / "megatron"), format="megatron")
    return tmp_path / "megatron"


def files(folder: Path) -> dict[str, bytes]:
    """Return the data of the dataset in `folder` by path."""
    paths = [path for kind in ("shards", "docs") for path in (folder / kind).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path, megatron: Path) -> None:
    for workers in (1, 2):
        settings = IngestSettings(workers=workers, task_bytes=1024, shard_bytes=1024)
        import_dataset(str(megatron), str(tmp_path / f"w{workers}"), format="megatron", settings=settings)
    assert files(tmp_path / "w1") == files(tmp_path / "w2")
    assert len(files(tmp_path / "w1")) > 6


def test_an_interrupted_import_goes_on(
    tmp_path: Path, megatron: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, finished = Journal.finish, []

    def interrupted(self: Journal, *arguments: Any, **options: Any) -> Any:
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(1)
        return original(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            import_dataset(str(megatron), str(tmp_path / "new"), format="megatron", settings=SMALL)
    report = import_dataset(str(megatron), str(tmp_path / "new"), format="megatron", settings=SMALL)
    assert (report.tasks_resumed, report.version) == (2, 1)
    assert tokens_of(open_dataset(tmp_path / "new")) == tokens_of(dataset)
    again = import_dataset(str(megatron), str(tmp_path / "new"), format="megatron", settings=SMALL)
    assert (again.added, again.version) == (False, 1)


def test_a_source_that_grew_adds_its_new_files(tmp_path: Path) -> None:
    (tmp_path / "pq").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "pq" / "a.parquet")
    import_dataset(str(tmp_path / "pq"), str(tmp_path / "set"), format="parquet", settings=SMALL)
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "pq" / "b.parquet")
    report = import_dataset(str(tmp_path / "pq"), str(tmp_path / "set"), format="parquet", settings=SMALL)
    assert (report.documents, report.known_files, report.version) == (1, 1, 2)
    assert [row["text"] for row in open_dataset(tmp_path / "set").iter_records()] == ["a", "b"]


def test_a_file_of_another_schema_ends_it(tmp_path: Path) -> None:
    (tmp_path / "pq").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "pq" / "a.parquet")
    pq.write_table(pa.table({"label": [1]}), tmp_path / "pq" / "b.parquet")
    with pytest.raises(ConfigError, match=r"do not fit the schema.*b\.parquet"):
        import_dataset(str(tmp_path / "pq"), str(tmp_path / "set"), format="parquet", settings=SMALL)


def test_rows_of_other_columns_than_the_dataset_are_refused_before_they_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"label": [1]}), tmp_path / "b.parquet")
    import_dataset(str(tmp_path / "a.parquet"), str(tmp_path / "set"), format="parquet", settings=SMALL)
    with pytest.raises(ConfigError, match="rows do not fit the schema"):
        import_dataset(str(tmp_path / "b.parquet"), str(tmp_path / "set"), format="parquet", settings=SMALL)
    with pytest.raises(ConfigError, match="another schema than texts"):
        ingest([str(tmp_path / "a.parquet")], str(tmp_path / "set"))
    assert len(list((tmp_path / "set" / "ingests").iterdir())) == 1


@pytest.mark.parametrize("order", [("plain", "view"), ("view", "plain"), ("view",)])
def test_a_writer_s_views_are_read_as_what_the_file_holds(tmp_path: Path, order: tuple[str, ...]) -> None:
    plain = pa.table({"s": ["a", None], "b": [b"a", None]})
    view = plain.cast(pa.schema([("s", pa.string_view()), ("b", pa.binary_view())]))
    (tmp_path / "source").mkdir()
    for number, kind in enumerate(order):
        pq.write_table({"plain": plain, "view": view}[kind], tmp_path / "source" / f"{number}.parquet")
    import_dataset(str(tmp_path / "source"), str(tmp_path / "new"), format="parquet", settings=SMALL)
    found = open_dataset(tmp_path / "new").to_arrow()
    assert found.schema == plain.schema
    assert found.to_pylist() == plain.to_pylist() * len(order)


def test_views_are_plain_at_any_depth() -> None:
    def schema(text: pa.DataType, data: pa.DataType, one: Any, many: Any) -> pa.Schema:
        inner = pa.struct([pa.field("x", text, nullable=False), ("y", one(data))])
        return pa.schema([("m", pa.map_(pa.string(), text)), ("l", many(inner)), ("f", pa.list_(inner, 2))])

    views = schema(pa.string_view(), pa.binary_view(), pa.list_view, pa.large_list_view)
    assert without_views(views) == schema(pa.string(), pa.binary(), pa.list_, pa.large_list)


def test_rows_go_into_a_dataset_whose_schema_has_changed(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    import_dataset(str(tmp_path / "a.parquet"), str(tmp_path / "set"), format="parquet", settings=SMALL)
    evolve(str(tmp_path / "set"), rename={"n": "number"})
    pq.write_table(pa.table({"text": ["b"], "number": [2]}), tmp_path / "b.parquet")
    import_dataset(str(tmp_path / "b.parquet"), str(tmp_path / "set"), format="parquet", settings=SMALL)
    dataset = open_dataset(tmp_path / "set")
    assert list(dataset.iter_records()) == [{"text": "a", "number": 1}, {"text": "b", "number": 2}]
    assert dataset.sql("SELECT sum(number)::BIGINT AS n FROM records").to_pylist() == [{"n": 3}]


def test_a_source_that_changes_meanwhile_is_noticed(
    tmp_path: Path, megatron: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datastore.ingestion.sinks.documents import CopiedTokens

    original = CopiedTokens.add

    def touched(self: CopiedTokens, *arguments: Any, **options: Any) -> None:
        (megatron / "tokens_00000.bin").touch()
        original(self, *arguments, **options)

    monkeypatch.setattr(CopiedTokens, "add", touched)
    with pytest.raises(ConflictError, match="a source file changed"):
        import_dataset(str(megatron), str(tmp_path / "new"), format="megatron", settings=SMALL)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "some.txt").write_text("hello world, hello words " * 20)
    raw = train_tokenizer([str(tmp_path / "some.txt")], settings=TokenizerSettings(vocab_size=300))
    (tmp_path / "tok.json").write_bytes(raw)
    return tmp_path / "tok.json"


class TestTokenizer:
    def test_it_is_noted_for_tokens_that_it_made(self, tmp_path: Path, tokenizer: Path) -> None:
        pq.write_table(pa.table({"input_ids": [[1, 2, 0], [5, 0]]}), tmp_path / "a.parquet")
        settings = IngestSettings(tokenizer=str(tokenizer))
        import_dataset(str(tmp_path / "a.parquet"), str(tmp_path / "set"), format="parquet", settings=settings)
        dataset = open_dataset(tmp_path / "set")
        assert tokens_of(dataset) == [[1, 2, 0], [5, 0]]
        assert dataset.tokenizer() == tokenizer.read_bytes()

    def test_ids_past_its_vocabulary_are_refused(self, tmp_path: Path, tokenizer: Path) -> None:
        pq.write_table(pa.table({"tokens": [[1, 9999]]}), tmp_path / "a.parquet")
        settings = IngestSettings(tokenizer=str(tokenizer))
        with pytest.raises(ConfigError, match=r"past the vocabulary.*largest=9999"):
            import_dataset(str(tmp_path / "a.parquet"), str(tmp_path / "set"), format="parquet", settings=settings)

    def test_it_encodes_text(self, tmp_path: Path, tokenizer: Path) -> None:
        rows = {"text": ["hello", None, "world"], "id": ["a", "b", "c"], "label": [1, 2, 3]}
        pq.write_table(pa.table(rows), tmp_path / "a.parquet")
        settings = IngestSettings(tokenizer=str(tokenizer), max_reject_ratio=0.5)
        report = import_dataset(str(tmp_path / "a.parquet"), str(tmp_path / "set"), format="parquet", settings=settings)
        dataset = open_dataset(tmp_path / "set")
        decoder: Any = Tokenizer.from_str(tokenizer.read_text())
        assert [decoder.decode(ids) for ids in tokens_of(dataset)] == ["hello", "world"]
        assert dataset.to_arrow()["id"].to_pylist() == ["a", "c"]
        assert dataset.to_arrow()["offset"].to_pylist() == [0, 2]
        assert report.rejected == {"null_text": 1}

    def test_without_it_tokens_and_text_do_not_mix(self, tmp_path: Path, megatron: Path) -> None:
        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
        import_dataset(str(tmp_path / "a.parquet"), str(tmp_path / "new"), format="parquet")
        with pytest.raises(ConfigError, match="the dataset holds records, not tokens"):
            import_dataset(str(megatron), str(tmp_path / "new"), format="megatron")


class TestTextOfTables:
    @pytest.mark.parametrize("name", ["a.parquet", "folder"])
    def test_ingest_reads_parquet(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "folder").mkdir()
        rows = pa.table({"body": ["one", "two"], "n": [1, 2]})
        pq.write_table(rows, tmp_path / ("a.parquet" if name == "a.parquet" else "folder/a.parquet"))
        settings = IngestSettings(text_key="body", format="parquet" if name == "folder" else "")
        ingest([str(tmp_path / name)], str(tmp_path / "set"), settings=settings)
        found = list(open_dataset(tmp_path / "set").iter_records())
        source = "a.parquet" if name == "a.parquet" else "folder/a.parquet"
        assert found == [
            {"id": f"{source}#{n}", "source": source, "offset": n, "text": text}
            for n, text in enumerate(["one", "two"])
        ]

    def test_ingest_reads_csv(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text('id,text\n7,"two\nlines, quoted ""so"""\n8,plain\n', encoding="utf-8")
        ingest([str(tmp_path / "a.csv")], str(tmp_path / "set"), settings=IngestSettings(format="csv"))
        found = [(row["id"], row["text"]) for row in open_dataset(tmp_path / "set").iter_records()]
        assert found == [("7", 'two\nlines, quoted "so"'), ("8", "plain")]

    def test_a_column_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"body": ["one"]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=r"no such column of text.*columns=\['body'\]"):
            ingest([str(tmp_path / "a.parquet")], str(tmp_path / "set"), settings=IngestSettings(take="text"))

    def test_bad_texts_are_set_aside(self, tmp_path: Path) -> None:
        texts = [b"fine", b"\xff", b"", b"n\0l", None, b"x" * 101]
        pq.write_table(pa.table({"text": pa.array(texts, pa.binary())}), tmp_path / "a.parquet")
        settings = IngestSettings(max_reject_ratio=1.0, max_document_bytes=100)
        report = ingest([str(tmp_path / "a.parquet")], str(tmp_path / "set"), settings=settings)
        expected = ["empty_text", "invalid_utf8", "nul", "null_text", "too_long"]
        assert (report.documents, report.rejected) == (1, dict.fromkeys(expected, 1))


def write(folder: Path, contents: dict[str, bytes]) -> str:
    for name, raw in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return str(folder)


def refused(source: str, kind: Any, tmp_path: Path, *, error: type[DatastoreError], match: str) -> None:
    with pytest.raises(error, match=match):
        import_dataset(source, str(tmp_path / "new"), format=kind, settings=SMALL)
    assert not (tmp_path / "new" / "_log").exists()


def mds_index(name: str, encoding: str = "str", **more: Any) -> bytes:
    facts = {"column_names": ["a"], "column_encodings": [encoding], "column_sizes": [None], "samples": 1, **more}
    raw = {"basename": name, "bytes": 1, "hashes": {}}
    return json.dumps({"version": 2, "shards": [{**facts, "raw_data": raw, "zip_data": None}]}).encode()


def mds_shard(encoding: str, sample: bytes) -> bytes:
    header = json.dumps({"column_names": ["a"], "column_encodings": [encoding], "column_sizes": [None]}).encode()
    start = 12 + len(header)
    return struct.pack("<III", 1, start, start + len(sample)) + header + sample


LITDATA = {"data_format": ["str"], "data_spec": '[1, {"type": null, "context": null, "children_spec": []}]'}


def litdata_index(**config: Any) -> bytes:
    chunks = [{"filename": config.pop("filename", "c.bin"), "chunk_size": 1, "chunk_bytes": 100, "dim": None}]
    return json.dumps({"chunks": chunks, "config": {"compression": None, **LITDATA, **config}}).encode()


class TestStrangers:
    @pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../x", "", "a\\b"])
    @pytest.mark.parametrize("kind", ["mds", "litdata", "hf"])
    def test_an_index_cannot_lead_out_of_its_folder(self, tmp_path: Path, kind: str, name: str) -> None:
        made: dict[str, dict[str, bytes]] = {
            "mds": {"index.json": mds_index(name)},
            "litdata": {"index.json": litdata_index(filename=name)},
            "hf": {"state.json": json.dumps({"_data_files": [{"filename": name}]}).encode()},
        }
        source = write(tmp_path / "source", made[kind])
        refused(source, kind, tmp_path, error=CorruptError, match="outside of its folder|has no name")

    @pytest.mark.parametrize("name", ["a.pkl", "a.pth", "a.pickle"])
    def test_pickles_in_a_tar_are_not_read(self, tmp_path: Path, name: str) -> None:
        source = write(tmp_path / "source", {"a.tar": tar({name: b"cos\nsystem\n"})})
        refused(source, "webdataset", tmp_path, error=ConfigError, match="a column of pickles is not read")

    def test_pickles_in_mds_are_not_read(self, tmp_path: Path) -> None:
        shard = mds_shard("pkl", struct.pack("<I", 1) + b"x")
        source = write(tmp_path / "source", {"index.json": mds_index("s.mds"), "s.mds": shard})
        refused(source, "mds", tmp_path, error=ConfigError, match="a column of pickles is not read.*run the code")

    @pytest.mark.parametrize("leaf", ["pickle", "graph:pickle"])
    def test_pickles_in_litdata_are_not_read(self, tmp_path: Path, leaf: str) -> None:
        chunk = struct.pack("<III", 1, 12, 13) + b"x"
        source = write(tmp_path / "source", {"index.json": litdata_index(data_format=[leaf]), "c.bin": chunk})
        refused(source, "litdata", tmp_path, error=ConfigError, match="a column of pickles is not read")

    def test_pickled_and_shaped_arrays_stay_bytes(self, tmp_path: Path) -> None:
        out = io.BytesIO()
        np.lib.format.write_array(out, np.array([object()]), allow_pickle=True)
        shaped = io.BytesIO()
        np.lib.format.write_array(shaped, np.ones((2, 2)))
        source = write(tmp_path / "source", {"a.tar": tar({"a.o.npy": out.getvalue(), "a.s.npy": shaped.getvalue()})})
        import_dataset(source, str(tmp_path / "new"), format="webdataset", settings=SMALL)
        rows = list(open_dataset(tmp_path / "new").iter_records())
        assert rows == [{"__key__": "a", "o": out.getvalue(), "s": shaped.getvalue()}]

    def test_a_name_in_a_tar_leads_nowhere(self, tmp_path: Path) -> None:
        source = write(tmp_path / "source", {"a.tar": tar({"../../evil.txt": b"boo", "/abs.txt": b"bar"})})
        import_dataset(source, str(tmp_path / "new"), format="webdataset", settings=SMALL)
        assert [row["txt"] for row in open_dataset(tmp_path / "new").iter_records()] == ["boo", "bar"]
        assert not list(tmp_path.parent.glob("evil*"))

    @pytest.mark.parametrize("suffix", ["jpg", "JPG"])
    def test_a_member_that_comes_twice_begins_a_sample(self, tmp_path: Path, suffix: str) -> None:
        raw = io.BytesIO()
        with tarfile.open(fileobj=raw, mode="w") as out:
            for data in (b"one", b"two"):
                member = tarfile.TarInfo(f"x.{suffix}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
        source = write(tmp_path / "source", {"a.tar": raw.getvalue()})
        import_dataset(source, str(tmp_path / "new"), format="webdataset", settings=SMALL)
        assert [row["jpg"] for row in open_dataset(tmp_path / "new").iter_records()] == [b"one", b"two"]

    @pytest.mark.parametrize("covered", [(0, -1), (1, 0)])
    def test_an_index_that_leaves_sequences_out_is_told(
        self, tmp_path: Path, megatron: Path, covered: tuple[int, int]
    ) -> None:
        path = megatron / "tokens_00000.idx"
        raw = bytearray(path.read_bytes())
        sequences, bounds = struct.unpack_from("<QQ", raw, 18)
        table = 34 + 12 * sequences
        assert bounds == sequences + 1
        struct.pack_into("<q", raw, table, covered[0])
        struct.pack_into("<q", raw, table + 8 * sequences, sequences + covered[1])
        path.write_bytes(raw)
        refused(str(megatron), "megatron", tmp_path, error=CorruptError, match="do not cover all sequences")

    @pytest.mark.parametrize("head", [b"NOTMAGIC\0", b"MMIDIDX\x00\x00"])
    def test_a_wrong_head_of_an_index_is_told(self, tmp_path: Path, megatron: Path, head: bytes) -> None:
        path = megatron / "tokens_00000.idx"
        rest = path.read_bytes()[9:]
        path.write_bytes(head + (rest if head[0] == ord("N") else struct.pack("<Q", 2) + rest[8:]))
        refused(str(megatron), "megatron", tmp_path, error=CorruptError, match="its header is another")

    def test_an_index_that_is_gone_is_told(self, tmp_path: Path, megatron: Path) -> None:
        (megatron / "tokens_00000.idx").unlink()
        refused(str(megatron), "megatron", tmp_path, error=DatastoreError, match=r"tokens_00000\.idx")

    def test_a_bin_that_is_too_short_is_told(self, tmp_path: Path, megatron: Path) -> None:
        path = megatron / "tokens_00000.bin"
        path.write_bytes(path.read_bytes()[:-10])
        refused(str(megatron), "megatron", tmp_path, error=CorruptError, match="beyond the end")

    def test_another_format_is_told(self, tmp_path: Path, megatron: Path) -> None:
        for kind in FORMATS:
            if kind != "megatron":
                refused(str(megatron), kind, tmp_path, error=ConfigError, match="there is no|the source is no")

    def test_an_encoding_that_is_not_known_is_told(self, tmp_path: Path) -> None:
        shard = mds_shard("pil", struct.pack("<I", 1) + b"x")
        source = write(tmp_path / "source", {"index.json": mds_index("s.mds"), "s.mds": shard})
        refused(source, "mds", tmp_path, error=ConfigError, match="cannot be imported.*encoding='pil'")

    def test_a_bomb_ends_where_the_index_says(self, tmp_path: Path) -> None:
        import zstandard

        bomb = zstandard.ZstdCompressor().compress(bytes(50_000_000))
        index = json.loads(mds_index("s.mds", compression="zstd"))
        index["shards"][0]["zip_data"] = {"basename": "s.mds.zstd"}
        index["shards"][0]["raw_data"]["bytes"] = 1000
        source = write(tmp_path / "source", {"index.json": json.dumps(index).encode(), "s.mds.zstd": bomb})
        refused(source, "mds", tmp_path, error=CorruptError, match="longer than its index says")

    def test_a_folder_of_several_splits_names_them(self, tmp_path: Path) -> None:
        source = write(tmp_path / "source", {"dataset_dict.json": b'{"splits": ["train", "test"]}'})
        refused(
            source, "hf", tmp_path, error=ConfigError, match="several datasets.*train.*Name the folder of one split"
        )


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for name, raw in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            file.addfile(member, io.BytesIO(raw))
    return out.getvalue()


def exported(kind: Any) -> dict[str, bytes]:
    """Return the files of a small export, as text or tokens."""
    url = f"memory://interop-fuzz/{kind}"
    storage = open_storage(url)
    if kind == "arrow":
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, pa.schema({"text": pa.string()})) as out:
            out.write_table(pa.table({"text": ["one", "two", ""]}))
        storage.put("a.arrow", sink.getvalue())
    elif next(iter(storage.list()), None) is None:
        export(make_dataset("memory://interop-fuzz-set", [[3, 1, 40], [5]]), url, format=kind, shard_bytes=100)
    return {stat.key: storage.get(stat.key) for stat in storage.list()}


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in {"csv", "tsv"}])
@settings(max_examples=40)
@given(data=st.data())
def test_a_damaged_source_is_an_error_or_is_read(kind: str, data: st.DataObject) -> None:
    contents = exported(kind)
    key = data.draw(st.sampled_from(sorted(contents)))
    raw = bytearray(contents[key])
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    storage = MemoryStorage(f"interop-damaged-{kind}")
    for name, value in {**contents, key: bytes(raw[:cut])}.items():
        storage.put(name, value)
    reader = FORMATS[kind]
    try:
        for name in reader.files(storage):
            reader.schema(storage, name)
            for _, rows in reader.read(storage, name, (0, storage.stat(name).size_bytes)):
                rows.validate(full=True)
    except DatastoreError:
        pass


def csv_rows(storage: Storage, data: bytes) -> list[dict[str, str]]:
    storage.put("a.csv", data)
    found = [(first, rows) for first, rows in CSV.read(storage, "a.csv", (0, len(data)))]
    assert [first for first, _ in found] == [sum(r.num_rows for _, r in found[:i]) for i in range(len(found))]
    return [row for _, rows in found for row in rows.to_pylist()]


@pytest.mark.parametrize("border", range(-2, 4))
def test_a_line_break_in_quotes_on_the_border_of_two_blocks_keeps_both_its_bytes(border: int) -> None:
    value = "one\r\ntwo"
    row = f'"{value}","x"\r\n'.encode()
    head = b"text,other\r\n"
    fill = b"y" * (2**20 - len(head) - len(b'a,""\r\n') - len(b'"one\r') + border)
    found = csv_rows(MemoryStorage(uuid.uuid4().hex), head + b'a,"' + fill + b'"\r\n' + row * 3)
    assert [each["text"] for each in found] == ["a", value, value, value]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_row_may_be_longer_than_a_block_wherever_it_stands(place: int) -> None:
    rows = [["a", "b"], ["c", "d\ne"], ["f", ""]]
    rows.insert(place, ["long", "x" * (2**20 + 5) + "\n" + "y" * (2**20)])
    text = "id,text\n" + "".join(f'{name},"{value}"\n' for name, value in rows)
    found = csv_rows(MemoryStorage(uuid.uuid4().hex), text.encode())
    assert [list(row.values()) for row in found] == rows


@given(
    st.lists(
        st.lists(st.text(st.sampled_from('ab", é\n'), max_size=8), min_size=2, max_size=2), min_size=1, max_size=20
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([48, 64, 97]),
)
@settings(deadline=None, max_examples=150)
def test_csv_reads_as_the_standard_library_does(rows: list[list[str]], end: str, block: int) -> None:
    text = io.StringIO()
    rows = [[value.replace("\n", "\r\n") for value in row] for row in rows]
    csv.writer(text, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["id", "text"], *rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datastore.interop.delimited._CSV_BLOCKS", (block, 4096))
        found = csv_rows(MemoryStorage(uuid.uuid4().hex), text.getvalue().encode())
    assert [list(row.values()) for row in found] == rows


def test_run_ends_and_odd_dictionaries_are_read_as_their_values() -> None:
    ends = pa.run_end_encoded(pa.int32(), pa.string())
    odd = pa.schema(
        {"e": ends, "l": pa.list_(ends), "n": pa.dictionary(pa.int8(), pa.null()), "v": pa.dictionary(pa.int8(), ends)}
    )
    plain = pa.schema(
        {"e": pa.string(), "l": pa.list_(pa.string()), "n": pa.null(), "v": pa.dictionary(pa.int8(), pa.string())}
    )
    assert without_views(odd) == plain
