"""Record shards are open files: pyarrow, Polars, DuckDB and `datasets` read both formats with no code of this package."""

import io
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
from PIL import Image

from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.ingestion.writers.records import record_writer

SCHEMA = {
    "text": "string",
    "messages": "list<struct<role: string, content: string>>",
    "image": "image/png",
    "vector": "fixed_size_list<float>[3]",
    "stars": "int16",
    "struct": "struct<bytes: binary, path: string>",
}


def png(shade: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.full((4, 4), shade, np.uint8)).save(sink, format="PNG")
    return sink.getvalue()


def row(index: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{index}?"}, {"role": "assistant", "content": None}][: index % 3]
    return {
        "text": None if index % 7 == 0 else f"ä {index}",
        "messages": None if index % 5 == 0 else messages,
        "image": png(index % 256),
        "vector": [index / 2, 0.5, -1.0],
        "stars": index,
        "struct": {"bytes": png(index % 256), "path": f"{index}.png"},
    }


ROWS = [row(index) for index in range(300)]


@pytest.fixture(params=["arrow", "parquet"])
def dataset(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr("datastore.ingestion.writers.records._SHARD_BYTES", 40_000)
    with record_writer(tmp_path / "set", schema=SCHEMA, format=request.param) as out:
        out.write(ROWS)
    opened = open_dataset(tmp_path / "set")
    assert len(opened.segments) > 1
    return opened


def paths(dataset: Dataset) -> list[str]:
    return [f"{dataset.url}/{shard.path}" for shard in dataset.segments]


def kind(dataset: Dataset) -> str:
    return dataset.segments.shard(0).layout.format


def test_pyarrow_reads_the_files(dataset: Dataset) -> None:
    def read(path: str) -> pa.Table:
        if kind(dataset) == "parquet":
            return pyarrow.parquet.read_table(path)
        return pa.ipc.open_file(pa.memory_map(path)).read_all()

    assert pa.concat_tables(read(path) for path in paths(dataset)).to_pylist() == ROWS


def test_pyarrow_scans_the_files_as_one_dataset(dataset: Dataset) -> None:
    form = "parquet" if kind(dataset) == "parquet" else "ipc"
    scanned = pyarrow.dataset.dataset(paths(dataset), format=form)
    assert scanned.to_table().to_pylist() == ROWS
    found = scanned.to_table(columns=["text"], filter=pa.compute.field("stars") > 290)
    assert found["text"].to_pylist() == [each["text"] for each in ROWS if each["stars"] > 290]


def test_polars_reads_the_files(dataset: Dataset) -> None:
    scan = pl.scan_parquet if kind(dataset) == "parquet" else pl.scan_ipc
    found = scan(paths(dataset)).collect()
    assert found.drop("vector").to_dicts() == [{k: v for k, v in each.items() if k != "vector"} for each in ROWS]
    assert [list(vector) for vector in found["vector"]] == [each["vector"] for each in ROWS]


def test_duckdb_reads_the_files(dataset: Dataset) -> None:
    if kind(dataset) == "parquet":
        found = duckdb.sql("SELECT * FROM read_parquet(?)", params=[paths(dataset)]).to_arrow_table()
    else:
        scanned = pyarrow.dataset.dataset(paths(dataset), format="ipc")  # noqa: F841 - named in the query
        found = duckdb.sql("SELECT * FROM scanned").to_arrow_table()
    assert found.cast(dataset.schema).to_pylist() == ROWS


def test_datasets_reads_the_files_and_sees_the_images(dataset: Dataset, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = datasets.load_dataset(
        kind(dataset), data_files=paths(dataset), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == len(ROWS)
    plain = loaded.with_format("arrow")[:]
    assert plain["text"].to_pylist() == [each["text"] for each in ROWS]
    assert plain["messages"].to_pylist() == [each["messages"] for each in ROWS]
    for column in ("image", "struct"):
        shown = loaded.cast_column(column, datasets.Image())
        assert np.asarray(shown[5][column])[0, 0] == 5
