"""Ingests as processes: killed, interrupted, several at once, on a full disk. The bytes are always the same."""

import hashlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.snapshot import open_dataset
from datastore.errors import DatastoreError, StorageError
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.ingest import ingest
from datastore.ingestion.report import IngestProgress
from datastore.ingestion.settings import IngestSettings

PROGRAM = """
import sys
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
_, to, tokenizer, workers, *sources = sys.argv
settings = IngestSettings(
    tokenizer=tokenizer, workers=int(workers), task_bytes=20_000, shard_bytes=8_192, max_reject_ratio=0.05
)
report = ingest(sources, to, settings=settings)
print(report.version, report.added)
"""


class Ground:
    """Sources, a tokenizer, and commands that ingest the one with the other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rng = random.Random(7)
        words = [f"w{rng.randrange(10**6)}" for _ in range(300)]

        def text() -> str:
            return " ".join(rng.choice(words) for _ in range(rng.randrange(5, 120)))

        folder = root / "src"
        for number in range(60):
            path = folder / f"{number % 7}" / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text())
        (folder / "bad.txt").write_bytes(b"caf\xe9")
        rows = [{"id": f"i{number if number % 50 else 0}", "text": text()} for number in range(400)]
        (root / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
        (root / "tok.json").write_bytes(train_tokenizer([str(folder)], settings=TokenizerSettings(vocab_size=500)))
        self.sources = [str(folder), str(root / "rows.jsonl")]

    def command(self, to: Path, *, workers: int = 2) -> list[str]:
        return [sys.executable, "-c", PROGRAM, str(to), str(self.root / "tok.json"), str(workers), *self.sources]

    def finish(self, to: Path, *, workers: int = 2) -> str:
        done = subprocess.run(
            self.command(to, workers=workers), capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout.strip()

    def settings(self, *, workers: int) -> IngestSettings:
        return IngestSettings(
            tokenizer=str(self.root / "tok.json"),
            workers=workers,
            task_bytes=20_000,
            shard_bytes=8_192,
            max_reject_ratio=0.05,
        )


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def undisturbed(ground: Ground) -> dict[str, str]:
    to = ground.root / "undisturbed"
    assert ground.finish(to, workers=1) == "1 True"
    return contents(to)


def contents(to: Path) -> dict[str, str]:
    """Path and digest of each file that the newest version names, in its order, and of each reject."""
    dataset = open_dataset(to)
    paths = [path for shard in dataset.segments for path in (shard.path, shard.docs_path)]
    paths += sorted(str(path.relative_to(to)) for path in (to / "ingests").glob("*/rejects/*"))
    assert len(paths) > 20
    return {path: hashlib.sha256((to / path).read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    ground: Ground, undisturbed: dict[str, str], tmp_path: Path, workers: int
) -> None:
    assert ground.finish(tmp_path / "data", workers=workers) == "1 True"
    assert contents(tmp_path / "data") == undisturbed


def check_whole(to: Path, undisturbed: dict[str, str]) -> None:
    assert contents(to) == undisturbed
    dataset = open_dataset(to)
    assert dataset.version == 1
    assert not verify(dataset).bad


def test_a_few_kills_change_nothing(ground: Ground, undisturbed: dict[str, str], tmp_path: Path) -> None:
    to = tmp_path / "data"
    for workers, done in ((2, 1), (1, 4), (3, 8)):
        process = subprocess.Popen(ground.command(to, workers=workers), stdout=subprocess.DEVNULL)
        until(lambda at_least=done: len(list(to.glob("ingests/*/done/*.json"))) >= at_least)  # type: ignore[misc]
        crew = children(process.pid)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        until(lambda crew=crew: not any(map(alive, crew)))  # type: ignore[misc]
    assert ground.finish(to) == "1 True"
    check_whole(to, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills_at_random_moments_change_nothing(
    ground: Ground, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    rng = random.Random(11)
    started = time.monotonic()
    ground.finish(tmp_path / "timed")
    whole_s = time.monotonic() - started
    killed = part = 0
    while killed < 20:
        to = tmp_path / f"data{part}"
        process = subprocess.Popen(ground.command(to, workers=1 + killed % 3), stdout=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.2, 1) * whole_s)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        else:  # It got through: on with a new one.
            assert process.returncode == 0
            assert ground.finish(to) == "1 False"
            check_whole(to, undisturbed)
            part += 1
            assert part < 40
    assert ground.finish(tmp_path / f"data{part}") in {"1 True", "1 False"}
    check_whole(tmp_path / f"data{part}", undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_of_any_kind_of_ingest_change_nothing(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).with_name("ingest_kills.py")), str(tmp_path), "--kills", "12"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=880, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert orjson.loads(done.stdout.splitlines()[-1])["datasets"] >= 3


def test_a_kill_between_commit_and_goodbye_commits_once(
    ground: Ground, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    assert ground.finish(tmp_path / "data") == "1 True"
    assert ground.finish(tmp_path / "data", workers=1) == "1 False"
    check_whole(tmp_path / "data", undisturbed)


def default_interrupts() -> None:
    """Undo what a shell does to what it starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_quickly_leaves_no_process_and_can_be_gone_on_from(
    ground: Ground, undisturbed: dict[str, str], tmp_path: Path, how: signal.Signals
) -> None:
    to = tmp_path / "data"
    process = subprocess.Popen(
        ground.command(to),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_interrupts,  # noqa: PLW1509 - no other thread holds a lock of ours
    )
    until(lambda: len(children(process.pid)) == 2 and (to / "ingests").exists())
    workers = children(process.pid)
    process.send_signal(how)
    _, said = process.communicate(timeout=20)
    assert process.returncode != 0
    assert said.count("Traceback") == (how == signal.SIGINT)
    until(lambda: not any(alive(pid) for pid in workers))
    assert ground.finish(to) in {"1 True", "1 False"}
    check_whole(to, undisturbed)


def test_two_that_do_the_same_ingest_at_once_commit_once(
    ground: Ground, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    to = tmp_path / "data"
    both = [subprocess.Popen(ground.command(to), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(line.startswith("1 ") for line in said)
    check_whole(to, undisturbed)


def test_a_worker_that_dies_is_reported_with_its_task(
    ground: Ground, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    def shoot(_: IngestProgress) -> None:
        for pid in children(os.getpid()):
            if b"datastore.engines.local" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    to = tmp_path / "data"
    with pytest.raises(
        DatastoreError, match=r"a worker process died \(how='SIGKILL', task='[0-9a-f]{32}', first_file="
    ):
        ingest(ground.sources, str(to), settings=ground.settings(workers=2), progress=shoot)
    ground.finish(to)
    check_whole(to, undisturbed)


def test_a_disk_that_takes_no_more_is_reported_by_the_worker_that_met_it(ground: Ground, tmp_path: Path) -> None:
    to = tmp_path / "data"
    large = ground.command(to)
    large[2] = PROGRAM.replace("task_bytes=20_000, shard_bytes=8_192", "task_bytes=150_000, shard_bytes=10**8")
    limited = [*large]
    # A limit on the size of files fails the same way as a full disk, and needs no disk of our own.
    limited[2] = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (40_000, {resource.RLIM_INFINITY}))\n"
    limited[2] += large[2]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "StorageError: the file would be larger than allowed (key='shards/" in done.stderr
    assert done.stderr.count("Traceback") == 1
    done = subprocess.run(large, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "1 True\n"
    assert not verify(open_dataset(to)).bad


def test_a_read_only_target_is_reported_before_any_work(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    locked = "/sys/kernel" if os.getuid() == 0 else tmp_path / "locked"  # Root may write wherever the disk lets it.
    with pytest.raises(StorageError, match=r"permission denied|operation not permitted|read-only"):
        ingest(ground.sources, f"{locked}/data", settings=ground.settings(workers=2))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()] if alive(pid) else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition: object, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)
