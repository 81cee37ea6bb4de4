"""An export given again is done; one that was killed leaves nothing beside its target once it is given again."""

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pytest

from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError
from datastore.ingestion.writers.records import record_writer
from datastore.interop.export import ExportFormat, export
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset

SCHEMA = pa.schema({"text": pa.string(), "n": pa.int64()})


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    with record_writer(str(tmp_path / "set"), schema=SCHEMA) as out:
        out.write({"text": f"text {index}", "n": index} for index in range(90))
    return open_dataset(tmp_path / "set")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", sorted(set(get_args(ExportFormat)) - {"megatron"}))
def test_the_same_export_given_again_is_done(dataset: Dataset, tmp_path: Path, form: ExportFormat) -> None:
    first = export(dataset, str(tmp_path / "out"), format=form, shard_bytes=1000)
    before = contents(tmp_path / "out")
    again = export(dataset, str(tmp_path / "out"), format=form, shard_bytes=1000)
    assert (again.documents, again.files, again.bytes) == (first.documents, first.files, first.bytes)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "set"]


def test_the_same_export_of_tokens_and_to_a_store_without_renames_is_done(tmp_path: Path) -> None:
    tokens = make_dataset(MemoryStorage("exported-tokens"), [[3, 4], [5]])
    for url in (str(tmp_path / "out"), "memory://exported-again"):
        first = export(tokens, url, format="megatron")
        again = export(tokens, url, format="megatron")
        assert (again.files, again.bytes) == (first.files, first.bytes)


@pytest.mark.parametrize("url", ["folder", "memory://export-something-else"])
@pytest.mark.parametrize("change", ["more", "less", "other"])
def test_where_something_else_is_nothing_is_written(dataset: Dataset, tmp_path: Path, url: str, change: str) -> None:
    to = f"{url}-{change}" if "://" in url else str(tmp_path / url)
    export(dataset, to, format="jsonl", shard_bytes=1000)
    from datastore.storage.resolve import open_storage

    storage = open_storage(to)
    keys = [stat.key for stat in storage.list()]
    if change == "more":
        storage.put("more.txt", b"x")
    elif change == "less":
        storage.delete(keys[-1])
    else:
        storage.put(keys[-1], storage.get(keys[-1])[:-2] + b" }")
    before = {stat.key: storage.get(stat.key) for stat in storage.list()}
    with pytest.raises(ConfigError, match="not empty, and holds something else"):
        export(dataset, to, format="jsonl", shard_bytes=1000)
    assert {stat.key: storage.get(stat.key) for stat in storage.list()} == before
    assert not list(tmp_path.glob(".*"))


KILLED = """
import os, signal, sys
from datastore.dataset.snapshot import open_dataset
from datastore.interop.export import export

def stop(done, total):
    os.kill(os.getpid(), signal.SIGKILL)

export(open_dataset(sys.argv[1]), sys.argv[2], format="parquet", progress=stop)
"""


@pytest.mark.parametrize("name", ["out", "o" * 250])
def test_what_a_killed_export_has_left_goes_with_the_next(dataset: Dataset, tmp_path: Path, name: str) -> None:
    to = str(tmp_path / name)
    subprocess.run([sys.executable, "-c", KILLED, dataset.url, to], check=False, timeout=60)
    assert len(list(tmp_path.glob(".o*.tmp"))) == 1
    export(dataset, to, format="parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "set"])
