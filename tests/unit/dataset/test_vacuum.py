"""What vacuum removes, what it leaves, and what it must not be hurried into."""

import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import datastore.dataset.operations.vacuum as vacuuming
from datastore.dataset.durability.parity import protect
from datastore.dataset.durability.repair import repair
from datastore.dataset.durability.verify import verify
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.tags import set_tag
from datastore.dataset.operations.append import commit_shards, with_shards
from datastore.dataset.operations.expire import expire
from datastore.dataset.operations.transaction import draft_commit, publish
from datastore.dataset.operations.vacuum import DAY_S, vacuum
from datastore.dataset.roots import open_roots, place_dataset
from datastore.dataset.shards.inventory import KeySet
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError, ConflictError, CorruptError, MissingError
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Stat
from datastore.testing.examples import make_dataset, make_shard


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage(uuid.uuid4().hex)


def keys(storage: MemoryStorage, folder: str = "") -> set[str]:
    return {stat.key for stat in storage.list(folder)}


def age(storage: MemoryStorage, seconds: float, folder: str = "") -> None:
    """Make everything in `folder` older."""
    for key, (raw, written) in list(storage._values.items()):
        if key.startswith(folder):
            storage._values[key] = (raw, written - seconds)


def overwrite(storage: MemoryStorage) -> None:
    commit_shards(storage, [make_shard(storage, uuid.uuid4().hex, lengths=[5])], operation="overwrite")


def test_what_only_expired_versions_name_is_removed_and_nothing_else(storage: MemoryStorage) -> None:
    old = make_dataset(storage, [[3, 4], [5]])
    overwrite(storage)
    stays = keys(storage) - {key for shard in old.segments for key in (shard.path, shard.docs_path)}
    age(storage, 2 * DAY_S)
    assert vacuum(storage, dry_run=False).removed == {}
    expire(storage, keep_last=1)
    report = vacuum(storage, dry_run=False)
    assert {kind: amount.files for kind, amount in report.removed.items()} == {
        "shards": 2,
        "documents": 2,
        "segments": 1,
    }
    assert keys(storage) == stays - {f"_segments/{old.commit.segments[0].digest}.arrow"} | {
        f"_log/{3:020}.json",
    }
    assert verify(open_dataset(storage)).ok


def test_a_dry_run_counts_the_same_and_touches_nothing(storage: MemoryStorage) -> None:
    make_dataset(storage, [[3, 4], [5]])
    overwrite(storage)
    expire(storage, keep_last=1)
    age(storage, 2 * DAY_S)
    before = keys(storage)
    told = vacuum(storage)
    assert told.dry_run
    assert keys(storage) == before
    done = vacuum(storage, dry_run=False)
    assert (told.removed, told.listed) == (done.removed, done.listed)
    assert done.total.bytes == sum(amount.bytes for amount in done.removed.values()) > 0
    assert vacuum(storage, dry_run=False).removed == {}


def test_a_young_file_may_be_about_to_be_committed(storage: MemoryStorage) -> None:
    make_dataset(storage, [[3]])
    shard = make_shard(storage, uuid.uuid4().hex, lengths=[4, 4])
    report = vacuum(storage, dry_run=False)
    assert (report.removed, report.young.files) == ({}, 2)
    commit_shards(storage, [shard])
    assert verify(open_dataset(storage)).ok
    orphan = make_shard(storage, uuid.uuid4().hex, lengths=[4, 4])
    age(storage, 100, "shards")
    assert vacuum(storage, dry_run=False, older_than_s=99).total.files == 1
    assert orphan.path not in keys(storage)
    assert orphan.docs_path in keys(storage)


def test_a_tagged_version_is_whole_after_it(storage: MemoryStorage) -> None:
    set_tag(storage, "paper", make_dataset(storage, [[3, 4], [5]]).commit)
    overwrite(storage)
    overwrite(storage)
    age(storage, 2 * DAY_S)
    assert expire(storage, keep_last=1).held_by == "paper"
    assert vacuum(storage, dry_run=False).removed == {}
    assert verify(open_dataset(storage, tag="paper")).ok


def test_files_that_are_not_ours_and_the_log_are_never_touched(storage: MemoryStorage) -> None:
    make_dataset(storage, [[3]])
    storage.put("notes/plan.txt", b"mine")
    storage.put("model.bin", b"mine, too")
    storage.put("_log/_writer", b"a lease")
    storage.put("purges/0.json", b"a certificate")
    overwrite(storage)
    expire(storage, keep_last=1)
    age(storage, 9 * DAY_S)
    vacuum(storage, dry_run=False)
    kept = {"notes/plan.txt", "model.bin", "_log/_writer", "purges/0.json", f"_log/{1:020}.json", "README.md"}
    assert keys(storage) >= kept


def test_probes_and_what_a_failed_commit_left_go(storage: MemoryStorage) -> None:
    make_dataset(storage, [[3]])
    storage.put("_probe/probe-1", b"first")
    storage.put("_segments/" + "0" * 32 + ".arrow", b"of a commit that another overtook")
    storage.put("deletions/" + "0" * 32 + ".arrow", b"so")
    storage.put("tokenizers/" + "0" * 64 + ".json", b"so")
    age(storage, 2 * DAY_S)
    removed = vacuum(storage, dry_run=False).removed
    assert set(removed) == {"probes", "segments", "deletions", "tokenizers"}
    assert keys(storage, "_probe") == set()


def test_a_file_written_again_since_it_was_listed_stays(storage: MemoryStorage) -> None:
    class Late(MemoryStorage):
        """A writer stores the same shard again just after the listing."""

        def list(self, folder: str = "") -> list[Stat]:  # type: ignore[override]
            found = [*super().list(folder)]
            if folder == "":
                make_shard(storage, orphan.uid, lengths=[4, 4])
            return iter(found)  # type: ignore[return-value]

    make_dataset(storage, [[3]])
    orphan = make_shard(storage, uuid.uuid4().hex, lengths=[4, 4])
    age(storage, 2 * DAY_S)
    vacuum(Late(storage._name), dry_run=False)
    commit_shards(storage, [orphan])
    assert verify(open_dataset(storage)).ok


def test_a_commit_of_old_files_that_comes_between_is_seen(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(storage, [[3]])
    shard = make_shard(storage, uuid.uuid4().hex, lengths=[4, 4])
    age(storage, 2 * DAY_S)
    looked = vacuuming._look

    def commit_after_the_look(*given: object) -> object:
        found = looked(*given)  # type: ignore[arg-type]
        commit_shards(storage, [shard])
        return found

    monkeypatch.setattr(vacuuming, "_look", commit_after_the_look)
    assert vacuum(storage, dry_run=False).removed == {}
    assert verify(open_dataset(storage)).ok


@pytest.mark.parametrize("damage", ["segment", "commit"])
def test_a_damaged_version_stops_it_before_anything_is_removed(storage: MemoryStorage, damage: str) -> None:
    made = make_dataset(storage, [[3], [4]])
    make_dataset(storage, [[5]], name="more")
    make_shard(storage, uuid.uuid4().hex, lengths=[4, 4])
    age(storage, 2 * DAY_S)
    storage.put(
        f"_segments/{made.commit.segments[0].digest}.arrow" if damage == "segment" else f"_log/{1:020}.json",
        bytes(made.commit.segments[0].file_bytes),
    )
    before = keys(storage)
    with pytest.raises(CorruptError):
        vacuum(storage, dry_run=False)
    assert keys(storage) - {key for key in keys(storage) if key.startswith("_probe")} == before


def test_an_age_is_not_negative_and_a_version_not_a_dataset(storage: MemoryStorage) -> None:
    make_dataset(storage, [[3]])
    with pytest.raises(ConfigError, match="not an age"):
        vacuum(storage, older_than_s=-1)
    with pytest.raises(ConfigError, match="a version cannot be changed"):
        vacuum(f"{storage.url}@1")


def test_a_storage_that_knows_no_times_is_left_alone(storage: MemoryStorage) -> None:
    make_dataset(storage, [[3]])
    make_shard(storage, uuid.uuid4().hex, lengths=[4])
    for key, (raw, _) in storage._values.items():
        storage._values[key] = (raw, 0.0)
    report = vacuum(storage, dry_run=True, older_than_s=0)
    assert (report.removed, report.young.files) == ({}, 2)


def test_hidden_files_of_killed_writers_go(tmp_path: Path) -> None:
    make_dataset(tmp_path, [[3]])
    left = [tmp_path / "shards" / ".a.arrow.0123.tmp", tmp_path / "_log" / ".1.json.0123.tmp"]
    for path in left:
        path.write_bytes(bytes(100))
        os.utime(path, (time.time() - 2 * DAY_S,) * 2)
    young = tmp_path / "docs" / ".b.parquet.0123.tmp"
    young.write_bytes(bytes(100))
    assert (amount := vacuum(tmp_path).removed["unfinished_writes"]).files == 2
    assert amount.bytes == 200
    assert all(path.exists() for path in left)
    vacuum(tmp_path, dry_run=False)
    assert not any(path.exists() for path in left)
    assert young.exists()
    assert verify(open_dataset(tmp_path)).ok


# Ingests.


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"text number {number} " * 200)
    return folder


SETTINGS = IngestSettings(task_bytes=4096, workers=1)


def interrupted(sources: Path, to: str, monkeypatch: pytest.MonkeyPatch, *, after: int) -> None:
    """Run an ingest that dies when that many of its shards are stored."""
    from datastore.ingestion.sinks import documents as sinks

    stored = sinks.write_record_shard
    left = iter(range(after))

    def store(*given: object, **named: object) -> object:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return stored(*given, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(sinks, "write_record_shard", store)
        with pytest.raises(KeyboardInterrupt):
            ingest([str(sources)], to, settings=SETTINGS)


def test_an_ingest_that_goes_on_keeps_what_it_has_done(
    storage: MemoryStorage, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = lambda: ingest([str(sources)], storage.url, settings=SETTINGS)  # noqa: E731
    (sources / "0.txt").rename(sources.parent / "0.txt")
    make()
    (sources.parent / "0.txt").rename(sources / "zero.txt")
    (sources / "more.txt").write_text("more of it " * 400)
    interrupted(sources, storage.url, monkeypatch, after=1)
    age(storage, 0.9 * DAY_S)
    report = vacuum(storage, dry_run=False, older_than_s=60)
    assert (report.removed, report.of_ingests.files, len(report.running)) == ({}, 1, 1)
    resumed = make()
    assert resumed.tasks_resumed == 1
    assert verify(open_dataset(storage)).ok


def test_an_abandoned_ingest_goes_whole_and_can_be_begun_anew(
    storage: MemoryStorage, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(storage, [[1]])  # Tokens: the ingest below is of text, so the dataset has to be another.
    text = MemoryStorage(uuid.uuid4().hex)
    (sources / "0.txt").rename(sources.parent / "0.txt")
    ingest([str(sources)], text.url, settings=SETTINGS)
    (sources.parent / "0.txt").rename(sources / "zero.txt")
    interrupted(sources, text.url, monkeypatch, after=0)
    make_shard(text, uuid.uuid4().hex, lengths=[1])
    age(text, 2 * DAY_S)
    committed = open_dataset(text).commit.ingest_id
    report = vacuum(text, dry_run=False)
    assert set(report.removed) == {"ingests", "shards", "documents"}
    assert {key.split("/")[1] for key in keys(text, "ingests")} == {committed}
    again = ingest([str(sources)], text.url, settings=SETTINGS)
    assert (again.tasks_resumed, again.added) == (0, True)
    assert verify(open_dataset(text)).ok


def test_of_an_abandoned_ingest_tasks_go_before_the_plan_and_shards_last(
    storage: MemoryStorage,
) -> None:
    order: list[str] = []

    class Watched(MemoryStorage):
        def delete(self, key: str) -> None:
            order.append(key)
            super().delete(key)

    with record_writer(storage) as out:
        out.write([{"id": "a", "source": "s", "offset": 0, "text": "t"}])
    storage.put("ingests/0/plan.json", b"a plan")
    storage.put("ingests/0/done/1.json", b"a task")
    storage.put("ingests/0/rejects/1.jsonl", b"rejects")
    storage.put("shards/00/0.arrow", b"a shard")
    age(storage, 2 * DAY_S)
    vacuum(Watched(storage._name), dry_run=False)
    kinds = [key.split("/")[2 if key.startswith("ingests") else 0] for key in order if not key.startswith("_probe")]
    assert sorted(kinds[:2]) == ["done", "rejects"]
    assert kinds[2:] == ["plan.json", "shards"]


def test_the_journal_of_an_ingest_in_the_history_stays(storage: MemoryStorage, sources: Path) -> None:
    ingest([str(sources)], storage.url, settings=SETTINGS)
    (sources / "more.txt").write_text("more of it " * 400)
    ingest([str(sources)], storage.url, settings=SETTINGS)
    expire(storage, keep_last=1)
    age(storage, 2 * DAY_S)
    journals = keys(storage, "ingests")
    vacuum(storage, dry_run=False)
    assert keys(storage, "ingests") == journals
    assert not ingest([str(sources)], storage.url, settings=SETTINGS).added


def test_an_ingest_whose_shards_were_removed_makes_them_again(storage: MemoryStorage, sources: Path) -> None:
    first = ingest([str(sources)], storage.url, settings=SETTINGS)
    commit_shards_of_nothing(storage)
    expire(storage, keep_last=1)
    age(storage, 2 * DAY_S)
    assert vacuum(storage, dry_run=False).removed["shards"].files == first.shards
    again = ingest([str(sources)], storage.url, settings=SETTINGS)
    assert (again.documents, again.tasks_resumed) == (first.documents, 0)
    assert verify(open_dataset(storage)).ok


def commit_shards_of_nothing(storage: MemoryStorage) -> None:
    """Overwrite a record dataset with nothing."""
    newest = open_dataset(storage).commit
    from datastore.dataset.operations.append import commit_records

    commit_records(storage, [], schema=open_dataset(storage).schema, operation="overwrite")
    assert open_dataset(storage).version == newest.version + 1


def test_an_ingest_that_was_taken_for_abandoned_commits_nothing(
    storage: MemoryStorage, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datastore.ingestion.ingest as ingesting

    run: Callable[..., object] = ingesting._run

    def run_through_a_vacuum(*given: object) -> object:
        done = run(*given)
        age(storage, 2 * DAY_S, "shards")
        age(storage, 2 * DAY_S, "ingests")
        make_dataset(other := MemoryStorage(uuid.uuid4().hex), [[1]])
        commit = CommitLog(other).newest()
        assert commit is not None
        CommitLog(storage).append(lambda _: commit)
        monkeypatch.setattr(vacuuming, "keys_of_versions", lambda *_: iter(()))
        vacuum(storage, dry_run=False)
        return done

    monkeypatch.setattr(ingesting, "_run", run_through_a_vacuum)
    with pytest.raises(ConflictError, match="took this ingest for abandoned"):
        ingest([str(sources)], storage.url, settings=SETTINGS)
    assert open_dataset(storage).version == 1


# The set of keys.


def test_a_set_of_keys_finds_what_is_in_it_and_no_other() -> None:
    names = [f"shards/{number:04}.arrow" for number in range(1000)]
    found = KeySet([names[:500], names[500:]])
    assert len(found) == 1000
    assert found.has(names).all()
    assert not found.has([f"docs/{number:04}.arrow" for number in range(1000)]).any()
    assert not KeySet([]).has(names).any()


def test_a_missing_dataset_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        vacuum(LocalStorage(tmp_path / "none"))


# Several disks, and parity.


def old(folder: Path) -> None:
    """Make every file below `folder` two days old."""
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - 2 * DAY_S,) * 2)


@pytest.mark.parametrize("copies", [1, 2, 3], ids=["stripe", "two of three", "mirrors"])
def test_on_several_disks_each_copy_goes(tmp_path: Path, copies: int) -> None:
    roots = [str(tmp_path / name) for name in ("a", "b", "c")]
    place_dataset(roots[0], roots=roots[1:], copies=copies)
    make_dataset(open_roots(roots[0])[0], [[3, 4], [5], [6]])
    storage = open_dataset(roots[0]).storage
    commit_shards(storage, [make_shard(storage, uuid.uuid4().hex, lengths=[5])], operation="overwrite")
    hidden = tmp_path / "b" / "_log" / ".x.0123.tmp"
    hidden.write_bytes(b"left")
    expire(roots[1], keep_last=1)
    old(tmp_path)
    report = vacuum(roots[2], dry_run=False)
    assert report.removed["shards"].files == 3
    assert report.removed["unfinished_writes"].files == 1
    assert not hidden.exists()
    assert len(list(tmp_path.rglob("shards/*/*.arrow"))) == copies
    assert verify(open_dataset(roots[0])).ok


def test_what_a_parity_group_needs_stays_as_long_as_the_group(tmp_path: Path) -> None:
    made = make_dataset(tmp_path, [[3, 4], [5], [6]])
    protect(tmp_path, width=8)
    keep = list(made.segments)[:2]
    newest = open_dataset(tmp_path).commit
    commit = msgspec.structs.replace(
        with_shards(made.storage, draft_commit("odd", parent=newest), kept=(), shards=keep), parity=newest.parity
    )
    publish(made.storage, made.info, lambda _: commit)
    expire(tmp_path, keep_last=1)
    old(tmp_path)
    gone = made.segments.shard(2)
    assert "shards" not in vacuum(tmp_path, dry_run=False).removed
    assert (tmp_path / gone.path).exists()
    damaged = tmp_path / keep[0].path
    damaged.write_bytes(bytes(keep[0].size_bytes))
    assert repair(tmp_path).ok
    assert verify(open_dataset(tmp_path)).ok
    publish(made.storage, made.info, lambda _: msgspec.structs.replace(draft_commit("odd", parent=commit), parity=()))
    expire(tmp_path, keep_last=1)
    old(tmp_path)
    removed = vacuum(tmp_path, dry_run=False).removed
    assert removed["parity"].files > 0
    assert removed["shards"].files == 1
    assert not (tmp_path / gone.path).exists()
    assert verify(open_dataset(tmp_path)).ok


def test_what_is_not_called_like_a_file_of_ours_is_not_removed(storage: MemoryStorage) -> None:
    make_dataset(storage, [[3, 4]])
    ours = {f"shards/ab/{'ab' * 16}.arrow", f"docs/ab/{'ab' * 16}.parquet", f"_segments/{'ab' * 16}.arrow"}
    foreign = {"shards/notes.txt", "shards/ab/notes.txt", "docs/index.html", "deletions/why.md", "tokenizers/mine.json"}
    for key in ours | foreign:
        storage.put(key, b"x")
    age(storage, 2 * DAY_S)
    before = keys(storage)
    assert vacuum(storage, dry_run=False).total.files == len(ours)
    assert keys(storage) == before - ours
