"""Many processes commit to one dataset on a local disk: none is lost, none is there twice; a kill leaves old or new."""

import random
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.shards.files import shard_uid
from datastore.dataset.snapshot import open_dataset

WRITER = """
import sys
from datastore.storage.resolve import open_storage  # noqa: E402
from datastore.dataset.shards.files import shard_uid
from datastore.dataset.operations.append import commit_shards  # noqa: E402
from datastore.testing.examples import make_shard

url, name, commits = sys.argv[1], sys.argv[2], int(sys.argv[3])
storage = open_storage(url)
for index in range(commits):
    commit = commit_shards(storage, [make_shard(storage, shard_uid(name, index), lengths=[3, 4])], ingest_id=f"{name}/{index}")
    print(commit.version, flush=True)
"""


def start(url: Path, name: str, commits: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(url), name, str(commits)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(("writers", "commits"), [(4, 10), pytest.param(16, 25, marks=pytest.mark.slow)])
def test_racing_writers_lose_nothing_and_add_nothing_twice(tmp_path: Path, writers: int, commits: int) -> None:
    url = tmp_path / "set"
    running = [start(url, str(writer), commits) for writer in range(writers)]
    versions = [[int(line) for line in writer.communicate(timeout=250)[0].split()] for writer in running]
    assert [writer.returncode for writer in running] == [0] * writers
    assert sorted(chain(*versions)) == list(range(1, writers * commits + 1))
    # Each writer's own commits stand in the order it made them.
    assert all(numbers == sorted(numbers) for numbers in versions)

    dataset = open_dataset(url)
    expected = {(writer, index) for writer in range(writers) for index in range(commits)}
    uids = [shard.uid for shard in dataset.segments]
    assert len(uids) == len(expected)
    assert set(uids) == {shard_uid(str(writer), index) for writer, index in expected}
    ids = [commit.ingest_id for commit in CommitLog(dataset.storage).history(dataset.commit)]
    assert sorted(ids) == sorted(f"{writer}/{index}" for writer, index in expected)
    assert verify(dataset).ok


@pytest.mark.parametrize("seed", range(2))
def test_a_writer_killed_at_any_moment_leaves_the_old_or_the_new_version(tmp_path: Path, seed: int) -> None:
    url, generator = tmp_path / "set", random.Random(seed)
    acknowledged = 0
    for attempt in range(5):
        writer = start(url, f"{attempt}", 10**6)
        assert writer.stdout is not None
        first = int(writer.stdout.readline())
        assert first > acknowledged
        time.sleep(generator.uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        # A kill may cut the last line short: only whole lines were told to anyone.
        told = [int(line) for line in writer.communicate()[0].splitlines(keepends=True) if line.endswith("\n")]
        dataset = open_dataset(url)
        acknowledged = max([first, *told])
        assert dataset.version in {acknowledged, acknowledged + 1}
        assert dataset.totals.shards == dataset.version
        assert verify(dataset).ok
        acknowledged = dataset.version
