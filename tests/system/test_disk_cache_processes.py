"""One cache folder, several processes: the budget holds at every moment, and those that are killed leave nothing behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datastore.dataset.snapshot import open_dataset
from datastore.loader.cache.disk import DiskTier, block_name
from datastore.loader.cache.folder import CacheFolder, list_cached
from datastore.loader.loader import Loader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.examples import make_dataset
from datastore.testing.web import serve_folder

BLOCK = 16_384
BUDGET = 40 * BLOCK

WRITER = f"""
import random, sys
from pathlib import Path
from datastore.digest import digest_bytes
from datastore.loader.cache.disk import DiskTier, block_name

root, uuid, seed, count = Path(sys.argv[1]), sys.argv[2] * 32, int(sys.argv[3]), int(sys.argv[4])
disk = DiskTier(root, budget_bytes={BUDGET}, uuid=uuid, url="memory://" + uuid[:1])
draw = random.Random(seed)
target = bytearray({BLOCK})
hits = 0
print("begun", flush=True)
for _ in range(count):
    number = draw.randrange(120)
    data = bytes([number]) * len(target)
    if disk.read(block_name("0" * 32, number), memoryview(target), digest=digest_bytes(data)):
        assert target == data
        hits += 1
    else:
        disk.write(block_name("0" * 32, number), memoryview(data))
assert disk.stats().disk_corrupt == 0
print(hits, flush=True)
"""

RANK = f"""
import hashlib, json, sys
from datastore.dataset.snapshot import open_dataset
from datastore.loader.loader import Loader
from datastore.loader.settings import LoaderSettings, Rank

url, cache, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = LoaderSettings(lanes=4, window=16, epochs=1, threads=3, cache_dir=cache, cache_bytes={BUDGET}, memory_bytes={64 * BLOCK})
with Loader(open_dataset(url), seq_len=255, global_batch=8, rank=Rank(rank, 2), options=options) as loader:
    rows = [row.tobytes() for batch in loader for row in batch.tokens[batch.valid]]
    print(json.dumps([len(rows), hashlib.sha256(b"".join(rows)).hexdigest(), loader.stats()]), flush=True)
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def size_of(folder: Path) -> int:
    """Return the bytes of all files of blocks, half written ones too; one may go while this looks, none may be added uncounted."""
    total = 0
    for path in folder.rglob("*-b*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def finished(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_the_budget_holds_at_every_moment_whatever_processes_write(tmp_path: Path) -> None:
    writers = [start(WRITER, tmp_path, "ab"[seed % 2], seed, 1_500) for seed in range(4)]
    most = 0
    while any(writer.poll() is None for writer in writers):
        # A listing is no moment: what is removed and added meanwhile may both be in it. So it is taken under the lock.
        with CacheFolder(tmp_path).locked() as ledger:
            if ledger is not None:
                most = max(most, size_of(tmp_path))
                assert size_of(tmp_path) <= ledger.used_bytes <= BUDGET
    hits = [int(finished(writer).split()[-1]) for writer in writers]
    assert BUDGET // 2 < most <= BUDGET
    assert sum(hits) > 500
    assert sum(found.size_bytes for found in list_cached(tmp_path)) == size_of(tmp_path) <= BUDGET
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_those_that_are_killed_block_nobody_and_leave_nothing(tmp_path: Path) -> None:
    for seed in range(12):
        process = start(WRITER, tmp_path, "a", seed, 10**9)
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.01 * seed)
        assert "/dev/shm" not in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert size_of(tmp_path) <= BUDGET
        # Nobody has to wait for the one that is dead, and what it left half written goes.
        disk = DiskTier(tmp_path, budget_bytes=BUDGET, uuid="a" * 32, url="memory://a")
        started = time.monotonic()
        disk.write(block_name("1" * 32, seed), memoryview(bytes(BLOCK)))
        assert disk.has(block_name("1" * 32, seed))
        assert time.monotonic() - started < 30
        assert not list(tmp_path.rglob("*.tmp"))
        with CacheFolder(tmp_path).locked() as ledger:
            assert ledger is not None
            assert ledger.used_bytes == size_of(tmp_path)


@pytest.mark.slow
def test_two_ranks_on_one_folder_and_one_that_is_killed_and_starts_again(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", [[250_000], [150_000, 50_000]], block_bytes=BLOCK)
    cache = tmp_path / "cache"
    samples = (450_000 - 1) // 255
    with serve_folder(tmp_path / "set") as served:
        for _ in range(3):
            killed = start(RANK, served.url, cache, 0)
            while killed.poll() is None and size_of(cache) < 4 * BLOCK:
                time.sleep(0.005)
            killed.send_signal(signal.SIGKILL)
            killed.communicate()
        assert 0 < size_of(cache) <= BUDGET
        ranks = [start(RANK, served.url, cache, rank) for rank in range(2)]
        found = [json.loads(finished(rank)) for rank in ranks]
        served.requests.clear()
        again = [json.loads(finished(start(RANK, served.url, cache, rank))) for rank in range(2)]
    assert sum(count for count, _, _ in found) == samples
    assert [result[:2] for result in found] == [result[:2] for result in again]
    for rank, (count, _, stats) in enumerate(found):
        options = LoaderSettings(lanes=4, window=16, epochs=1)
        with Loader(
            open_dataset(tmp_path / "set"), seq_len=255, global_batch=8, rank=Rank(rank, 2), options=options
        ) as local:
            assert sum(int(batch.valid.sum()) for batch in local) == count
        assert stats["disk_corrupt"] == 0
    assert sum(stats["disk_hits"] for _, _, stats in again) > 0
    assert size_of(cache) <= BUDGET < int(dataset.segments.size_bytes.sum())
