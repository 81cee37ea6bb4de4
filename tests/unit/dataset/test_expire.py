"""Old versions expire: what can be read afterwards, what holds them back, and what it costs."""

import time
import uuid

import msgspec
import pytest

import datastore.dataset.operations.expire as expiring
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.manifest import Commit
from datastore.dataset.log.tags import list_tags, set_tag
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.expire import expire
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError, MissingError
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset, make_shard

DAY_S = 86_400.0


class Counting(MemoryStorage):
    """Counts what is asked for by name."""

    reads = 0

    def get(self, key: str) -> bytes:
        self.reads += 1
        return super().get(key)


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage(uuid.uuid4().hex)


def grow(storage: MemoryStorage, versions: int) -> None:
    """Append until there are that many versions."""
    for number in range(versions):
        make_dataset(storage, [[3, 4]], name=f"{uuid.uuid4().hex}-{number}")


def at(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let commits be made at that time."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(seconds))
    monkeypatch.setattr("datastore.dataset.operations.transaction.utc_now", lambda: stamp)


def test_an_expired_version_says_what_can_be_read_instead(storage: MemoryStorage) -> None:
    grow(storage, 5)
    report = expire(storage, keep_last=2)
    assert (report.oldest_before, report.oldest, report.expired, report.version) == (1, 4, 3, 6)
    with pytest.raises(MissingError, match=r"this version has expired .*version=3, oldest=4, newest=6"):
        open_dataset(storage, version=3)
    assert [open_dataset(storage, version=version).totals.shards for version in (4, 5, 6)] == [4, 5, 5]
    assert len(list(CommitLog(storage).history(open_dataset(storage).commit))) == 6


def test_what_has_expired_stays_so_whatever_is_written_next(storage: MemoryStorage) -> None:
    grow(storage, 3)
    expire(storage, keep_last=1)
    commit_shards(storage, [make_shard(storage, uuid.uuid4().hex, lengths=[1])], operation="overwrite")
    grow(storage, 1)
    assert open_dataset(storage).commit.min_version == 3


def test_a_tag_keeps_the_very_oldest_version(storage: MemoryStorage) -> None:
    grow(storage, 3)
    set_tag(storage, "first", open_dataset(storage, version=1).commit)
    report = expire(storage, keep_last=1)
    assert (report.oldest, report.expired, report.held_by) == (1, 0, "first")
    assert open_dataset(storage, tag="first").version == 1


def test_a_tag_keeps_its_version_and_all_after_it(storage: MemoryStorage) -> None:
    grow(storage, 6)
    set_tag(storage, "later", open_dataset(storage, version=4).commit)
    set_tag(storage, "paper", open_dataset(storage, version=3).commit)
    report = expire(storage, keep_last=1)
    assert (report.oldest, report.held_by) == (3, "paper")
    assert open_dataset(storage, tag="paper").version == 3
    with pytest.raises(MissingError, match="expired"):
        open_dataset(storage, version=2)


def test_a_dry_run_tells_the_same_and_writes_nothing(storage: MemoryStorage) -> None:
    grow(storage, 4)
    before = [(stat.key, storage.get(stat.key)) for stat in storage.list()]
    report = expire(storage, keep_last=2, dry_run=True)
    assert (report.oldest, report.version, report.dry_run) == (3, 4, True)
    assert [(stat.key, storage.get(stat.key)) for stat in storage.list()] == before


def test_expiring_again_and_again_wears_nothing_away(storage: MemoryStorage) -> None:
    grow(storage, 5)
    expire(storage, keep_last=3)
    for _ in range(4):
        assert expire(storage, keep_last=3).expired == 0
    assert open_dataset(storage).version == 6
    grow(storage, 1)
    assert expire(storage, keep_last=3).oldest == 4


def test_what_was_the_newest_within_the_time_can_still_be_read(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    for days in (50, 40, 20, 1):
        at(monkeypatch, now - days * DAY_S)
        grow(storage, 1)
    at(monkeypatch, now)
    assert expire(storage, older_than_s=60 * DAY_S, dry_run=True).oldest == 1
    # Thirty days ago version 2 was the newest; it was replaced since.
    assert expire(storage, older_than_s=30 * DAY_S, dry_run=True).oldest == 2
    assert expire(storage, older_than_s=30 * DAY_S, keep_last=4, dry_run=True).oldest == 1
    assert expire(storage, older_than_s=0, dry_run=True).oldest == 4
    assert expire(storage, older_than_s=30 * DAY_S).oldest == 2
    monkeypatch.setattr(expiring.time, "time", lambda: now + 60 * DAY_S)
    assert expire(storage, older_than_s=30 * DAY_S).oldest == 5
    assert expire(storage, older_than_s=0).expired == 0


@pytest.mark.parametrize("limits", [{}, {"keep_last": 0}, {"older_than_s": -1.0}])
def test_a_limit_is_needed_and_the_newest_stays(storage: MemoryStorage, limits: dict[str, int]) -> None:
    grow(storage, 2)
    with pytest.raises(ConfigError):
        expire(storage, **limits)


def test_an_expired_version_cannot_be_tagged(storage: MemoryStorage) -> None:
    grow(storage, 3)
    old = open_dataset(storage, version=1).commit
    expire(storage, keep_last=1)
    with pytest.raises(MissingError, match="expired"):
        set_tag(storage, "late", old)
    assert list_tags(storage) == []


def test_a_tag_that_an_expire_did_not_see_is_taken_back(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    grow(storage, 3)
    old = open_dataset(storage, version=1).commit
    checked = CommitLog.readable

    def expire_after_the_first_look(log: CommitLog, commit: Commit) -> Commit:
        found = checked(log, commit)
        monkeypatch.setattr(CommitLog, "readable", checked)
        expire(storage, keep_last=1)
        return found

    monkeypatch.setattr(CommitLog, "readable", expire_after_the_first_look)
    with pytest.raises(MissingError, match="expired"):
        set_tag(storage, "late", old)
    assert list_tags(storage) == []


@pytest.mark.parametrize("commits", [2, 300])
def test_opening_the_newest_asks_for_nothing_more_however_many_there_are(commits: int) -> None:
    storage = Counting(uuid.uuid4().hex)
    newest = make_dataset(storage, [[3]]).commit
    for _ in range(commits - 1):
        CommitLog(storage).append(lambda _: msgspec.structs.replace(newest, operation="again"))
    storage.reads = 0
    assert open_dataset(storage).version == commits
    # The dataset, the hint, the version it names, and that there is no next one.
    assert storage.reads == 4


def test_every_later_commit_that_lowers_it_is_overruled(storage: MemoryStorage) -> None:
    grow(storage, 3)
    expire(storage, keep_last=1)
    newest = open_dataset(storage).commit
    commit = CommitLog(storage).append(lambda _: msgspec.structs.replace(newest, min_version=1, operation="odd"))
    assert commit.min_version == 3


def test_a_tag_of_a_version_that_is_gone_holds_nothing_back(storage: MemoryStorage) -> None:
    grow(storage, 4)
    set_tag(storage, "old", open_dataset(storage, version=1).commit)
    # As a purge does, which has to drop versions whatever names them.
    newest = open_dataset(storage).commit
    CommitLog(storage).append(lambda _: msgspec.structs.replace(newest, min_version=3, operation="purge"))
    report = expire(storage, keep_last=1)
    assert (report.oldest, report.held_by) == (5, "")
