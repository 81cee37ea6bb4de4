"""Files that others wrote, from a real S3 and by processes that are killed: each row once, whoever goes on with it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datastore.loader.rows.files.opening import open_files
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.storage.resolve import open_storage

ROWS = 4000

PROGRAM = """
import json, os, sys, time
from pathlib import Path
import datastore as ds

folder, rank, world, dies_at = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
source = ds.open_files(folder / "rows", index=folder / "index")
options = ds.LoaderSettings(epochs=1, window=64, threads=2)
rows = ds.Rows(sample=ds.Stratified("label"))
loader = ds.RowLoader(source, global_batch=40, seed=3, rank=ds.Rank(rank, world), rows=rows, options=options)
begin, state = folder / "begin.json", folder / "state.json"
if begin.exists():
    loader.load_state_dict(json.loads(begin.read_text()))
for step, batch in enumerate(loader):
    if step == dies_at:
        Path(folder, f"ready-{rank}").touch()
        time.sleep(600)  # It is killed here, with batches under way.
    with open(folder / f"seen-{world}-{rank}.txt", "a") as file:
        file.write(json.dumps([batch.cursor, batch.data["number"].to_pylist()]) + "\\n")
        file.flush()
    if rank == 0:
        Path(folder, "next.json").write_text(json.dumps(loader.state_dict()))
        os.replace(folder / "next.json", state)
"""


def table(start: int, stop: int) -> pa.Table:
    numbers = np.arange(start, stop)
    images = [np.random.default_rng(number).bytes(1000) for number in numbers]
    return pa.table({"number": numbers, "image": images, "label": numbers % 7 == 0})


def start(folder: Path, world: int, *, dies_at: int) -> list[subprocess.Popen[bytes]]:
    return [
        subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), str(rank), str(world), str(dies_at)])
        for rank in range(world)
    ]


def seen(folder: Path, world: int) -> list[tuple[int, list[int]]]:
    lines = [line for path in folder.glob(f"seen-{world}-*.txt") for line in path.read_text().splitlines()]
    return [tuple(json.loads(line)) for line in lines]


def test_killed_readers_are_followed_by_others_and_each_row_comes_once(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for part in range(4):
        rows = table(part * ROWS // 4, (part + 1) * ROWS // 4)
        pq.write_table(rows, tmp_path / "rows" / f"{part}.parquet", row_group_size=100)
    first = start(tmp_path, 2, dies_at=37)
    try:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert all(process.poll() is None for process in first)
            time.sleep(0.05)
    finally:
        for process in first:
            process.send_signal(signal.SIGKILL)
            process.wait()
    (tmp_path / "state.json").rename(tmp_path / "begin.json")
    assert all(process.wait(120) == 0 for process in start(tmp_path, 3, dies_at=-1))
    numbers = [number for world in (2, 3) for _, part in seen(tmp_path, world) for number in part]
    assert sorted(numbers) == list(range(ROWS))
    assert min(cursor for cursor, _ in seen(tmp_path, 3)) == 37 * 40


@pytest.mark.s3
def test_ranks_read_parquet_from_s3_by_row_group_and_column(s3_url: str, tmp_path: Path) -> None:
    storage = open_storage(s3_url)
    whole_bytes = 0
    for part in range(3):
        sink = pa.BufferOutputStream()
        pq.write_table(table(part * 1000, part * 1000 + 1000), sink, row_group_size=100)
        storage.put(f"{part}.parquet", sink.getvalue())
        whole_bytes += sink.getvalue().size
    source = open_files(s3_url, index=tmp_path / "index")
    assert source.indexed.files_read == 3
    assert open_files(s3_url, index=tmp_path / "index").indexed.files_read == 0
    found: list[int] = []
    options = LoaderSettings(epochs=1, window=32, threads=4, columns=("number",))
    for rank in range(2):
        with RowLoader(source, global_batch=50, rank=Rank(rank, 2), options=options) as loader:
            found += [number for batch in loader for number in batch.data["number"].to_pylist()]
    assert sorted(found) == list(range(3000))
    assert source.storage.statistics()["get_ranges"].bytes < whole_bytes // 4
