"""Undelete: what one version deleted is back, what others deleted is not, and what is gone for good is counted."""

import uuid
from pathlib import Path

import pyarrow.compute as pc
import pytest

import datastore as ds
from datastore.dataset.durability.verify import verify
from datastore.dataset.operations import undelete as undeleting
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.expire import expire
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.operations.undelete import undelete
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, ConflictError, MissingError
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import make_dataset

SHARDS = [[3, 4, 5], [6], [7, 0, 9, 10]]


@pytest.fixture
def storage() -> Storage:
    return MemoryStorage(uuid.uuid4().hex)


@pytest.fixture
def dataset(storage: Storage) -> Dataset:
    return make_dataset(storage, SHARDS)


def ids_of(dataset: Dataset) -> list[str]:
    return [
        name
        for shard in range(len(dataset.segments))
        for name in dataset.live_documents(shard).column("id").to_pylist()
    ]


def test_what_one_version_deleted_is_back_and_what_others_did_is_not(storage: Storage, dataset: Dataset) -> None:
    names = ids_of(dataset)
    delete(storage, ids=[names[0], names[4]])
    delete(storage, ids=[names[1], names[3], names[5]])
    report = undelete(storage, of=2)
    assert (report.version, report.committed, report.documents, report.tokens, report.gone) == (4, True, 2, 10, 0)
    after = open_dataset(storage)
    assert ids_of(after) == [name for name in names if name not in {names[1], names[3], names[5]}]
    assert (after.totals.deleted_documents, after.totals.deleted_tokens) == (3, 4 + 6 + 0)
    assert after.deleted_spans.tolist() == [[3, 7], [12, 18]]
    assert verify(after).ok
    assert undelete(storage, of=3).documents == 3
    whole = open_dataset(storage)
    assert ids_of(whole) == names
    assert whole.commit.deletions == ()
    assert whole.commit.features == dataset.commit.features
    assert undelete(storage, of=3) == undelete(storage, of=3, dry_run=True)
    assert undelete(storage, of=3).gone == 3


def test_what_was_appended_since_stays(storage: Storage) -> None:
    with record_writer(storage) as out:
        out.write([{"n": n} for n in range(5)])
    delete(storage, where=pc.field("n") < 3)
    with record_writer(storage) as out:
        out.write([{"n": 9}])
    report = undelete(storage, of=2)
    assert (report.documents, report.tokens) == (3, 0)
    assert open_dataset(storage).to_arrow().column("n").to_pylist() == [0, 1, 2, 3, 4, 9]


def test_a_dry_run_commits_nothing(storage: Storage, dataset: Dataset) -> None:
    delete(storage, ids=ids_of(dataset)[:1])
    report = undelete(storage, of=2, dry_run=True)
    assert (report.version, report.committed, report.documents, report.tokens) == (2, False, 1, 3)
    assert open_dataset(storage).version == 2


def test_what_was_purged_never_comes_back(storage: Storage, dataset: Dataset) -> None:
    names = ids_of(dataset)
    delete(storage, ids=[names[0]])
    purge(storage)
    with pytest.raises(MissingError):
        undelete(storage, of=2)
    delete(storage, ids=[names[1], names[6]])
    last = open_dataset(storage).version
    purge(storage, ids=[names[2]])
    with pytest.raises(MissingError):
        undelete(storage, of=last)
    assert names[1] not in ids_of(open_dataset(storage))


def test_a_shard_that_a_purge_wrote_anew_is_left_alone(
    storage: Storage, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete(storage, ids=ids_of(dataset)[:2])
    then = open_dataset(storage)
    assert then.segments
    assert then.deletions  # Read by now: the purge removes their files.
    purge(storage)
    opened = undeleting.open_dataset
    monkeypatch.setattr(
        undeleting, "open_dataset", lambda where, version: {2: then, 1: dataset}.get(version) or opened(where, version)
    )
    report = undelete(storage, of=2)
    assert (report.documents, report.gone, report.committed) == (0, 2, False)


def test_what_a_compact_left_out_is_counted(storage: Storage, dataset: Dataset) -> None:
    delete(storage, ids=ids_of(dataset)[:2])
    compact(storage)
    report = undelete(storage, of=2)
    assert (report.documents, report.gone, report.committed) == (0, 2, False)


def test_a_version_that_deleted_nothing_or_is_not_there_is_refused(storage: Storage, dataset: Dataset) -> None:
    delete(storage, ids=ids_of(dataset)[:1])
    with pytest.raises(ConfigError, match="that version deleted nothing"):
        undelete(storage, of=1)
    with pytest.raises(MissingError):
        undelete(storage, of=7)
    delete(storage, ids=ids_of(dataset)[1:2])
    expire(storage, keep_last=1)
    with pytest.raises(MissingError):
        undelete(storage, of=2)


def test_a_delete_that_comes_between_is_not_lost(storage: Storage, dataset: Dataset) -> None:
    names = ids_of(dataset)
    delete(storage, ids=[names[0]])
    seen = open_dataset(storage)
    delete(storage, ids=[names[1]])
    with pytest.raises(ConflictError, match="undelete"):
        undelete(seen, of=2)
    assert ids_of(open_dataset(storage)) == names[2:]


def test_near_duplicates_come_back(tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog and runs away " * 5
    with ds.record_writer(tmp_path / "data") as out:
        out.write([{"id": str(n), "text": text} for n in range(3)])
    assert ds.dedup(tmp_path / "data").duplicates == 2
    report = ds.undelete(tmp_path / "data", of=2)
    assert (report.documents, ds.open(tmp_path / "data").to_arrow().num_rows) == (2, 3)
