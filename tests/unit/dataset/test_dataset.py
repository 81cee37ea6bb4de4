"""A dataset: made, appended to, overwritten, opened at any version - and what is said where that cannot be."""

import os
import uuid
from pathlib import Path

import msgspec
import numpy as np
import pytest

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.identity import create_dataset
from datastore.dataset.log.keys import INFO_KEY, commit_key
from datastore.dataset.log.tags import list_tags, read_tag, remove_tag, set_tag
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.shards.files import put_tokenizer, shard_uid, write_token_shard
from datastore.dataset.snapshot import open_dataset, split_reference
from datastore.document import seal
from datastore.errors import ConfigError, ConflictError, CorruptError, FormatError, MissingError, StorageError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import documents_of, make_dataset, make_shard


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "set") if request.param == "local" else MemoryStorage(uuid.uuid4().hex)


def test_what_was_committed_is_read(storage: Storage) -> None:
    dataset = make_dataset(storage, [[3, 0, 5], [], [2]])
    assert [offsets.tolist() for _, offsets in map(dataset.token_shard, range(3))] == [[0, 3, 3, 8], [0], [0, 2]]
    assert [table.num_rows for table in map(dataset.documents, range(3))] == [3, 0, 1]
    totals = dataset.totals
    assert (totals.shards, totals.documents, totals.tokens) == (3, 4, 10)
    assert totals.size_bytes == sum(shard.size_bytes + shard.docs_bytes for shard in dataset.segments)
    assert (dataset.version, dataset.kind, dataset.commit.operation) == (1, "tokens", "create")


def test_an_append_keeps_earlier_shards_first_and_earlier_versions_readable(storage: Storage) -> None:
    first = make_dataset(storage, [[1], [2]], name="first")
    second = make_dataset(storage, [[3]], name="second")
    assert [shard.uid for shard in second.segments] == [
        *(shard.uid for shard in first.segments),
        shard_uid("second", 0),
    ]
    assert (second.version, second.commit.operation) == (2, "append")
    again = open_dataset(storage, version=1)
    assert list(again.segments) == list(first.segments)
    assert again.commit == first.commit


def test_the_same_shards_twice_add_nothing(storage: Storage) -> None:
    make_dataset(storage, [[1], [2]])
    assert make_dataset(storage, [[1], [2]]).version == 1


def test_shards_that_are_there_already_are_skipped(storage: Storage) -> None:
    make_dataset(storage, [[1], [2]])
    dataset = make_dataset(storage, [[1], [2], [3]])
    assert dataset.version == 2
    assert dataset.totals.shards == 3


def test_one_uid_with_other_bytes_is_a_conflict(storage: Storage) -> None:
    dataset = make_dataset(storage, [[1]])
    forged = msgspec.structs.replace(dataset.segments.shard(0), digest=bytes(16))
    with pytest.raises(ConflictError, match="other bytes"):
        commit_shards(storage, [forged])


def test_a_shard_given_twice_is_refused(storage: Storage) -> None:
    shard = make_shard(storage, "0" * 32, lengths=[1])
    with pytest.raises(ConfigError, match="twice"):
        commit_shards(storage, [shard, shard])


def test_an_overwrite_holds_its_shards_only_and_can_be_undone_by_time_travel(storage: Storage) -> None:
    make_dataset(storage, [[1], [2]], name="old")
    commit = commit_shards(storage, [make_shard(storage, "a" * 32, lengths=[7])], operation="overwrite")
    assert (commit.version, commit.operation) == (2, "overwrite")
    assert open_dataset(storage).totals.tokens == 7
    assert open_dataset(storage, version=1).totals.tokens == 3


def test_a_dataset_may_start_empty(storage: Storage) -> None:
    commit_shards(storage, [])
    assert len(open_dataset(storage).segments) == 0
    assert make_dataset(storage, [[1]]).version == 2


def test_the_ingest_and_its_settings_stand_in_the_commit(storage: Storage) -> None:
    commit = commit_shards(storage, [], ingest_id="i", config_digest="c")
    assert (commit.ingest_id, commit.config_digest) == ("i", "c")


def test_the_exact_tokenizer_comes_back(storage: Storage) -> None:
    raw = b'{"a": 1}\n'
    tokenizer = put_tokenizer(storage, raw, vocab_size=100, end_of_text=0)
    commit_shards(storage, [make_shard(storage, "a" * 32, lengths=[7])], tokenizer=tokenizer)
    assert open_dataset(storage).tokenizer() == raw
    assert open_dataset(storage).commit.tokenizer == tokenizer


def test_a_dataset_without_a_tokenizer_says_none(storage: Storage) -> None:
    assert make_dataset(storage, [[1]]).tokenizer() is None


def test_another_tokenizer_than_the_dataset_s_is_refused(storage: Storage) -> None:
    first, second = (put_tokenizer(storage, raw, vocab_size=9, end_of_text=0) for raw in (b"{}", b"[]"))
    commit_shards(storage, [make_shard(storage, "a" * 32, lengths=[7])], tokenizer=first)
    for other in (second, None):
        with pytest.raises(ConfigError, match="tokenizer is not the one"):
            commit_shards(storage, [make_shard(storage, "b" * 32, lengths=[7])], tokenizer=other)
    assert open_dataset(storage).version == 1


def test_documents_that_do_not_match_their_rows_are_refused(storage: Storage) -> None:
    values, offsets = np.arange(5, dtype=np.uint16), np.array([0, 2, 5])
    for lengths in ([2], [2, 2], [3, 2]):
        with pytest.raises(ConfigError, match="do not match"):
            write_token_shard(
                storage, uid="a" * 32, values=values, offsets=offsets, documents=documents_of("a" * 32, lengths)
            )
    assert list(storage.list()) == []


def test_the_card_tells_what_is_there(storage: Storage) -> None:
    dataset = make_dataset(storage, [[1_234_567]])
    card = storage.get("README.md").decode()
    assert dataset.uuid in card
    assert "1,234,567" in card
    make_dataset(storage, [[10]], name="more")
    assert "1,234,577" in storage.get("README.md").decode()


class TestReferences:
    @pytest.mark.parametrize(
        ("url", "expected"),
        [
            ("data/books", ("data/books", "")),
            ("data/books@12", ("data/books", "12")),
            ("s3://bucket/books@v1.0", ("s3://bucket/books", "v1.0")),
            ("s3://key:secret@host/books", ("s3://key:secret@host/books", "")),
            ("sftp://me@host/books@3", ("sftp://me@host/books", "3")),
            ("memory://m@2", ("memory://m", "2")),
            ("a@b/c", ("a@b/c", "")),
            ("books@", ("books@", "")),
            ("@12", ("@12", "")),
            ("", ("", "")),
        ],
    )
    def test_a_url_may_end_in_a_version_or_a_tag(self, url: str, expected: tuple[str, str]) -> None:
        assert split_reference(url) == expected

    def test_version_and_tag_open_from_the_url(self, tmp_path: Path) -> None:
        url = str(tmp_path / "set")
        set_tag(LocalStorage(tmp_path / "set"), "v1.0", make_dataset(url, [[1]], name="a").commit)
        make_dataset(url, [[2]], name="b")
        assert open_dataset(url).version == 2
        assert open_dataset(f"{url}@1").version == open_dataset(f"{url}@v1.0").version == 1
        assert open_dataset(url, tag="v1.0").totals.tokens == open_dataset(Path(url), version=1).totals.tokens == 1

    def test_two_versions_at_once_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="two versions"):
            open_dataset(f"{tmp_path}/set@1", tag="v1")
        with pytest.raises(ConfigError, match="a version and a tag"):
            open_dataset(f"{tmp_path}/set", version=1, tag="v1")

    def test_unknown_ones_are_said_with_what_there_is(self, storage: Storage) -> None:
        set_tag(storage, "good", make_dataset(storage, [[1]]).commit)
        with pytest.raises(MissingError, match="newest=1"):
            open_dataset(storage, version=2)
        with pytest.raises(MissingError, match="good"):
            open_dataset(storage, tag="bad")


class TestTags:
    def test_a_tag_is_set_once_unless_replaced_on_purpose(self, storage: Storage) -> None:
        first = make_dataset(storage, [[1]], name="a").commit
        second = make_dataset(storage, [[2]], name="b").commit
        assert set_tag(storage, "v1", first) == set_tag(storage, "v1", first)
        with pytest.raises(ConflictError, match="names another version"):
            set_tag(storage, "v1", second)
        assert read_tag(storage, "v1").version == 1
        set_tag(storage, "v1", second, replace=True)
        assert read_tag(storage, "v1").version == 2

    def test_a_tag_in_another_s_place_opens_nothing(self, storage: Storage) -> None:
        set_tag(storage, "old", make_dataset(storage, [[1]], name="a").commit)
        set_tag(storage, "new", make_dataset(storage, [[2]], name="b").commit)
        storage.put("refs/tags/old.json", storage.get("refs/tags/new.json"))
        with pytest.raises(CorruptError, match="another's name"):
            open_dataset(storage, tag="old")

    def test_a_tag_opens_only_the_version_that_was_tagged(self, storage: Storage) -> None:
        commit = make_dataset(storage, [[1]]).commit
        set_tag(storage, "v1", commit)
        storage.put(commit_key(1), seal(msgspec.structs.replace(commit, writer="someone else")))
        with pytest.raises(CorruptError, match="not the one that was tagged"):
            open_dataset(storage, tag="v1")

    def test_tags_are_listed_and_removed(self, storage: Storage) -> None:
        commit = make_dataset(storage, [[1]]).commit
        for name in ("b", "a.1", "C"):
            set_tag(storage, name, commit)
        assert list_tags(storage) == ["C", "a.1", "b"]
        remove_tag(storage, "b")
        remove_tag(storage, "b")
        assert list_tags(storage) == ["C", "a.1"]

    @pytest.mark.parametrize("name", ["", "12", ".hidden", "a/b", "../x", "a b", "-x", "x" * 129, "ä"])
    def test_a_name_that_could_be_misread_is_refused(self, storage: Storage, name: str) -> None:
        commit = make_dataset(storage, [[1]]).commit
        with pytest.raises(ConfigError, match="not a valid tag"):
            set_tag(storage, name, commit)


class TestTheWrongPlace:
    def test_nothing_there(self, storage: Storage) -> None:
        with pytest.raises(MissingError, match="no dataset there"):
            open_dataset(storage)

    def test_an_empty_url(self) -> None:
        with pytest.raises(ConfigError, match="empty"):
            open_dataset("")

    def test_a_folder_of_other_files_is_neither_read_nor_written(self, storage: Storage) -> None:
        storage.put("notes/todo.txt", b"x")
        with pytest.raises(FormatError, match="not a dataset"):
            open_dataset(storage)
        with pytest.raises(ConfigError, match="not a dataset"):
            commit_shards(storage, [])
        assert [stat.key for stat in storage.list()] == ["notes/todo.txt"]

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises((MissingError, StorageError)):
            open_dataset(tmp_path / "file")
        with pytest.raises(StorageError):
            make_dataset(tmp_path / "file", [[1]])
        assert (tmp_path / "file").read_text() == "x"

    def test_a_dataset_whose_identity_is_gone_gets_no_new_one(self, storage: Storage) -> None:
        make_dataset(storage, [[1]])
        storage.delete(INFO_KEY)
        with pytest.raises(FormatError, match="not a dataset"):
            open_dataset(storage)
        with pytest.raises(ConfigError, match="not a dataset"):
            make_dataset(storage, [[2]], name="more")

    def test_what_a_writer_left_that_died_early_is_no_dataset_and_in_nobody_s_way(self, storage: Storage) -> None:
        make_shard(storage, "a" * 32, lengths=[1])
        storage.put("_probe/probe-1", b"first")
        with pytest.raises(MissingError, match="no dataset there"):
            open_dataset(storage)
        assert make_dataset(storage, [[1]]).version == 1

    def test_an_ingest_that_has_not_committed(self, storage: Storage) -> None:
        create_dataset(storage)
        with pytest.raises(MissingError, match="no version yet"):
            open_dataset(storage)

    def test_a_newer_format_is_refused_by_reader_and_writer(self, storage: Storage) -> None:
        info = make_dataset(storage, [[1]]).info
        storage.put(INFO_KEY, seal(msgspec.structs.replace(info, format=2)))
        for use in (open_dataset, create_dataset):
            with pytest.raises(FormatError, match="newer format"):
                use(storage)

    def test_an_unknown_feature_is_refused_not_misread(self, storage: Storage) -> None:
        info = make_dataset(storage, [[1]]).info
        storage.put(INFO_KEY, seal(msgspec.structs.replace(info, features=("from-the-future",))))
        for use in (open_dataset, create_dataset):
            with pytest.raises(FormatError, match="from-the-future"):
                use(storage)

    def test_a_newer_commit_is_refused(self, storage: Storage) -> None:
        commit = make_dataset(storage, [[1]]).commit
        storage.put(commit_key(1), seal(msgspec.structs.replace(commit, format=2)))
        with pytest.raises(FormatError, match="newer format"):
            open_dataset(storage)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(StorageError):
            make_dataset(tmp_path / "set", [[1]])
        tmp_path.chmod(0o700)


class TestDamage:
    def test_a_shard_of_another_size_or_content_is_not_read(self, storage: Storage) -> None:
        dataset = make_dataset(storage, [[100]])
        path = dataset.segments.shard(0).path
        raw = storage.get(path)
        for bad in (raw[:-1], raw + b"x", raw[:700] + b"\0\0" + raw[702:], b"x"):
            storage.put(path, bad)
            with pytest.raises(CorruptError, match=r"shards/.*Restore"):
                dataset.token_shard(0)
        storage.delete(path)
        with pytest.raises(MissingError):
            dataset.token_shard(0)

    def test_a_segment_that_is_gone_or_damaged_is_said_by_name(self, storage: Storage) -> None:
        dataset = make_dataset(storage, [[100]])
        key = f"_segments/{dataset.commit.segments[0].digest}.arrow"
        raw = storage.get(key)
        storage.put(key, raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(CorruptError, match=key):
            len(open_dataset(storage).segments)
        storage.delete(key)
        with pytest.raises(MissingError, match=key):
            len(open_dataset(storage).segments)

    def test_a_tokenizer_of_other_bytes_is_not_handed_out(self, storage: Storage) -> None:
        tokenizer = put_tokenizer(storage, b"{}", vocab_size=9, end_of_text=0)
        commit_shards(storage, [], tokenizer=tokenizer)
        storage.put(f"tokenizers/{tokenizer.sha256}.json", b"[]")
        with pytest.raises(CorruptError, match="sha256"):
            open_dataset(storage).tokenizer()

    def test_records_are_not_read_from_tokens(self, storage: Storage) -> None:
        dataset = make_dataset(storage, [[1]])
        with pytest.raises(ConfigError, match="holds tokens, not records"):
            list(dataset.iter_records())


def test_segments_stay_few_over_many_commits(storage: Storage) -> None:
    for index in range(40):
        dataset = make_dataset(storage, [[1]], name=str(index))
    assert len(dataset.commit.segments) <= 4
    assert [shard.uid for shard in dataset.segments] == [shard_uid(str(index), 0) for index in range(40)]
    assert len(list(CommitLog(storage).history(dataset.commit))) == 40
