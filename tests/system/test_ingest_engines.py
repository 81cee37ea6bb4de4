"""The same ingest by processes, by shares, by an engine of one's own and by Ray: the bytes are always the same."""

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import orjson
import pytest
from typing_extensions import override

import datastore as ds
from datastore.ingestion.plan import Share

SHARES = 4


class Pool(ds.Engine):
    """Two processes of `concurrent.futures`."""

    @override
    def map(self, work: Callable[[bytes], bytes], orders: Iterable[bytes]) -> Iterator[bytes]:
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            yield from (each.result() for each in as_completed([pool.submit(work, order) for order in orders]))


class Forgetful(ds.Engine):
    """Leaves out every other order."""

    @override
    def map(self, work: Callable[[bytes], bytes], orders: Iterable[bytes]) -> Iterator[bytes]:
        yield from map(work, list(orders)[::2])


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ground")
    rng = random.Random(3)
    words = [f"w{rng.randrange(10**6)}" for _ in range(300)]
    copied = " ".join(words[:40])
    (root / "src").mkdir()
    for number in range(4):
        rows = [
            {
                "id": f"{number}-{row % 290}",
                "text": " ".join(rng.choices(words, k=rng.randrange(5, 90))) if row % 60 else copied,
            }
            for row in range(300)
        ]
        (root / "src" / f"{number}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    (root / "tok.json").write_bytes(
        ds.train_tokenizer([str(root / "src")], settings=ds.TokenizerSettings(vocab_size=500))
    )
    ds.ingest(str(root / "src"), str(root / "undisturbed"), settings=settings(root, workers=1))
    return root


def settings(root: Path, *, workers: int = 0) -> ds.IngestSettings:
    return ds.IngestSettings(
        tokenizer=str(root / "tok.json"), workers=workers, task_bytes=20_000, shard_bytes=8_192, max_reject_ratio=0.05
    )


def command(root: Path, to: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "datastore", "ingest", str(root / "src"), "--to", str(to)),
        *("--tokenizer", str(root / "tok.json"), "--max-reject-ratio", "0.05", "--workers", "1"),
        *("--set", "task_bytes=20_000", "--set", "shard_bytes=8_192", *options),
    ]


def contents(to: Path) -> dict[str, str]:
    dataset = ds.open(to)
    assert dataset.version == 1
    assert not ds.verify(dataset).bad
    shards = [dataset.segments.shard(index) for index in range(len(dataset.segments))]
    return {
        path: hashlib.sha256((to / path).read_bytes()).hexdigest()
        for shard in shards
        for path in (shard.path, shard.docs_path)
    }


def test_shares_in_any_order_and_twice_make_one_commit_of_the_same_bytes(ground: Path, tmp_path: Path) -> None:
    to = tmp_path / "data"
    for index in (2, 0, 0, 3):
        report = ds.ingest(
            str(ground / "src"), str(to), settings=settings(ground, workers=1), share=f"{index}/{SHARES}"
        )
        assert (report.added, report.version) == (False, 0)
    assert 0 < report.tasks_open < report.tasks
    last = ds.ingest(str(ground / "src"), str(to), settings=settings(ground, workers=1), share=f"1/{SHARES}")
    assert (last.added, last.tasks_open) == (True, 0)
    for share in ("1/4", "none"):
        again = ds.ingest(str(ground / "src"), str(to), settings=settings(ground, workers=1), share=share)
        assert not again.added
    assert contents(to) == contents(ground / "undisturbed")


def test_shares_at_once_of_which_some_are_killed(ground: Path, tmp_path: Path) -> None:
    to = tmp_path / "data"
    crew = [subprocess.Popen(command(ground, to, "--task", f"{index}/{SHARES}")) for index in range(SHARES)]
    time.sleep(1.0)
    for process in crew[:2]:
        process.kill()
    for process in crew:
        assert process.wait(120) in {0, -signal.SIGKILL}
    for index in range(2):
        subprocess.run(command(ground, to, "--task", f"{index}/{SHARES}"), check=True, timeout=120)
    subprocess.run(command(ground, to, "--commit"), check=True, timeout=120)
    assert contents(to) == contents(ground / "undisturbed")


def test_nothing_is_committed_before_every_share_is_done(ground: Path, tmp_path: Path) -> None:
    to = str(tmp_path / "data")
    done = ds.ingest(str(ground / "src"), to, settings=settings(ground, workers=1), share="0/2")
    with pytest.raises(ds.ConflictError, match=rf"not done.*open={done.tasks_open}, of={done.tasks}") as caught:
        ds.ingest(str(ground / "src"), to, settings=settings(ground, workers=1), share="none")
    assert "--task i/n" in caught.value.hint
    assert not list(Path(to, "_log").glob("*")) if Path(to, "_log").exists() else True


@pytest.mark.parametrize("text", ["4/4", "-1/4", "1", "a/b", "1/0", "/", "1/4/2"])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ds.ConfigError, match="no such share"):
        Share.parse(text)


def test_an_engine_of_ones_own_writes_the_same_bytes(ground: Path, tmp_path: Path) -> None:
    to = tmp_path / "data"
    report = ds.ingest(str(ground / "src"), str(to), settings=settings(ground), engine=Pool())
    assert report.added
    assert report.rejected == {"duplicate_id": 40}
    assert contents(to) == contents(ground / "undisturbed")


def test_an_engine_that_leaves_out_tasks_is_found_out(ground: Path, tmp_path: Path) -> None:
    with pytest.raises(ds.DatastoreError, match="the engine has not done all of the work"):
        ds.ingest(str(ground / "src"), str(tmp_path / "data"), settings=settings(ground), engine=Forgetful())
    assert ds.ingest(str(ground / "src"), str(tmp_path / "data"), settings=settings(ground)).added
    assert contents(tmp_path / "data") == contents(ground / "undisturbed")


def test_an_error_of_a_task_comes_back_from_an_engine_as_it_was(ground: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "good"}\n{"text": 3}\n')
    strict = ds.IngestSettings(on_error="fail", tokenizer=str(ground / "tok.json"))
    with pytest.raises(ds.RejectedError, match=r"a document was rejected: text_not_string \(source='bad.jsonl'"):
        ds.ingest(str(tmp_path / "bad.jsonl"), str(tmp_path / "data"), settings=strict, engine=Pool())


def test_what_only_this_process_sees_is_not_for_engines(ground: Path) -> None:
    with pytest.raises(ds.ConfigError, match="other processes cannot see memory://"):
        ds.ingest(str(ground / "src"), "memory://engines/data", settings=settings(ground), engine=Pool())


RAY = """
import sys
from ray.cluster_utils import Cluster
import datastore as ds

source, to, tokenizer = sys.argv[1:]
node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args=node)
second = cluster.add_node(**node)
gone = []

def shoot(now):
    if now.tasks_done >= 3 and not gone:
        gone.append(second)
        cluster.remove_node(second, allow_graceful=False)

settings = ds.IngestSettings(tokenizer=tokenizer, task_bytes=20_000, shard_bytes=8_192, max_reject_ratio=0.05)
report = ds.ingest(source, to, settings=settings, engine=ds.RayEngine(cluster.address), progress=shoot)
print("done", report.added, report.tasks, len(gone))
engine = ds.RayEngine(cluster.address)
print("dedup", ds.dedup(to, dry_run=True, engine=engine).duplicates == ds.dedup(to, dry_run=True).duplicates > 0)
print("sound", ds.verify(ds.open(to), deep=True, engine=engine) == ds.verify(ds.open(to), deep=True))
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_ray_writes_the_same_bytes_though_a_node_dies(ground: Path, tmp_path: Path) -> None:
    to = tmp_path / "data"
    program = [sys.executable, "-c", RAY, str(ground / "src"), str(to), str(ground / "tok.json")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "done True" in done.stdout
    assert "dedup True\nsound True" in done.stdout
    assert " 1\n" in done.stdout[done.stdout.index("done True") :]
    assert contents(to) == contents(ground / "undisturbed")


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_ray_cluster_that_is_not_there_is_one_line() -> None:
    program = "import datastore as ds\nlist(ds.RayEngine('127.0.0.1:1').map(len, []))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert "ConfigError: the Ray cluster cannot be reached" in done.stderr
