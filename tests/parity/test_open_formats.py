"""Shards and documents are open files: pyarrow, Polars and DuckDB read both with no code of this package."""

from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest

from datastore.dataset.shards.files import shard_uid, write_token_shard
from datastore.dataset.snapshot import Dataset
from datastore.storage.resolve import open_storage
from datastore.testing.examples import documents_of, make_dataset


@pytest.fixture(params=["uint16", "uint32"])
def dataset(tmp_path: Path, request: pytest.FixtureRequest) -> Dataset:
    return make_dataset(tmp_path / "set", [[3, 0, 5], [40, 41]], dtype=request.param)


def ours(dataset: Dataset) -> list[list[int]]:
    documents = []
    for index in range(len(dataset.segments)):
        values, offsets = dataset.token_shard(index)
        documents += [part.tolist() for part in np.split(values, offsets[1:-1])]
    return documents


def shards(dataset: Dataset) -> list[str]:
    return [f"{dataset.url}/{shard.path}" for shard in dataset.segments]


def documents(dataset: Dataset) -> list[str]:
    return [f"{dataset.url}/{shard.docs_path}" for shard in dataset.segments]


def test_pyarrow_maps_the_shards(dataset: Dataset) -> None:
    tables = [pa.ipc.open_file(pa.memory_map(path)).read_all() for path in shards(dataset)]
    assert pa.concat_tables(tables).column("tokens").to_pylist() == ours(dataset)


def test_pyarrow_scans_the_shards_as_one_dataset(dataset: Dataset) -> None:
    table = pyarrow.dataset.dataset(shards(dataset), format="ipc").to_table()
    assert table.column("tokens").to_pylist() == ours(dataset)


def test_polars_reads_the_shards(dataset: Dataset) -> None:
    assert pl.concat([pl.read_ipc(path) for path in shards(dataset)])["tokens"].to_list() == ours(dataset)
    assert pl.scan_ipc(shards(dataset)).collect()["tokens"].to_list() == ours(dataset)


def test_duckdb_queries_the_shards(dataset: Dataset) -> None:
    scanned = pyarrow.dataset.dataset(shards(dataset), format="ipc")  # noqa: F841 - named in the query
    found = duckdb.sql("SELECT count(*), sum(len(tokens)) FROM scanned").fetchall()
    assert found == [(5, sum(map(len, ours(dataset))))]
    rows = duckdb.sql("SELECT tokens FROM scanned").fetchall()
    assert [row[0] for row in rows] == ours(dataset)


def rows(dataset: Dataset) -> list[dict]:
    return [row for index in range(len(dataset.segments)) for row in dataset.documents(index).to_pylist()]


def test_pyarrow_reads_the_documents(dataset: Dataset) -> None:
    table = pa.concat_tables(pyarrow.parquet.read_table(path) for path in documents(dataset))
    assert table.to_pylist() == rows(dataset)


def test_polars_reads_the_documents(dataset: Dataset) -> None:
    assert pl.read_parquet(documents(dataset)).to_dicts() == rows(dataset)


def test_duckdb_queries_the_documents(dataset: Dataset) -> None:
    query = "SELECT source, sum(tokens) AS tokens FROM read_parquet(?) GROUP BY source ORDER BY source"
    found = duckdb.execute(query, [documents(dataset)]).fetchall()
    sums: dict[str, int] = {}
    for row in rows(dataset):
        sums[row["source"]] = sums.get(row["source"], 0) + row["tokens"]
    assert found == sorted(sums.items())


def test_document_rows_say_where_the_shard_rows_come_from(dataset: Dataset) -> None:
    assert [row["tokens"] for row in rows(dataset)] == [len(tokens) for tokens in ours(dataset)]


def test_other_libraries_read_the_columns_beside_the_tokens(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "columns")
    values = np.arange(8, dtype=np.uint16)
    logits = np.arange(16, dtype=np.float16).reshape(8, 2)
    columns = {"loss_mask": values > 3, "weight": values / np.float32(2), "logits": logits}
    lengths = [5, 0, 3]
    info = write_token_shard(
        storage,
        uid=shard_uid("columns", 0),
        values=values,
        offsets=np.array([0, 5, 5, 8]),
        documents=documents_of(shard_uid("columns", 0), lengths),
        columns=columns,
    )
    path = str(tmp_path / "columns" / info.path)
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    frame = pl.read_ipc(path)
    for name, wanted in {"tokens": values, **columns}.items():
        split = [part.tolist() for part in np.split(wanted, [5, 5])]
        assert table.column(name).to_pylist() == split
        assert frame[name].to_list() == split
    # DuckDB knows no half precision; a column of it is left out before DuckDB sees the table.
    known = table.drop_columns("logits")  # noqa: F841 - named in the query
    found = duckdb.sql("SELECT tokens, loss_mask, weight FROM known").fetchall()
    assert found == [
        tuple(table.column(name)[row].as_py() for name in ("tokens", "loss_mask", "weight")) for row in range(3)
    ]
