"""Compacting records: any type, in little memory, and what does not go into one file stays apart."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.operations import compact as operation
from datastore.dataset.operations.append import commit_records
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.delete import delete
from datastore.dataset.roots import create_at
from datastore.dataset.shards.files import shard_uid, write_record_shard
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.formats.records import RecordFormat
from datastore.ingestion.writers.records import record_writer

SMALL: Any = pa.dictionary(pa.int8(), pa.string())


def shards_of(folder: Path, *tables: pa.Table, form: RecordFormat = "arrow") -> Dataset:
    """Return a dataset that has each table as a shard, also of types that are refused today."""
    storage, _ = create_at(str(folder))
    infos = [
        write_record_shard(storage, uid=shard_uid("made", number), table=table, format=form)
        for number, table in enumerate(tables)
    ]
    commit_records(storage, infos, schema=tables[0].schema)
    return open_dataset(str(folder))


def labels(first: int, count: int) -> pa.Table:
    column = pa.array([f"label {number}" for number in range(first, first + count)]).dictionary_encode().cast(SMALL)
    return pa.table({"label": column, "number": range(first, first + count)})


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_shards_whose_categories_do_not_fit_together_stay_apart(tmp_path: Path, form: RecordFormat) -> None:
    tables = [labels(0, 60), labels(50, 60), labels(200, 100), labels(210, 20), labels(0, 10)]
    before = shards_of(tmp_path, *tables, form=form).to_arrow().to_pylist()
    report = compact(str(tmp_path))
    after = open_dataset(str(tmp_path))
    # Each row group of Parquet has dictionaries of its own, and a file of Arrow has one.
    documents = [120, 130] if form == "arrow" else [250]
    assert (report.shards_before, report.shards_after, report.merged) == (5, len(documents), 5)
    assert [shard.documents for shard in after.segments] == documents
    assert after.to_arrow().to_pylist() == before
    assert verify(after).ok
    again = compact(str(tmp_path))
    assert (again.committed, again.shards_after, again.merged) == (False, len(documents), 0)


def test_of_a_shard_that_stays_apart_deleted_rows_are_dropped_all_the_same(tmp_path: Path) -> None:
    shards_of(tmp_path, labels(0, 100), labels(100, 100), labels(200, 100))
    delete(str(tmp_path), where=pc.field("number") == 150)
    report = compact(str(tmp_path))
    after = open_dataset(str(tmp_path))
    assert (report.dropped_documents, report.shards_after) == (1, 3)
    assert after.to_arrow().column("number").to_pylist() == [n for n in range(300) if n != 150]
    assert not after.deletions


def test_run_ends_of_an_older_dataset_are_read_deleted_from_compacted_and_added_to(tmp_path: Path) -> None:
    ends = pa.RunEndEncodedArray.from_arrays(pa.array([1, 3], pa.int32()), pa.array(["a", "b"]))
    inside = pa.StructArray.from_arrays([ends], names=["ends"])
    table = pa.table({"number": [0, 1, 2], "ends": ends, "inside": inside})
    shards_of(tmp_path, table, table)
    delete(str(tmp_path), where=pc.field("number") == 1)
    kept = [row for row in table.to_pylist() if row["number"] != 1] * 2
    assert open_dataset(str(tmp_path)).to_arrow().to_pylist() == kept
    assert list(open_dataset(str(tmp_path)).iter_records()) == kept
    assert compact(str(tmp_path)).shards_after == 1
    with record_writer(str(tmp_path)) as out:
        out.write(table)
    assert open_dataset(str(tmp_path)).to_arrow().to_pylist() == kept + table.to_pylist()


def test_parquet_is_compacted_in_much_less_memory_than_its_rows_take(tmp_path: Path) -> None:
    text = pa.array(["the same words again and again " * 1000] * 1000)  # 31 MB, which are a few kilobytes compressed.
    table = pa.table({"chat": pa.ListArray.from_arrays(pa.array(np.arange(1001), pa.int32()), text)})
    shards_of(tmp_path, *[table] * 12, form="parquet")
    usual = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(counted)
    try:
        assert compact(str(tmp_path)).shards_after == 1
    finally:
        pa.set_memory_pool(usual)
    assert counted.max_memory() < 12 * table.nbytes / 3
    assert open_dataset(str(tmp_path)).totals.documents == 12_000


def test_parquet_that_would_not_fit_memory_when_it_is_read_whole_stays_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = pa.array(["the same words again and again " * 1000] * 1000)
    table = pa.table({"text": text})
    shards_of(tmp_path, *[table] * 8, form="parquet")
    monkeypatch.setattr(operation, "_LARGEST_DECODED", 4 * table.nbytes)
    compact(str(tmp_path))
    after = open_dataset(str(tmp_path))
    assert 1 < len(after.segments) < 8
    assert max(after.record_shard(index).nbytes for index in range(len(after.segments))) <= 4 * table.nbytes
    assert not compact(str(tmp_path)).committed
