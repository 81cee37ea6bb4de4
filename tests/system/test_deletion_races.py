"""Appends, deletes, compacts and purges by many processes at once: nothing is lost, nothing comes back, conflicts are clean."""

import subprocess
import sys
from pathlib import Path

import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.snapshot import open_dataset

WORKER = """
import random, sys, time
from datastore.errors import ConflictError  # noqa: E402
from datastore.storage.resolve import open_storage  # noqa: E402
from datastore.dataset.operations.compact import compact
from datastore.dataset.snapshot import open_dataset  # noqa: E402
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.shards.files import shard_uid
from datastore.dataset.operations.append import commit_shards  # noqa: E402
from datastore.testing.examples import make_shard

url, role, name, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
generator = random.Random(name)
conflicts = 0

def appended(index):
    storage = open_storage(url)
    shard = make_shard(storage, shard_uid(f"{name}", index), lengths=[30, 40, 50])
    commit_shards(storage, [shard])
    for row in range(3):
        print("added", f"{shard.uid[:8]}-{row}", flush=True)

def deleted(index):
    dataset = open_dataset(url)
    names = [n for i in range(len(dataset.segments)) for n in dataset.live_documents(i).column("id").to_pylist()]
    mine = generator.sample(names, min(2, len(names)))
    # Started from what was read here, so that another's change of these shards is noticed.
    report = delete(dataset, ids=mine)
    assert report.documents == len(set(mine)), (report, mine)
    for each in mine:
        print("deleted", each, flush=True)

def done(index):
    (compact if role == "compact" else purge)(url)

for index in range(rounds):
    for attempt in range(1000):
        try:
            {"append": appended, "delete": deleted}.get(role, done)(index)
            break
        except ConflictError as error:
            assert "Give the same" in str(error), error
            conflicts += 1
            time.sleep(generator.uniform(0, 0.05))
    else:
        sys.exit("no luck")
print("conflicts", conflicts, flush=True)
"""


def start(url: str, role: str, name: int, rounds: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WORKER, url, role, str(name), str(rounds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def race(url: str, roles: dict[str, int], rounds: int) -> tuple[set[str], set[str], int]:
    """Return what was added and what was deleted, by what the processes were told, and how often one gave way."""
    first = start(url, "append", 999, 3).communicate(timeout=100)[0]
    running = [
        start(url, role, 100 * place + number, rounds)
        for place, (role, count) in enumerate(roles.items())
        for number in range(count)
    ]
    outputs = [first]
    for process in running:
        output, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
        outputs.append(output)
    said = [line.split() for output in outputs for line in output.splitlines()]
    added = {value for word, value in said if word == "added"}
    gone = [value for word, value in said if word == "deleted"]
    assert len(gone) == len(set(gone)), "a document was deleted twice"
    return added, set(gone), sum(int(value) for word, value in said if word == "conflicts")


def check(url: str, added: set[str], gone: set[str]) -> None:
    dataset = open_dataset(url)
    live = [n for i in range(len(dataset.segments)) for n in dataset.live_documents(i).column("id").to_pylist()]
    assert len(live) == len(set(live))
    assert set(live) == added - gone
    totals = dataset.totals
    assert totals.documents - totals.deleted_documents == len(live)
    assert totals.deleted_documents == dataset.deletions.documents
    assert len(list(CommitLog(dataset.storage).history(dataset.commit))) == dataset.version
    assert verify(dataset).ok


@pytest.mark.parametrize(
    ("roles", "rounds"),
    [
        ({"append": 2, "delete": 2}, 5),
        pytest.param({"append": 3, "delete": 3, "compact": 1, "purge": 1}, 12, marks=pytest.mark.slow),
    ],
    ids=["append and delete", "all of them"],
)
def test_racing_processes_lose_nothing_and_bring_nothing_back(
    tmp_path: Path, roles: dict[str, int], rounds: int
) -> None:
    url = str(tmp_path / "set")
    check(url, *race(url, roles, rounds)[:2])


@pytest.mark.s3
@pytest.mark.slow
def test_the_same_on_a_real_object_store(s3_url: str) -> None:
    check(s3_url, *race(s3_url, {"append": 2, "delete": 2, "compact": 1, "purge": 1}, 5)[:2])
