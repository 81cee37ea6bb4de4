"""Purging: the bytes of deleted documents, and their ids, are nowhere; everything else is where it was."""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typing_extensions import Buffer, override

from datastore.dataset.durability.verify import verify
from datastore.dataset.log.tags import list_tags, set_tag
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.evolve import evolve
from datastore.dataset.operations.purge.plan import finish_plan, list_certificates
from datastore.dataset.operations.purge.purge import finish_purges, purge
from datastore.dataset.operations.vacuum import vacuum
from datastore.dataset.shards.files import put_tokenizer, shard_uid
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import sha256_hex
from datastore.errors import ConfigError, ConflictError, CorruptError, MissingError, StorageError
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import make_dataset, make_shard

SHARDS = [[3, 40, 5], [6], [7, 0, 9, 10]]
END_OF_TEXT = 11


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "set") if request.param == "local" else MemoryStorage(uuid.uuid4().hex)


@pytest.fixture
def dataset(storage: Storage) -> Dataset:
    return tokens_in(storage)


def tokens_in(storage: Storage) -> Dataset:
    shards = [make_shard(storage, shard_uid("made", i), lengths=lengths) for i, lengths in enumerate(SHARDS)]
    tokenizer = put_tokenizer(storage, b"{}", vocab_size=65_536, end_of_text=END_OF_TEXT)
    commit_shards(storage, shards, tokenizer=tokenizer)
    return open_dataset(storage)


def names_in(dataset: Dataset) -> list[str]:
    return [
        name for shard in range(len(dataset.segments)) for name in dataset.documents(shard).column("id").to_pylist()
    ]


def bytes_of(dataset: Dataset, shard: int, row: int) -> bytes:
    """The tokens of a document, as they are stored."""
    values, offsets = dataset.token_shard(shard)
    return values[offsets[row] : offsets[row + 1]].tobytes()


def everything(storage: Storage) -> Iterator[bytes]:
    return (storage.get(stat.key) for stat in storage.list())


def test_nothing_of_a_purged_document_is_left_and_nothing_else_has_changed(storage: Storage, dataset: Dataset) -> None:
    names, tokens = names_in(dataset), bytes_of(dataset, 0, 1)
    delete(storage, ids=[names[1]])
    report = purge(storage)
    assert (report.version, report.documents, report.tokens, report.shards, report.oldest) == (3, 1, 40, 1, 3)
    after = open_dataset(storage)
    assert not any(tokens in raw or tokens[:16] in raw for raw in everything(storage))
    documents = dataset.segments.shard(0).docs_path
    assert documents not in {stat.key for stat in storage.list()}
    assert [shard.uid for shard in after.segments] == [shard.uid for shard in dataset.segments]
    assert names_in(after) == [names[0], "", *names[2:]]
    assert after.token_shard(0)[1].tolist() == [0, 3, 43, 48]
    assert bytes_of(after, 0, 1) == np.full(40, END_OF_TEXT, "<u2").tobytes()
    assert after.deletions.rows(after.segments.shard(0).uid).tolist() == [1]
    assert (after.totals.documents, after.totals.tokens) == (8, 80)
    assert (after.totals.deleted_documents, after.commit.operation) == (1, "purge")
    assert verify(after).ok
    assert report.unnamed_files == 0


def test_old_versions_have_expired_and_their_files_are_gone(storage: Storage, dataset: Dataset) -> None:
    old = dataset.segments.shard(0)
    delete(storage, ids=[names_in(dataset)[0]])
    purge(storage)
    for version in (1, 2):
        with pytest.raises(MissingError, match="expired"):
            open_dataset(storage, version=version)
    keys = {stat.key for stat in storage.list()}
    assert old.path not in keys
    assert {shard.path for shard in open_dataset(storage).segments} <= keys
    assert len([key for key in keys if key.startswith("_segments/")]) == 1


def test_the_certificate_says_what_was_done_and_never_an_id(storage: Storage, dataset: Dataset) -> None:
    names = names_in(dataset)[:2]
    delete(storage, ids=names)
    report = purge(storage)
    certificate = report.certificate
    assert certificate is not None
    assert json.loads(storage.get(report.certificate_key))["finished"]
    assert list_certificates(storage) == [certificate]
    assert certificate.ids_sha256 == tuple(sorted(sha256_hex(name.encode()) for name in names))
    assert (certificate.version, certificate.oldest, certificate.oldest_before) == (3, 3, 1)
    old = dataset.segments.shard(0)
    assert {old.path, old.docs_path} <= set(certificate.files_removed)
    new = open_dataset(storage).segments.shard(0)
    assert set(certificate.files_written) == {new.path, new.docs_path}
    assert certificate.files_checked == len(certificate.files_removed) + 2
    assert not any(name in storage.get(report.certificate_key).decode() for name in names)
    assert open_dataset(storage).commit.config_digest not in {"", certificate.digest}
    assert list(storage.list("purges/plans")) == []


def test_purging_again_does_nothing_and_more_deletes_are_purged_later(storage: Storage, dataset: Dataset) -> None:
    names = names_in(dataset)
    assert not purge(storage).committed
    delete(storage, ids=[names[0]])
    assert purge(storage).committed
    again = purge(storage)
    assert (again.committed, again.version, again.documents) == (False, 3, 0)
    delete(storage, ids=[names[1]])
    second = purge(storage)
    assert (second.documents, second.tokens, second.version, second.oldest) == (1, 40, 5, 5)
    assert [certificate.documents for certificate in list_certificates(storage)] == [1, 1]
    assert names_in(open_dataset(storage))[:3] == ["", "", names[2]]
    assert verify(open_dataset(storage)).ok


def test_documents_may_be_named_in_the_purge_itself(storage: Storage, dataset: Dataset) -> None:
    names = names_in(dataset)
    report = purge(storage, ids=[names[1]], where="tokens = 40")
    assert (report.documents, report.version) == (1, 3)
    # Again: the id is gone, but a certificate knows it.
    again = purge(storage, ids=[names[1]])
    assert (again.committed, again.documents) == (False, 0)
    with pytest.raises(MissingError, match="nothing was purged"):
        purge(storage, ids=["nobody"])


def test_a_dry_run_says_what_would_go(storage: Storage, dataset: Dataset) -> None:
    set_tag(storage, "v1", dataset.commit)
    delete(storage, where="tokens = 3")
    before = sorted(stat.key for stat in storage.list())
    report = purge(storage, sources=["*"], where="tokens = 6", dry_run=True)
    assert (report.documents, report.shards, report.tags, report.committed) == (2, 2, ("v1",), False)
    assert sorted(stat.key for stat in storage.list()) == before


def test_tags_are_not_dropped_unasked_and_then_nothing_is_deleted_either(storage: Storage, dataset: Dataset) -> None:
    set_tag(storage, "v1", dataset.commit)
    with pytest.raises(ConfigError, match=r"tags=\['v1'\].*`drop_tags`"):
        purge(storage, where="tokens = 40")
    assert open_dataset(storage).version == 1
    report = purge(storage, where="tokens = 40", drop_tags=True)
    assert report.tags == ("v1",)
    assert list_tags(storage) == []
    assert report.certificate is not None
    assert report.certificate.tags_removed == ("v1",)


def test_an_append_that_comes_between_is_kept(storage: Storage, dataset: Dataset) -> None:
    delete(storage, where="tokens = 40")
    deleted = open_dataset(storage)
    shard = make_shard(storage, shard_uid("more", 0), lengths=[8])
    commit_shards(storage, [shard], tokenizer=dataset.commit.tokenizer)
    report = purge(deleted)
    assert report.version == 4
    after = open_dataset(storage)
    assert (after.totals.documents, after.totals.shards) == (9, 4)
    assert verify(after).ok
    with pytest.raises(MissingError, match="expired"):
        open_dataset(storage, version=3)


@pytest.mark.parametrize("between", ["delete", "purge", "compact", "overwrite"])
def test_another_change_of_the_same_shards_is_a_conflict(storage: Storage, dataset: Dataset, between: str) -> None:
    delete(storage, where="tokens = 40")
    deleted = open_dataset(storage)
    if between == "delete":
        delete(storage, where="tokens = 3")
    elif between == "purge":
        purge(storage)
    elif between == "compact":
        compact(storage)
    else:
        commit_shards(storage, [], operation="overwrite", tokenizer=dataset.commit.tokenizer)
    before = open_dataset(storage)
    keys = {stat.key for stat in storage.list()}
    with pytest.raises(ConflictError, match="Give the same purge again"):
        purge(deleted)
    assert open_dataset(storage).commit == before.commit
    assert {stat.key for stat in storage.list()} - {key for key in keys if key.startswith("_segments/")} <= keys
    assert list(storage.list("purges/plans")) == []
    assert purge(storage).committed == (between != "purge")
    assert verify(open_dataset(storage)).ok


@pytest.mark.usefixtures("dataset")
def test_a_delete_of_another_shard_merges_and_is_not_purged(storage: Storage) -> None:
    delete(storage, where="tokens = 40")
    deleted = open_dataset(storage)
    delete(storage, where="tokens = 6")
    assert purge(deleted).documents == 1
    assert names_in(open_dataset(storage)).count("") == 1
    assert open_dataset(storage).totals.deleted_documents == 2
    assert purge(storage).documents == 1


@pytest.mark.parametrize("by", ["compact", "overwrite"])
def test_what_only_old_versions_have_is_purged_as_well(storage: Storage, dataset: Dataset, by: str) -> None:
    tokens = bytes_of(dataset, 0, 1)
    delete(storage, where="tokens = 40")
    if by == "compact":
        compact(storage)
    else:
        commit_shards(storage, [], operation="overwrite", tokenizer=dataset.commit.tokenizer)
    assert any(tokens in raw for raw in everything(storage))
    newest = open_dataset(storage)
    commit_shards(storage, [make_shard(storage, shard_uid("more", 0), lengths=[8])], tokenizer=dataset.commit.tokenizer)
    report = purge(storage)
    assert (report.committed, report.shards, report.oldest) == (True, 0, newest.version)
    assert not any(tokens in raw for raw in everything(storage))
    # What holds nothing of it stays readable.
    assert verify(open_dataset(storage, version=newest.version)).ok
    with pytest.raises(MissingError, match="expired"):
        open_dataset(storage, version=newest.version - 1)


def test_a_dataset_that_was_only_appended_to_keeps_its_versions(storage: Storage) -> None:
    make_dataset(storage, SHARDS)
    make_dataset(storage, [[1]], name="more")
    assert not purge(storage).committed
    assert open_dataset(storage, version=1).totals.documents == 8


def test_records_become_blank(storage: Storage) -> None:
    with record_writer(storage) as out:
        out.write([{"id": f"person-{n}", "text": f"secret-{n}" * 3} for n in range(4)])
    report = purge(storage, ids=["person-2"])
    after = open_dataset(storage)
    assert [row["id"] for row in after.iter_records()] == ["person-0", "person-1", "person-3"]
    assert after.record_shard(0).to_pylist()[2] == {"id": None, "text": None}
    assert not any(b"secret-2" in raw or b"person-2" in raw for raw in everything(storage))
    assert report.certificate is not None
    assert report.certificate.ids_sha256 == (sha256_hex(b"person-2"),)
    assert verify(after).ok


class Halting(MemoryStorage):
    """Stops, as a kill does, at the `at`-th change."""

    at = 10**9

    def _step(self) -> None:
        self.at -= 1
        if self.at < 0:
            raise KeyboardInterrupt

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        self._step()
        super().put(key, *chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        self._step()
        super().put_new(key, *chunks)

    @override
    def delete(self, key: str) -> None:
        self._step()
        super().delete(key)


def test_a_purge_cut_off_anywhere_leaves_old_or_new_and_the_next_one_finishes() -> None:
    changes = 0
    while True:
        storage = Halting(uuid.uuid4().hex)
        dataset = tokens_in(storage)
        names, tokens = names_in(dataset), bytes_of(dataset, 0, 1)
        delete(storage, ids=[names[1]])
        storage.at = changes
        try:
            purge(storage)
        except KeyboardInterrupt:
            storage.at = 10**9
        else:
            break
        cut = open_dataset(storage)
        assert cut.commit.operation in {"delete", "purge"}
        assert verify(cut).ok
        assert cut.live_documents(0).column("id").to_pylist() == [names[0], names[2]]
        report = purge(storage)
        assert report.committed == (cut.commit.operation == "delete")
        found = list_certificates(storage)
        assert [certificate.documents for certificate in found] == [1]
        assert [certificate.ids_sha256 for certificate in found] == [(sha256_hex(names[1].encode()),)]
        assert not any(tokens in raw for raw in everything(storage))
        assert verify(open_dataset(storage)).ok
        assert not [s.key for s in storage.list("purges/plans")] or cut.commit.operation == "delete"
        changes += 1
    assert changes > 8


def stopped_at(step: str, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Cut a purge off; return the key of the plan that it has left."""
    tokens_in(storage)
    delete(storage, where="tokens = 40")
    with monkeypatch.context() as patched:
        patched.setattr(f"datastore.dataset.operations.purge.purge.{step}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            purge(storage)
    return [stat.key for stat in storage.list("purges/plans")]


def test_a_plan_that_was_never_committed_is_forgotten_after_a_day(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = stopped_at("publish", storage, monkeypatch)
    finish_purges(open_dataset(storage))
    assert [stat.key for stat in storage.list("purges/plans")] == left
    monkeypatch.setattr("datastore.dataset.operations.purge.purge._ABANDONED_S", -1.0)
    finish_purges(open_dataset(storage))
    assert list(storage.list("purges/plans")) == []


def test_a_plan_whose_version_another_commit_has_is_forgotten_at_once(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stopped_at("publish", storage, monkeypatch)
    assert purge(storage).committed
    assert list(storage.list("purges/plans")) == []


@pytest.mark.parametrize("step", ["finish_plan", "publish"])
def test_a_vacuum_finishes_a_purge_that_was_cut_off_after_its_commit(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    assert stopped_at(step, storage, monkeypatch)
    tokenizer = open_dataset(storage).commit.tokenizer
    commit_shards(storage, [make_shard(storage, shard_uid("more", 0), lengths=[3])], tokenizer=tokenizer)
    vacuum(storage, dry_run=False)
    assert list(storage.list("purges/plans")) == []
    assert len(list_certificates(storage)) == (step == "finish_plan")


def interrupt(target: object, _: object, build: object = None) -> None:
    if build is not None:
        build(open_dataset(target).commit)  # type: ignore[operator, call-overload]
    raise KeyboardInterrupt


class Keeping(MemoryStorage):
    """Says that it has removed a file, and has not."""

    @override
    def delete(self, key: str) -> None:
        if not key.startswith("shards/"):
            super().delete(key)


def test_a_file_that_comes_back_is_noticed_and_no_certificate_given() -> None:
    storage = Keeping(uuid.uuid4().hex)
    make_dataset(storage, SHARDS)
    with pytest.raises(StorageError, match="a file that was removed is there"):
        purge(storage, where="tokens = 40")
    assert list_certificates(storage) == []
    with pytest.raises(StorageError, match="a file that was removed is there"):
        purge(storage)


def test_files_that_no_version_names_are_counted(storage: Storage, dataset: Dataset) -> None:
    make_shard(storage, shard_uid("unfinished", 0), lengths=[1])
    delete(dataset, where="tokens = 40")
    assert purge(storage).unnamed_files == 2


def test_files_that_are_named_again_after_a_crash_are_not_removed(
    storage: Storage, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete(storage, where="tokens = 40")
    shards = list(dataset.segments)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("datastore.dataset.operations.purge.purge.finish_plan", killed)
    with pytest.raises(KeyboardInterrupt):
        purge(storage)
    monkeypatch.undo()
    commit_shards(storage, shards, operation="overwrite", tokenizer=dataset.commit.tokenizer)
    report = purge(storage)
    assert [certificate.documents for certificate in report.resumed] == [1]
    assert verify(open_dataset(storage)).ok
    assert open_dataset(storage).totals.deleted_documents == 0


def test_segments_that_a_version_to_be_kept_names_are_not_removed(storage: Storage) -> None:
    kept, gone, more = (make_shard(storage, shard_uid(name, 0), lengths=[9]) for name in ("kept", "gone", "more"))
    for shard in (kept, gone, kept):
        commit_shards(storage, [shard], operation="overwrite")
    commit_shards(storage, [more])
    report = purge(storage)
    assert (report.committed, report.oldest) == (True, 3)
    for version in (3, 4, 5):
        assert verify(open_dataset(storage, version=version)).ok
    assert gone.path not in {stat.key for stat in storage.list()}


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_rows_of_an_older_schema_stay_readable(storage: Storage, form: str) -> None:
    for part in range(2):
        with record_writer(storage, format=form) as out:  # type: ignore[arg-type]
            out.write([{**dict.fromkeys(open_names(storage)), "id": f"{part}-{n}"} for n in range(3)])
        evolve(
            storage,
            widen={"id": "large_string"} if part else None,
            add={f"new_{part}": "int64"},
            defaults={f"new_{part}": 7},
        )
    evolve(storage, rename={"old": "older"}, drop=["note"])
    delete(storage, ids=["0-1", "1-2"])
    deleted = open_dataset(storage)
    rows = list(deleted.iter_records())
    layouts = [shard.layout.schema_id for shard in deleted.segments]
    purge(storage)
    after = open_dataset(storage)
    assert list(after.iter_records()) == rows
    assert [shard.layout.schema_id for shard in after.segments] == layouts
    assert verify(after).ok
    assert compact(storage).shards_after == 1
    assert list(open_dataset(storage).iter_records()) == rows


def open_names(storage: Storage) -> list[str]:
    """The columns that the dataset has, or gets with its first rows."""
    try:
        return open_dataset(storage).schema.names
    except MissingError:
        return ["id", "old", "note"]


@pytest.mark.parametrize("key", ["datastore.json", "_log/_last", "shards/notes.txt", "../other/shards/ab/x.arrow", "x"])
def test_a_plan_that_names_what_is_no_file_of_data_removes_nothing(
    storage: Storage, dataset: Dataset, key: str
) -> None:
    delete(storage, ids=[names_in(dataset)[1]])
    report = purge(storage)
    assert report.certificate is not None
    wrong = msgspec.structs.replace(report.certificate, files_removed=(key, *report.certificate.files_removed))
    newest = open_dataset(storage)
    before = {stat.key for stat in storage.list()}
    with pytest.raises(CorruptError, match="makes no sense") as caught:
        finish_plan(newest, wrong)
    assert "purges/plans/" in str(caught.value)
    assert {stat.key for stat in storage.list()} == before


def test_a_certificate_under_anothers_name_is_named(storage: Storage, dataset: Dataset) -> None:
    delete(storage, ids=[names_in(dataset)[1]])
    report = purge(storage)
    storage.put(f"purges/{'0' * 32}.json", storage.get(report.certificate_key))
    with pytest.raises(CorruptError, match="purges/0000"):
        list_certificates(storage)
