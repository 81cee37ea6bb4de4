"""Files that are cut while somebody reads them: what was read stays right, what was not is damage, and no process ends."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from datastore.dataset.roots import create_at, place_dataset
from datastore.dataset.snapshot import open_dataset
from datastore.errors import CorruptError
from datastore.ingestion.writers.records import record_writer
from datastore.testing.examples import make_dataset

PROGRAM = """
import os, sys
from pathlib import Path
import numpy as np
import datastore as ds

tokens, records = (ds.open(f"{sys.argv[1]}/{name}") for name in ("tokens", "records"))
held = [
    tokens.segments, records.segments, tokens.token_shard(0), tokens.documents(0), records.to_arrow(),
    records.read_batch(0, 0), list(records.iter_batches()),
]
before = repr(held[2:]), [list(segments) for segments in held[:2]], [segments.uid64.tolist() for segments in held[:2]]
for path in Path(sys.argv[1]).rglob("*"):
    if path.is_file():
        os.truncate(path, 0)
after = repr(held[2:]), [list(segments) for segments in held[:2]], [segments.uid64.tolist() for segments in held[:2]]
assert before == after
scan = records.arrow_dataset()
for read in (lambda: records.record_shard(0), lambda: records.read_batch(0, 0), lambda: tokens.token_shard(0)):
    try:
        read()
    except ds.CorruptError as error:
        print(error.fact)
try:
    scan.to_table()
except Exception as error:
    print(type(error).__name__)
"""


def write_records(url: Path) -> None:
    with record_writer(str(url), schema=pa.schema([("a", pa.int64())])) as out:
        out.write(pa.table({"a": range(300_000)}))


def test_what_was_read_stays_right_when_every_file_is_cut(tmp_path: Path) -> None:
    make_dataset(tmp_path / "tokens", [[40_000, 7]] * 2)
    write_records(tmp_path / "records")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["file has another size than its manifest says"] * 3
    assert done.stdout.split("\n")[3] == "ArrowInvalid"


def test_a_query_names_the_shard_that_is_cut(tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    write_records(tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    path = dataset.segments.shard(0).path
    os.truncate(tmp_path / "set" / path, 1_000)
    with pytest.raises(CorruptError, match=path):
        dataset.sql("SELECT sum(a) FROM records")


def test_a_query_goes_on_with_the_other_disk(tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    place_dataset(tmp_path / "one", roots=[str(tmp_path / "two")], copies=2)
    create_at(str(tmp_path / "one"))
    write_records(tmp_path / "one")
    dataset = open_dataset(tmp_path / "one")
    found = dataset.storage.local_path(dataset.segments.shard(0).path)
    assert found is not None
    os.truncate(found, 1_000)
    assert dataset.sql("SELECT sum(a) AS a FROM records").to_pylist() == [{"a": sum(range(300_000))}]


def test_a_query_about_columns_that_are_not_there_is_no_damage(tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    write_records(tmp_path / "set")
    with pytest.raises(ValueError, match="Columns of records: a"):
        open_dataset(tmp_path / "set").sql("SELECT b FROM records, _files")
