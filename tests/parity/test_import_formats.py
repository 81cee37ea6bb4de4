"""What other libraries wrote is imported as it is, value by value; and what we export comes back the same."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.ingestion.importing import import_dataset
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import record_writer
from datastore.interop.export import ExportFormat, export
from datastore.interop.formats import ImportFormat
from datastore.testing.examples import make_dataset

sys.path.insert(0, str(Path(__file__).parent))
import peers

pytestmark = pytest.mark.filterwarnings("ignore")

RNG = np.random.default_rng(4)
DOCUMENTS = [RNG.integers(0, 50_000, int(size), dtype=np.uint16) for size in RNG.integers(1, 300, 50)]
ONE = IngestSettings(workers=1)


def tokens_of(dataset: Dataset) -> list[list[int]]:
    found: list[list[int]] = dataset.to_arrow(tokens=True)["tokens"].to_pylist()
    return found


def taken(source: Path, kind: ImportFormat, settings: IngestSettings = ONE) -> Dataset:
    url = source.parent / f"from-{kind}"
    report = import_dataset(str(source), str(url), format=kind, settings=settings)
    dataset = open_dataset(url)
    assert (report.documents, report.version) == (dataset.totals.documents, 1)
    return dataset


def write_mds(folder: Path, columns: dict[str, str], rows: list[dict[str, Any]], **options: Any) -> Path:
    with peers.mosaicml().MDSWriter(out=str(folder), columns=columns, size_limit=4000, **options) as out:
        for row in rows:
            out.write(row)
    return folder


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64"])
def test_tokens_that_mosaicml_wrote(tmp_path: Path, dtype: str) -> None:
    rows = [{"tokens": document.astype(dtype)} for document in DOCUMENTS]
    source = write_mds(tmp_path / "mds", {"tokens": f"ndarray:{dtype}"}, rows)
    assert len(list(source.glob("*.mds"))) > 3
    dataset = taken(source, "mds")
    assert tokens_of(dataset) == [document.tolist() for document in DOCUMENTS]
    assert pa.types.is_uint16(dataset.token_schema.field("tokens").type.value_type)
    assert dataset.commit.tokenizer is None


ROWS: list[dict[str, Any]] = [
    {"text": f"ü{n}", "n": n, "x": float(n) / 3, "raw": bytes(n), "j": {"a": [n, None]}, "vector": np.arange(n + 1.0)}
    for n in range(30)
]


@pytest.mark.parametrize("compression", [None, "zstd", "gz", "bz2"])
def test_records_that_mosaicml_wrote(tmp_path: Path, compression: str | None) -> None:
    columns = {"text": "str", "n": "int", "x": "float64", "raw": "bytes", "j": "json", "vector": "ndarray:float64"}
    found = list(taken(write_mds(tmp_path / "mds", columns, ROWS, compression=compression), "mds").iter_records())
    for row, expected in zip(found, ROWS, strict=True):
        assert row == {**expected, "j": row["j"], "vector": expected["vector"].tolist()}
        assert row["j"].replace(" ", "") == f'{{"a":[{row["n"]},null]}}'


def write_litdata(folder: Path, samples: list[Any], **options: Any) -> Path:
    peers.litdata()
    from litdata.streaming.writer import BinaryWriter

    out = BinaryWriter(str(folder), chunk_bytes=options.pop("chunk_bytes", 4000), **options)
    for index, sample in enumerate(samples):
        out[index] = sample
    out.done()
    out.merge()
    return folder


@pytest.mark.parametrize("kind", ["numpy", "tensor"])
def test_tokens_that_litdata_wrote(tmp_path: Path, kind: str) -> None:
    import torch

    peers.litdata()
    from litdata.streaming.item_loader import TokensLoader

    samples = [torch.from_numpy(d.astype(np.int32)) if kind == "tensor" else d for d in DOCUMENTS]
    source = write_litdata(tmp_path / "lit", samples, item_loader=TokensLoader())
    assert len(list(source.glob("*.bin"))) > 3
    assert tokens_of(taken(source, "litdata")) == [document.tolist() for document in DOCUMENTS]


@pytest.mark.parametrize("compression", [{}, {"compression": "zstd", "compression_level": "chunk"}])
def test_records_that_litdata_wrote(tmp_path: Path, compression: dict[str, str]) -> None:
    """It writes plain values as Arrow behind empty samples; with an array among them, as a tree of leaves."""
    plain = [{"text": f"ü{n}", "n": n, "x": n / 3, "raw": bytes([n]), "deep": {"a": n, "b": True}} for n in range(99)]
    source = write_litdata(tmp_path / "plain" / "lit", plain, chunk_bytes=1500, **compression)
    assert list(taken(source, "litdata").iter_records()) == plain
    samples = [{**row, "vector": np.arange(row["n"], dtype=np.float32)} for row in plain]
    source = write_litdata(tmp_path / "lit", samples, chunk_bytes=1500, **compression)
    for row, expected in zip(taken(source, "litdata").iter_records(), samples, strict=True):
        flat = {key: expected[key] for key in ("text", "n", "x", "raw")}
        flat |= {"deep.a": expected["n"], "deep.b": True, "vector": expected["vector"].tolist()}
        assert row == flat


def test_tokens_that_megatron_wrote(tmp_path: Path) -> None:
    """Documents of several sequences, too."""
    import torch

    indexed = peers.indexed_dataset()
    for dtype in (np.uint16, np.int32, np.int64):
        prefix = tmp_path / f"corpus-{np.dtype(dtype).name}"
        builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in DOCUMENTS:
            cut = len(document) // 2
            lengths = [cut, len(document) - cut]
            builder.add_document(torch.from_numpy(document.astype(np.int64)), lengths)
        builder.finalize(f"{prefix}.idx")
        url = tmp_path / f"set-{np.dtype(dtype).name}"
        small = IngestSettings(workers=1, task_bytes=1024, shard_bytes=1024)
        import_dataset(str(prefix), str(url), format="megatron", settings=small)
        dataset = open_dataset(url)
        assert dataset.totals.shards > 5, "one file, in several tasks"
        assert tokens_of(dataset) == [document.tolist() for document in DOCUMENTS]


def test_samples_that_webdataset_wrote(tmp_path: Path) -> None:
    import webdataset

    for number in range(3):
        with webdataset.TarWriter(str(tmp_path / "tars" / f"{number}.tar") if number else _made(tmp_path)) as out:
            for n in range(10):
                out.write({"__key__": f"{number}/{n:03}", "jpg": b"\xff\xd8%d" % n, "cls": n, "json": {"n": n}})
    rows = list(taken(tmp_path / "tars", "webdataset").iter_records())
    assert len(rows) == 30
    assert rows[12] == {"__key__": "1/002", "cls": 2, "jpg": b"\xff\xd82", "json": '{"n": 2}'}


def _made(tmp_path: Path) -> str:
    (tmp_path / "tars").mkdir()
    return str(tmp_path / "tars" / "0.tar")


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    import datasets

    ids = [document.astype(np.int64).tolist() for document in DOCUMENTS]
    datasets.Dataset.from_dict({"input_ids": ids}).save_to_disk(str(tmp_path / "tokens"), num_shards=3)
    dataset = taken(tmp_path / "tokens", "hf")
    assert tokens_of(dataset) == ids
    assert pa.types.is_uint16(dataset.token_schema.field("tokens").type.value_type)
    rows = [{"text": f"ü{n}", "meta": {"n": n, "tags": ["a"] * n}} for n in range(100)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "b" / "rows"), num_shards=3)
    assert list(taken(tmp_path / "b" / "rows", "hf").iter_records()) == rows


def test_parquet_in_row_groups(tmp_path: Path) -> None:
    rows = [{"text": f"ü{n}" * 50, "n": n} for n in range(5000)]
    (tmp_path / "pq").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:4000]), tmp_path / "pq" / "a.parquet", row_group_size=100)
    pq.write_table(pa.Table.from_pylist(rows[4000:]), tmp_path / "pq" / "b.parquet", row_group_size=100)
    dataset = taken(tmp_path / "pq", "parquet", IngestSettings(workers=1, task_bytes=4096, shard_bytes=4096))
    assert dataset.totals.shards > 5
    assert list(dataset.iter_records()) == rows


FORMATS: list[ExportFormat] = ["parquet", "hf", "mds", "webdataset"]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_tokens_come_back_with_all_that_is_known_of_them(tmp_path: Path, kind: ExportFormat, dtype: str) -> None:
    dataset = make_dataset(tmp_path / "set", [[3, 1, 500], [40, 2]], dtype=dtype)
    export(dataset, str(tmp_path / "out"), format=kind, shard_bytes=500)
    back = taken(tmp_path / "out", kind)  # type: ignore[arg-type]
    assert tokens_of(back) == tokens_of(dataset)
    if kind != "webdataset":  # It has the rest in a JSON of its own.
        assert back.to_arrow().to_pylist() == dataset.to_arrow().to_pylist()


@pytest.mark.parametrize("kind", ["litdata", "megatron"])
def test_tokens_come_back_from_formats_of_tokens_alone(tmp_path: Path, kind: Any) -> None:
    dataset = make_dataset(tmp_path / "set", [[3, 1, 500], [40, 2]])
    export(dataset, str(tmp_path / "out"), format=kind, shard_bytes=500)
    back = taken(tmp_path / "out", kind)
    assert tokens_of(back) == tokens_of(dataset)
    first = back.to_arrow().to_pylist()[1]
    assert (first["id"], first["tokens"], first["digest"]) == (f"{first['source']}#1", 1, bytes(16))


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_records_come_back(tmp_path: Path, kind: Any) -> None:
    schema = pa.schema([("text", pa.string()), ("turns", pa.list_(pa.struct([("role", pa.string())])))])
    with record_writer(tmp_path / "set", schema=schema) as out:
        out.write({"text": f"ü{n}" if n % 2 else None, "turns": [{"role": "user"}] * (n % 3)} for n in range(50))
    dataset = open_dataset(tmp_path / "set")
    export(dataset, str(tmp_path / "out"), format=kind, shard_bytes=500)
    back = taken(tmp_path / "out", kind)
    assert list(back.iter_records()) == list(dataset.iter_records())
    assert back.schema.names == schema.names


class TestToldByContent:
    """`ingest` finds out by itself what other libraries wrote, and takes what those libraries read."""

    ROWS = [{"id": f"d{i}", "text": f"número {i}\n"} for i in range(300)]  # noqa: RUF012

    def came_out(self, source: Any, to: Path) -> list[dict[str, Any]]:
        for added in (True, False):
            assert ingest(source, str(to), settings=ONE).added == added
        return list(open_dataset(to).iter_records())

    def test_mds(self, tmp_path: Path) -> None:
        source = write_mds(tmp_path / "mds", {"id": "str", "text": "str"}, self.ROWS)
        read = peers.mosaicml().LocalDataset(str(source))
        assert self.came_out([str(source)], tmp_path / "set") == [dict(row) for row in read] == self.ROWS

    def test_litdata(self, tmp_path: Path) -> None:
        source = write_litdata(tmp_path / "lit", self.ROWS)
        assert self.came_out([str(source)], tmp_path / "set") == self.ROWS

    def test_datasets_saved_loaded_and_streaming(self, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        made = datasets.Dataset.from_list(self.ROWS)
        made.save_to_disk(str(tmp_path / "saved"))
        assert self.came_out([str(tmp_path / "saved")], tmp_path / "set") == list(made)
        chosen = made.select([5, 3, 8])
        for number, source in enumerate([chosen, chosen.to_iterable_dataset()]):
            found = self.came_out(source, tmp_path / str(number))
            assert [(row["id"], row["text"]) for row in found] == [(row["id"], row["text"]) for row in chosen]

    @pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
    def test_tables_of_text_as_datasets_reads_them(self, tmp_path: Path, name: str, separator: str) -> None:
        datasets = pytest.importorskip("datasets")
        rows = [{"id": row["id"], "text": f'{row["text"]} "quoted", {separator}'} for row in self.ROWS]
        datasets.Dataset.from_list(rows).to_pandas().to_csv(tmp_path / name, sep=separator, index=False)
        read = datasets.load_dataset(
            "csv", data_files=str(tmp_path / name), sep=separator, cache_dir=str(tmp_path / "cache"), split="train"
        )
        found = self.came_out([str(tmp_path / name)], tmp_path / "set")
        assert [(row["id"], row["text"]) for row in found] == [(row["id"], row["text"]) for row in read]
        assert [row["text"] for row in read] == [row["text"] for row in rows]
