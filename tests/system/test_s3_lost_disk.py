"""One of three disks is lost while a dataset is read and written: nothing is wrong, and everything goes on."""

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import kill
from pathlib import Path
from threading import Event

import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.snapshot import open_dataset
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_dataset

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(1800)]

TOOL = Path(__file__).parents[2] / "tools" / "s3"
LOCK = TOOL.parent.parent / ".cache" / "s3-lost-disk.lock"
SHARDS, TOKENS = 8, 2_000_000
GOES_ON = 5
"""How often each kind of work must succeed after the loss, to count as going on."""


def status() -> str:
    return subprocess.run([TOOL, "status"], capture_output=True, text=True, timeout=60, check=False).stdout


@pytest.fixture
def lose_a_disk(s3_bucket: str) -> Iterator[Callable[[], None]]:
    """A function that kills one OSD; afterwards it is started again. One test at a time, for no two may be lost."""
    assert s3_bucket
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if status().count("osd.") < 3:
            pytest.skip("the server has one OSD. Run: tools/s3 stop; tools/s3 start --osds 3")
        yield kill_one
        subprocess.run([TOOL, "start"], capture_output=True, timeout=300, check=True)
        deadline = time.monotonic() + 120
        while "HEALTH_OK" not in (seen := status()):
            assert time.monotonic() < deadline, seen
            time.sleep(1)


def kill_one() -> None:
    found = re.search(r"^osd\.1 +runs, pid (\d+)", status(), re.MULTILINE)
    assert found
    kill(int(found[1]), signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not re.search(r"^osd\.1 +does not run", status(), re.MULTILINE):
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Work:
    """Something that a thread does again and again until the block ends; it must never fail."""

    def __init__(self, once: Callable[[int], None], pool: ThreadPoolExecutor, ended: Event) -> None:
        self.once, self.ended = once, ended
        self.done_at: list[float] = []
        self.task: Future[None] = pool.submit(self.run)

    def run(self) -> None:
        while not self.ended.is_set():
            self.once(len(self.done_at))
            self.done_at.append(time.monotonic())

    def goes_on(self, *, after: float, within_s: float) -> None:
        """Wait until it was done `GOES_ON` times after the time `after`; fail with what it failed with."""
        deadline = time.monotonic() + within_s
        while sum(at > after for at in list(self.done_at)) < GOES_ON:
            if self.task.done():
                self.task.result()
            assert time.monotonic() < deadline, f"{self.once.__name__} stopped"
            time.sleep(0.05)


def test_reads_and_commits_go_on(s3_url: str, lose_a_disk: Callable[[], None]) -> None:
    dataset = make_dataset(s3_url, [[TOKENS]] * SHARDS)
    expected = [dataset.token_shard(index)[0].tobytes() for index in range(SHARDS)]
    storage = open_storage(s3_url)

    def read(turn: int) -> None:
        values, _ = dataset.token_shard(turn % SHARDS)
        assert values.tobytes() == expected[turn % SHARDS]

    def commit(turn: int) -> None:
        assert make_dataset(storage, [[10, 20]], name=f"turn {turn}").version == turn + 2

    ended = Event()
    with ThreadPoolExecutor(2) as pool:
        works = [Work(once, pool, ended) for once in (read, commit)]
        try:
            for work in works:
                work.goes_on(after=0, within_s=120)
            lose_a_disk()
            # What was under way when the disk went counts for nothing: count from 5 s later.
            lost = time.monotonic() + 5
            for work in works:
                work.goes_on(after=lost, within_s=300)
        finally:
            ended.set()
        for work in works:
            work.task.result()

    committed = len(works[1].done_at)
    dataset = open_dataset(s3_url)
    assert dataset.version == 1 + committed
    assert len(dataset.segments) == SHARDS + committed
    assert verify(dataset).ok


RUN = """
[data]
url = "{url}/set"
seq_len = 64
global_batch = 8

[model]
layers = 1
width = 32
heads = 2

[train]
steps = {steps}

[checkpoint]
every = 20
"""
STEPS = 200


def datastore(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "datastore", *arguments]


def test_a_training_run_goes_on(s3_url: str, tmp_path: Path, lose_a_disk: Callable[[], None]) -> None:
    shutil.copytree(Path(json.__file__).parent, tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "run.toml").write_text(RUN.format(url=s3_url, steps=STEPS))
    run, tokenizer = f"{s3_url}/run", ("tokenizer", "train", "src", "--vocab", "512", "--to", "tok.json")
    for command in (tokenizer, ("ingest", "src", "--to", f"{s3_url}/set", "--tokenizer", "tok.json")):
        subprocess.run(datastore(*command), cwd=tmp_path, check=True)

    storage = open_storage(run)
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(datastore("train", "run.toml", "--to", run), cwd=tmp_path, stdout=out, stderr=out) as training,
    ):
        try:
            deadline = time.monotonic() + 300
            while not list(storage.list("steps")):
                assert training.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            lose_a_disk()
            assert training.poll() is None, "it had ended before the disk was lost"
            assert training.wait(300) == 0, log.read_text()
        finally:
            training.kill()
    proof = subprocess.run(datastore("prove", run), capture_output=True, text=True, check=True).stdout
    assert f"{STEPS} steps" in proof
    assert "proven" in proof
