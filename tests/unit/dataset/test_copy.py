"""Copies and clones: the same bytes in another place, each checked on its way, and nothing half visible."""

import uuid
from pathlib import Path

import pytest
from typing_extensions import Buffer

from datastore.dataset.diff import diff
from datastore.dataset.durability.parity import protect
from datastore.dataset.durability.repair import repair
from datastore.dataset.durability.verify import verify
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.tags import list_tags, set_tag
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.clone import clone
from datastore.dataset.operations.copy import copy
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.expire import expire
from datastore.dataset.operations.vacuum import vacuum
from datastore.dataset.roots import place_dataset
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, ConflictError, CorruptError, FormatError, MissingError
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.wrappers import LinkedStorage, is_link
from datastore.testing.examples import make_dataset, make_shard


@pytest.fixture
def source() -> MemoryStorage:
    """Four versions: two appends, an overwrite, a delete; the second is tagged."""
    storage = MemoryStorage(uuid.uuid4().hex)
    make_dataset(storage, [[3, 4], [5]])
    set_tag(storage, "two", make_dataset(storage, [[6, 1]], name="more").commit)
    commit_shards(storage, [make_shard(storage, uuid.uuid4().hex, lengths=[2, 2, 2])], operation="overwrite")
    delete(storage, ids=open_dataset(storage).documents(0)["id"].to_pylist()[:1])
    return storage


@pytest.fixture
def target() -> MemoryStorage:
    return MemoryStorage(uuid.uuid4().hex)


def everything(storage: MemoryStorage, *folders: str) -> dict[str, bytes]:
    return {stat.key: storage.get(stat.key) for folder in folders for stat in storage.list(folder)}


def ids(dataset: Dataset) -> list[str]:
    return [name for index in range(len(dataset.segments)) for name in dataset.live_documents(index)["id"].to_pylist()]


class Failing(MemoryStorage):
    """Dies at the write number `left`."""

    def __init__(self, name: str, left: int) -> None:
        super().__init__(name)
        self.left = left

    def put(self, key: str, *chunks: Buffer) -> None:
        self._count()
        super().put(key, *chunks)

    def put_new(self, key: str, *chunks: Buffer) -> None:
        self._count()
        super().put_new(key, *chunks)

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


# Copies.


def test_a_copy_is_the_same_dataset_at_the_same_version(source: MemoryStorage, target: MemoryStorage) -> None:
    report = copy(source, target)
    old, new = open_dataset(source), open_dataset(target)
    assert (new.uuid, new.commit, ids(new)) == (old.uuid, old.commit, ids(old))
    assert (report.version, report.oldest, report.files, report.commits) == (4, 4, 2, 4)
    assert everything(target, "_log") == everything(source, "_log")
    assert verify(new).ok
    with pytest.raises(MissingError, match=r"expired .*oldest=4"):
        open_dataset(target, version=3)
    assert list_tags(target) == []


def test_with_all_versions_each_one_and_its_tags_are_there(source: MemoryStorage, target: MemoryStorage) -> None:
    copy(source, target, all_versions=True)
    for version in (1, 2, 3, 4):
        assert ids(open_dataset(target, version=version)) == ids(open_dataset(source, version=version))
        assert verify(open_dataset(target, version=version)).ok
    assert open_dataset(target, tag="two").version == 2
    folders = ("_log", "_segments", "shards", "docs", "deletions", "refs")
    assert everything(target, *folders) == everything(source, *folders)


def test_what_has_expired_is_not_brought(source: MemoryStorage, target: MemoryStorage) -> None:
    expire(source, keep_last=2)
    assert copy(source, target, all_versions=True).oldest == 2
    with pytest.raises(MissingError, match="expired"):
        open_dataset(target, version=1)


def test_copying_again_brings_only_what_is_new(source: MemoryStorage, target: MemoryStorage) -> None:
    copy(source, target)
    again = copy(source, target)
    assert (again.files, again.present, again.commits) == (0, 2, 0)
    make_dataset(source, [[9]], name="later")
    set_tag(source, "now", open_dataset(source).commit)
    more = copy(source, target)
    assert (more.files, more.present, more.commits, more.tags) == (2, 2, 1, 1)
    assert open_dataset(target, tag="now").version == 5
    assert copy(source, target, all_versions=True).oldest == 1
    assert ids(open_dataset(target, version=1)) == ids(open_dataset(source, version=1))
    assert verify(open_dataset(target)).ok


@pytest.mark.parametrize("all_versions", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["update", "new"])
def test_a_copy_that_stops_anywhere_shows_the_old_or_the_new_and_goes_on(
    source: MemoryStorage, *, all_versions: bool, first: bool
) -> None:
    for stop in range(60):
        name = uuid.uuid4().hex
        if not first:
            old = MemoryStorage(f"{name}-source")
            for key, raw in everything(source, "").items():
                old.put(key, raw)
            copy(old, MemoryStorage(name), all_versions=all_versions)
            make_dataset(old, [[9], [8]], name="later")
            make_dataset(old, [[9], [8]], name="latest")
        else:
            old = source
        newest = open_dataset(old)
        try:
            copy(old, Failing(name, stop), all_versions=all_versions)
        except KeyboardInterrupt:
            pass
        else:
            assert stop > 10
            break
        if first and CommitLog(MemoryStorage(name)).newest() is None:
            with pytest.raises((MissingError, FormatError)):
                open_dataset(MemoryStorage(name))
        else:
            seen = open_dataset(MemoryStorage(name))
            assert seen.version in {4, newest.version}
            assert verify(seen).ok or seen.version == 4
            assert ids(seen) == ids(open_dataset(old, version=seen.version))
        copy(old, MemoryStorage(name), all_versions=all_versions)
        assert open_dataset(MemoryStorage(name)).commit == newest.commit
        assert verify(open_dataset(MemoryStorage(name))).ok
    else:
        pytest.fail("the copy never ended")


def test_a_damaged_source_is_found_and_named(source: MemoryStorage, target: MemoryStorage) -> None:
    path = open_dataset(source).segments.shard(0).path
    raw = bytearray(source.get(path))
    raw[100] ^= 1
    source.put(path, bytes(raw))
    with pytest.raises(CorruptError, match=path):
        copy(source, target)
    with pytest.raises(MissingError):
        open_dataset(target)


def test_a_file_of_another_size_is_brought_again(source: MemoryStorage, target: MemoryStorage) -> None:
    path = open_dataset(source).segments.shard(0).path
    target.put(path, b"part of it")
    assert copy(source, target).files == 2
    assert verify(open_dataset(target)).ok


def test_a_broken_chain_is_not_copied(source: MemoryStorage, target: MemoryStorage) -> None:
    other = MemoryStorage(uuid.uuid4().hex)
    make_dataset(other, [[1]])
    make_dataset(other, [[2]], name="more")
    source.put(f"_log/{2:020}.json", other.get(f"_log/{2:020}.json"))
    with pytest.raises(CorruptError, match="not the one that the next was built on"):
        copy(source, target)


def test_a_copy_that_was_written_to_is_no_copy_any_more(source: MemoryStorage, target: MemoryStorage) -> None:
    copy(source, target)
    make_dataset(target, [[1]], name="own")
    with pytest.raises(ConflictError, match="versions that the source does not have"):
        copy(source, target)
    make_dataset(source, [[1]], name="other")
    with pytest.raises(ConflictError, match="versions that the source does not have"):
        copy(source, target)


def test_another_dataset_is_not_written_over(source: MemoryStorage, target: MemoryStorage) -> None:
    make_dataset(target, [[1]])
    before = everything(target, "")
    with pytest.raises(ConfigError, match="another dataset"):
        copy(source, target)
    with pytest.raises(ConfigError, match="same place"):
        copy(source, source)
    with pytest.raises(ConfigError, match="holds a dataset"):
        clone(source, target)
    other = MemoryStorage(uuid.uuid4().hex)
    other.put("notes.txt", b"mine")
    for make in (copy, clone):
        with pytest.raises(ConfigError, match="not a dataset"):
            make(source, other)
    with pytest.raises(ConfigError, match="newest version, or of all"):
        copy(f"{source.url}@1", target)
    assert everything(target, "") == before


def test_an_ingest_into_a_copy_knows_the_files_of_the_source(tmp_path: Path, target: MemoryStorage) -> None:
    source, folder = MemoryStorage(uuid.uuid4().hex), tmp_path / "src"
    folder.mkdir()
    (folder / "a.txt").write_text("some text")
    settings = IngestSettings(workers=1)
    ingest([str(folder)], source.url, settings=settings)
    (folder / "b.txt").write_text("more text")
    ingest([str(folder)], source.url, settings=settings)
    copy(source, target)
    assert not ingest([str(folder)], target.url, settings=settings).added


def test_vacuum_of_a_copy_keeps_it_whole(source: MemoryStorage, target: MemoryStorage) -> None:
    copy(source, target, all_versions=True)
    make_dataset(source, [[1]], name="later")
    copy(source, target)
    for key, (raw, written) in target._values.items():
        target._values[key] = (raw, written - 1e6)
    assert vacuum(target, dry_run=False).removed["shards"].files == 3
    assert verify(open_dataset(target)).ok


# Clones.


def test_a_clone_has_the_data_and_a_history_of_its_own(source: MemoryStorage, target: MemoryStorage) -> None:
    report = clone(source, target)
    old, new = open_dataset(source), open_dataset(target)
    assert (new.version, new.commit.operation) == (1, "clone")
    assert new.uuid == report.uuid != old.uuid
    assert new.commit.origin is not None
    assert (new.commit.origin.uuid, new.commit.origin.version, new.commit.origin.url) == (old.uuid, 4, source.url)
    assert ids(new) == ids(old)
    assert verify(new).ok
    found = diff(old, new)
    assert (found.added.documents, found.removed.documents) == (0, 0)
    for key in everything(source, ""):
        source.delete(key)
    assert verify(open_dataset(target)).ok


def test_any_version_can_be_cloned(source: MemoryStorage, target: MemoryStorage) -> None:
    clone(f"{source.url}@two", target)
    assert ids(open_dataset(target)) == ids(open_dataset(source, version=2))


@pytest.mark.parametrize("shallow", [False, True])
def test_a_clone_that_stops_anywhere_shows_nothing_and_goes_on(source: MemoryStorage, *, shallow: bool) -> None:
    for stop in range(60):
        name = uuid.uuid4().hex
        try:
            clone(source, Failing(name, stop), shallow=shallow)
        except KeyboardInterrupt:
            pass
        else:
            assert stop > 5
            break
        if CommitLog(MemoryStorage(name)).newest() is None:
            clone(source, MemoryStorage(name), shallow=shallow)
        assert ids(open_dataset(MemoryStorage(name))) == ids(open_dataset(source))
        assert verify(open_dataset(MemoryStorage(name))).ok


@pytest.mark.parametrize("shallow", [False, True])
def test_the_same_clone_given_again_is_done(source: MemoryStorage, target: MemoryStorage, *, shallow: bool) -> None:
    first = clone(source, target, shallow=shallow)
    target.delete("README.md")
    target.delete("_log/_last")
    again = clone(source, target, shallow=shallow)
    assert (again.uuid, again.files, again.shards) == (first.uuid, 0, first.shards)
    assert open_dataset(target).version == 1
    assert target.get("README.md")
    with pytest.raises(ConfigError, match="holds a dataset"):
        clone(f"{source.url}@2", target, shallow=shallow)
    with pytest.raises(ConfigError, match="holds a dataset"):
        clone(source, target, shallow=not shallow)
    make_dataset(target, [[1]], name="its own")
    with pytest.raises(ConfigError, match="holds a dataset"):
        clone(source, target, shallow=shallow)


def test_a_shallow_clone_reads_the_source_and_copies_nothing(source: MemoryStorage, target: MemoryStorage) -> None:
    report = clone(f"{source.url}@2", target, shallow=True)
    new = open_dataset(target)
    assert (report.files, everything(target, "shards", "docs")) == (0, {})
    assert "references" in new.commit.features
    assert ids(new) == ids(open_dataset(source, version=2))
    assert [values.tolist() for values in [new.token_shard(0)[0]]] == [
        open_dataset(source, version=2).token_shard(0)[0].tolist()
    ]
    assert verify(new).ok


def test_what_a_shallow_clone_writes_stays_with_it(source: MemoryStorage, target: MemoryStorage) -> None:
    clone(f"{source.url}@2", target, shallow=True)
    before = everything(source, "")
    make_dataset(target, [[7]], name="own")
    delete(target, ids=ids(open_dataset(target))[:1])
    expire(target, keep_last=1)
    for key, (raw, written) in target._values.items():
        target._values[key] = (raw, written - 1e6)
    vacuum(target, dry_run=False)
    assert everything(source, "") == before
    new = open_dataset(target)
    assert len(ids(new)) == len(ids(open_dataset(source, version=2))) + 1 - 1
    assert verify(new).ok


def test_a_shallow_clone_breaks_when_the_source_removes_its_files_and_says_which(
    source: MemoryStorage, target: MemoryStorage
) -> None:
    clone(f"{source.url}@2", target, shallow=True)
    source_shard = open_dataset(target).segments.shard(0)
    source.delete(source_shard.path.removeprefix(f"{source.url}/"))
    assert [bad.path for bad in verify(open_dataset(target)).bad] == [source_shard.path]


def test_a_full_clone_of_a_shallow_one_is_whole(source: MemoryStorage, target: MemoryStorage) -> None:
    clone(source, target, shallow=True)
    whole = MemoryStorage(uuid.uuid4().hex)
    clone(target, whole)
    new = open_dataset(whole)
    assert "references" not in new.commit.features
    for storage in (source, target):
        for key in everything(storage, ""):
            storage.delete(key)
    assert verify(open_dataset(whole)).ok
    assert ids(open_dataset(whole))


def test_a_shallow_clone_of_a_shallow_one_leads_to_the_files(source: MemoryStorage, target: MemoryStorage) -> None:
    clone(source, target, shallow=True)
    second = MemoryStorage(uuid.uuid4().hex)
    clone(target, second, shallow=True)
    for key in everything(target, ""):
        target.delete(key)
    assert verify(open_dataset(second)).ok


def test_a_shallow_clone_is_not_copied_but_cloned(source: MemoryStorage, target: MemoryStorage) -> None:
    clone(source, target, shallow=True)
    with pytest.raises(ConfigError, match="no shards of its own"):
        copy(target, MemoryStorage(uuid.uuid4().hex))


def test_records_on_a_disk_are_mapped_through_a_shallow_clone(tmp_path: Path) -> None:
    with record_writer(tmp_path / "a") as out:
        out.write([{"text": "x"}, {"text": "y"}])
    clone(tmp_path / "a", tmp_path / "b", shallow=True)
    new = open_dataset(tmp_path / "b")
    assert new.to_arrow()["text"].to_pylist() == ["x", "y"]
    assert new.storage.local_path(new.segments.shard(0).path) is not None
    with record_writer(tmp_path / "b") as out:
        out.write([{"text": "z"}])
    assert [row["text"] for row in open_dataset(tmp_path / "b").iter_records()] == ["x", "y", "z"]


def test_without_the_feature_a_link_is_refused(target: MemoryStorage, tmp_path: Path) -> None:
    secret = tmp_path / "a" / "b" / "secret"
    secret.parent.mkdir(parents=True)
    secret.write_bytes(b"secret")
    storage: Storage = LinkedStorage(target, open_storage)
    assert storage.get(str(secret)) == b"secret"
    with pytest.raises(ConfigError):
        target.get(str(secret))
    for call in (storage.delete, lambda key: storage.put(key, b"x"), lambda key: storage.put_new(key, b"x")):
        with pytest.raises(ConfigError, match="not a valid key"):
            call(str(secret))
    assert secret.read_bytes() == b"secret"


@pytest.mark.parametrize("key", ["/", "/a", "://a/b", "s3://bucket", "memory://", "//a/b"])
def test_a_link_leads_to_a_file_below_a_folder(target: MemoryStorage, key: str) -> None:
    assert is_link(key)
    with pytest.raises((ConfigError, MissingError)):
        LinkedStorage(target, open_storage).get(key)


@pytest.mark.parametrize("copies", [1, 2], ids=["stripe", "mirrors"])
def test_to_and_from_several_disks(tmp_path: Path, source: MemoryStorage, target: MemoryStorage, copies: int) -> None:
    roots = [str(tmp_path / name) for name in ("a", "b")]
    first = str(tmp_path / "first")
    copy(source, first, all_versions=True)
    place_dataset(first, roots=roots, copies=copies)
    assert repair(first).ok
    make_dataset(source, [[7], [8]], name="later")
    copy(source, roots[0], all_versions=True)
    assert verify(open_dataset(roots[1])).ok
    assert len(list(tmp_path.rglob("shards/*/*.arrow"))) == copies * len(everything(source, "shards"))
    copy(roots[0], target, all_versions=True)
    assert everything(target, "_log", "shards", "refs") == everything(source, "_log", "shards", "refs")
    assert open_dataset(target).info.placement is None
    clone(roots[1], tmp_path / "light", shallow=True)
    assert verify(open_dataset(tmp_path / "light")).ok
    clone(tmp_path / "light", tmp_path / "whole")
    assert ids(open_dataset(tmp_path / "whole")) == ids(open_dataset(source))


def test_parity_goes_with_a_copy_and_not_with_a_clone(tmp_path: Path, source: MemoryStorage) -> None:
    protect(source, width=4)
    copy(source, tmp_path / "copy")
    assert list((tmp_path / "copy").rglob("*.xor"))
    assert verify(open_dataset(tmp_path / "copy")).ok
    clone(source, tmp_path / "clone")
    assert not list((tmp_path / "clone").rglob("*.xor"))
    assert verify(open_dataset(tmp_path / "clone")).ok
