"""A column of a type that few know: it comes back as it was, and never closes the other columns of its rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.evolve import evolve
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.ingestion.writers.records import record_writer
from datastore.interop.export import export


def json_texts() -> Any:
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(["1", None, "[]"]))


def lists_of(items: Any) -> Any:
    return pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), items)


COLUMNS = {
    "nothing": pa.nulls(3),
    "lists of nothing": lists_of(pa.nulls(3)),
    "lists of JSON": lists_of(json_texts()),
    "structs of JSON": pa.StructArray.from_arrays([json_texts()], names=["x"]),
    "intervals": pa.array([pa.MonthDayNano([1, 2, 3]), None, pa.MonthDayNano([4, 5, 6])]),
    "categories of bytes": pa.array([b"ab", b"cd", b"ab"], pa.binary(2)).dictionary_encode(),
    "lists of categories": lists_of(pa.array(["a", "b", "a"]).dictionary_encode()),
    "lists of no items": pa.array([[], None, []], pa.list_(pa.int8(), 0)),
    "tensors": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.int8(), [2]), pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.int8(), 2))
    ),
}


@pytest.fixture(params=COLUMNS)
def table(request: pytest.FixtureRequest) -> pa.Table:
    return pa.table({"number": [0, 1, 2], "odd": COLUMNS[request.param]})


def every_view(dataset: Dataset, rows: list[dict[str, Any]], target: Path) -> None:
    """Check that all rows come back, and the other column by every way that leaves the odd one out."""
    numbers = [row["number"] for row in rows]
    assert dataset.to_arrow().to_pylist() == rows
    assert list(dataset.iter_records()) == rows
    assert dataset.to_batches().read_all().to_pylist() == rows
    assert dataset.to_arrow(columns=["number"]).column("number").to_pylist() == numbers
    assert [row["number"] for row in dataset.iter_records(columns=["number"])] == numbers
    assert dataset.to_pandas(columns=["number"])["number"].tolist() == numbers
    assert dataset.to_polars(columns=["number"])["number"].to_list() == numbers
    assert dataset.sql("SELECT number FROM records").column("number").to_pylist() == numbers
    assert export(dataset, str(target), format="jsonl", columns=["number"]).documents == len(numbers)
    assert verify(dataset).ok


def test_an_odd_column_lives_through_everything_and_closes_no_other(table: pa.Table, tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    for _ in range(2):
        with record_writer(url, schema=table.schema) as out:
            out.write(table)
    rows = table.to_pylist() * 2
    every_view(open_dataset(url), rows, tmp_path / "all")
    delete(url, where=pc.field("number") == 1)
    delete(url, where="number = 7")
    rows = [row for row in rows if row["number"] != 1]
    every_view(open_dataset(url), rows, tmp_path / "deleted")
    changes: list[Callable[[], object]] = [
        lambda: purge(url),
        lambda: compact(url),
        lambda: evolve(url, add={"more": "int8"}),
    ]
    for number, change in enumerate(changes):
        change()
        rows = [row | {"more": None} for row in rows] if number == 2 else rows
        every_view(open_dataset(url), rows, tmp_path / f"changed {number}")
