"""Each export is opened by the library whose format it is, and holds the same documents, token by token."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.ingestion.writers.records import record_writer
from datastore.interop.export import ExportFormat, export
from datastore.testing.examples import make_dataset

sys.path.insert(0, str(Path(__file__).parent))
import peers

pytestmark = pytest.mark.filterwarnings("ignore")
"""What the other libraries warn of is theirs."""

Documents = list[tuple[str, list[int]]]
LENGTHS = [[3, 1, 700], [40, 41, 1], [1]]


@pytest.fixture(params=["uint16", "uint32"])
def dataset(tmp_path: Path, request: pytest.FixtureRequest) -> Dataset:
    """Three shards; ids stay below 2^31, for Megatron knows no others."""
    made = make_dataset(tmp_path / "set", LENGTHS, dtype=request.param)
    if request.param == "uint16":
        return made
    return small_ids(tmp_path / "small")


def small_ids(url: Path) -> Dataset:
    from datastore.dataset.operations.append import commit_shards
    from datastore.dataset.shards.files import shard_uid, write_token_shard
    from datastore.storage.resolve import open_storage
    from datastore.testing.examples import documents_of

    storage = open_storage(url)
    infos = []
    for number, lengths in enumerate(LENGTHS):
        uid = shard_uid("small", number)
        values = np.random.default_rng(number).integers(0, 2**31, sum(lengths), dtype=np.uint32)
        offsets = np.cumsum([0, *lengths]).astype(np.int64)
        documents = documents_of(uid, lengths)
        infos.append(write_token_shard(storage, uid=uid, values=values, offsets=offsets, documents=documents))
    commit_shards(storage, infos)
    return open_dataset(url)


def ours(dataset: Dataset) -> Documents:
    table = dataset.to_arrow(tokens=True)
    return list(zip(table["id"].to_pylist(), table["tokens"].to_pylist(), strict=True))


def read_parquet(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for path in sorted(folder.iterdir()):
        for row in pq.read_table(path).to_pylist():
            yield row["id"], row["tokens"]


def read_polars(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for row in pl.scan_parquet(folder / "*.parquet").collect().to_dicts():
        yield row["id"], row["tokens"]


def read_hf(folder: Path) -> Iterator[tuple[str, list[int]]]:
    from datasets import load_from_disk

    for row in load_from_disk(str(folder)):
        yield row["id"], row["tokens"]


def read_mds(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for row in peers.mosaicml().LocalDataset(str(folder)):
        yield row["id"], row["tokens"].tolist()


def read_webdataset(folder: Path) -> Iterator[tuple[str, list[int]]]:
    import webdataset

    tars = sorted(str(path) for path in folder.iterdir())
    for row in webdataset.WebDataset(tars, shardshuffle=False).decode():
        yield row["json"]["id"], row["tokens.npy"].tolist()


def read_jsonl(folder: Path) -> Iterator[tuple[str, list[int]]]:
    for path in sorted(folder.iterdir()):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row["id"], row["tokens"]


READERS: dict[str, tuple[ExportFormat, Callable[[Path], Iterator[tuple[str, list[int]]]]]] = {
    "parquet": ("parquet", read_parquet),
    "parquet, by Polars": ("parquet", read_polars),
    "hf": ("hf", read_hf),
    "mds": ("mds", read_mds),
    "webdataset": ("webdataset", read_webdataset),
    "jsonl": ("jsonl", read_jsonl),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("shard_bytes", [0, 300])
def test_the_documents_are_the_same(dataset: Dataset, tmp_path: Path, name: str, shard_bytes: int) -> None:
    kind, read = READERS[name]
    report = export(dataset, str(tmp_path / "out"), format=kind, shard_bytes=shard_bytes)
    assert list(read(tmp_path / "out")) == ours(dataset)
    assert (report.documents, report.tokens) == (7, 787)
    files = [path for path in (tmp_path / "out").iterdir() if path.suffix != ".json"]
    assert (len(files) > 2) == bool(shard_bytes)


@pytest.mark.parametrize("shard_bytes", [0, 300])
def test_megatron_reads_the_same_tokens(dataset: Dataset, tmp_path: Path, shard_bytes: int) -> None:
    indexed = peers.indexed_dataset()
    export(dataset, str(tmp_path / "out"), format="megatron", shard_bytes=shard_bytes)
    found = []
    for path in sorted((tmp_path / "out").glob("*.idx")):
        opened = indexed.IndexedDataset(str(path.with_suffix("")))
        assert len(opened.document_indices) == len(opened) + 1
        found += [opened[index].tolist() for index in range(len(opened))]
    assert found == [tokens for _, tokens in ours(dataset)]


@pytest.mark.parametrize("block", [1, 5])
def test_litdata_reads_the_same_tokens_in_blocks(dataset: Dataset, tmp_path: Path, block: int) -> None:
    lit = peers.litdata()
    from litdata.streaming.item_loader import TokensLoader

    export(dataset, str(tmp_path / "out"), format="litdata", shard_bytes=10**6)
    loader = TokensLoader(block_size=block)
    found = [part.tolist() for part in lit.StreamingDataset(str(tmp_path / "out"), item_loader=loader)]
    stream = [token for _, tokens in ours(dataset) for token in tokens]
    whole = len(stream) // block * block
    assert [token for part in found for token in part] == stream[:whole]


def test_litdata_reads_several_chunks(dataset: Dataset, tmp_path: Path) -> None:
    lit = peers.litdata()
    from litdata.streaming.item_loader import TokensLoader

    export(dataset, str(tmp_path / "out"), format="litdata", shard_bytes=300)
    assert len(list((tmp_path / "out").glob("*.bin"))) > 2
    found = lit.StreamingDataset(str(tmp_path / "out"), item_loader=TokensLoader(block_size=1))
    assert [int(part[0]) for part in found] == [token for _, tokens in ours(dataset) for token in tokens]


ROWS: list[dict[str, Any]] = [
    {"text": f"héllo {n}", "n": n, "x": n / 2, "raw": bytes([n, 0]), "flag": n % 2 == 0, "vector": [0.5, n]}
    for n in range(20)
]
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("n", pa.int64()),
        ("x", pa.float64()),
        ("raw", pa.binary()),
        ("flag", pa.bool_()),
        ("vector", pa.list_(pa.float32())),
    ]
)


@pytest.fixture
def records(tmp_path: Path) -> Dataset:
    with record_writer(tmp_path / "records", schema=SCHEMA) as out:
        out.write(ROWS)
    return open_dataset(tmp_path / "records")


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return `row` with Python's own values."""
    return {key: value.tolist() if isinstance(value, np.ndarray | np.generic) else value for key, value in row.items()}


def test_mds_reads_the_same_records(records: Dataset, tmp_path: Path) -> None:
    export(records, str(tmp_path / "out"), format="mds", shard_bytes=500)
    found = [plain(row) for row in peers.mosaicml().LocalDataset(str(tmp_path / "out"))]
    assert [{**row, "flag": bool(row["flag"])} for row in found] == ROWS


def test_litdata_reads_the_same_records(records: Dataset, tmp_path: Path) -> None:
    export(records, str(tmp_path / "out"), format="litdata", shard_bytes=500)
    assert [plain(row) for row in peers.litdata().StreamingDataset(str(tmp_path / "out"))] == ROWS


def test_hf_reads_the_same_records(records: Dataset, tmp_path: Path) -> None:
    from datasets import load_from_disk

    export(records, str(tmp_path / "out"), format="hf")
    assert list(load_from_disk(str(tmp_path / "out"))) == ROWS


def test_webdataset_reads_the_same_records(records: Dataset, tmp_path: Path) -> None:
    import webdataset

    export(records, str(tmp_path / "out"), format="webdataset")
    found = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False).decode())
    assert [(row["text.txt"], row["raw.bin"], row["vector.npy"].tolist(), row["json"]) for row in found] == [
        (row["text"], row["raw"], row["vector"], {key: row[key] for key in ("n", "x", "flag")}) for row in ROWS
    ]


def test_a_tar_is_as_tarfile_and_numpy_would_write_it(tmp_path: Path) -> None:
    import io
    import tarfile

    columns = [("c" * 120, pa.string()), ("v", pa.list_(pa.float32()))]
    with record_writer(tmp_path / "set", schema=pa.schema(columns)) as out:
        out.write({"c" * 120: "x" * n, "v": [0.5] * n} for n in (0, 1, 511, 512, 513))
    export(open_dataset(tmp_path / "set"), str(tmp_path / "out"), format="webdataset")
    with tarfile.open(tmp_path / "out" / "shard-000000.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(members) == 10
    for row, size in enumerate((0, 1, 511, 512, 513)):
        assert members[f"{row:012}.{'c' * 120}.txt"] == b"x" * size
        made = io.BytesIO()
        np.lib.format.write_array(made, np.full(size, 0.5, np.float32))
        assert members[f"{row:012}.v.npy"] == made.getvalue()
