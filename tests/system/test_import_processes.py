"""Imports and exports as processes: killed at any moment, an import goes on to the same bytes, an export leaves no half."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.snapshot import open_dataset
from datastore.interop.export import export
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_dataset

LENGTHS = [[3000, 1, 50_000, 7], [40_000, 41] * 3, [300] * 50] * 6


def run(*arguments: str | Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "datastore", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: "subprocess.Popen[str]") -> str:
    said, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return said


def import_command(source: Path, kind: str, to: Path | str, *, workers: int = 2) -> list[str]:
    settings = ["--set", "task_bytes=65536", "--set", "shard_bytes=65536", "--workers", str(workers)]
    return ["import", str(source), "--format", kind, "--to", str(to), *settings]


def contents(to: Path) -> dict[str, bytes]:
    dataset = open_dataset(to)
    assert dataset.version == 1
    assert not verify(dataset).bad
    return {path: (to / path).read_bytes() for shard in dataset.segments for path in (shard.path, shard.docs_path)}


@pytest.fixture(scope="module", params=["megatron", pytest.param("mds", marks=pytest.mark.slow)])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("source")
    dataset = make_dataset(folder / "set", LENGTHS)
    export(dataset, str(folder / "out"), format=request.param, shard_bytes=100_000 if request.param == "mds" else 0)
    return request.param, folder / "out"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_nothing_about_an_import(source: tuple[str, Path], tmp_path: Path, kills: int) -> None:
    kind, folder = source
    finish(run(*import_command(folder, kind, tmp_path / "whole", workers=1)))
    whole = contents(tmp_path / "whole")
    assert len(whole) >= 6
    rng = random.Random(kills)
    to, part = tmp_path / "part0", 0
    for count in range(kills):
        process = run(*import_command(folder, kind, to, workers=1 + count % 3))
        wait_for_tasks(process, to, at_least=rng.randrange(1, 6))
        process.kill()
        process.communicate(timeout=60)
        if process.returncode == 0:  # It got through: on with a new one.
            assert contents(to) == whole
            part += 1
            to = tmp_path / f"part{part}"
    finish(run(*import_command(folder, kind, to)))
    assert contents(to) == whole
    assert "nothing new" in finish(run(*import_command(folder, kind, to)))


def wait_for_tasks(process: "subprocess.Popen[str]", to: Path, *, at_least: int) -> None:
    while process.poll() is None and len(list(to.glob("ingests/*/done/*.json"))) < at_least:
        time.sleep(0.005)


def test_a_killed_export_does_not_show(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", LENGTHS)
    process = run("export", tmp_path / "set", "--format", "mds", "--to", tmp_path / "out", "--shard-bytes", "4KiB")
    while process.poll() is None and not list(tmp_path.glob(".out.*.tmp/*")):
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    finish(run("export", tmp_path / "set", "--format", "mds", "--to", tmp_path / "out"))
    assert (tmp_path / "out" / "index.json").exists()


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["mds", "parquet", "megatron"])
def test_there_and_back_on_s3(s3_url: str, kind: str) -> None:
    dataset = make_dataset(f"{s3_url}/set", LENGTHS[:3])
    finish(run("export", f"{s3_url}/set", "--format", kind, "--to", f"{s3_url}/out"))
    names = [stat.key for stat in open_storage(f"{s3_url}/out").list()]
    assert ("_SUCCESS" in names) == (kind == "parquet")
    finish(run("import", f"{s3_url}/out", "--format", kind, "--to", f"{s3_url}/back"))
    assert (
        open_dataset(f"{s3_url}/back").to_arrow(tokens=True)["tokens"].equals(dataset.to_arrow(tokens=True)["tokens"])
    )
    assert dataset.sql("SELECT sum(tokens)::BIGINT AS n FROM documents").to_pylist() == [{"n": dataset.totals.tokens}]
    assert (
        dataset.arrow_dataset()
        .to_table()["tokens"]
        .combine_chunks()
        .equals(dataset.to_arrow(tokens=True)["tokens"].combine_chunks())
    )
