"""Deleting: the documents that are meant are gone from the new version, all others and every old version stay."""

import uuid
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.durability.verify import verify
from datastore.dataset.operations import delete as deleting
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.selection import Matcher, Selection, read_ids
from datastore.dataset.shards.segment_file import SEGMENT_SCHEMA
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, ConflictError, CorruptError, DependencyError, MissingError
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import make_dataset

SHARDS = [[3, 4, 5], [6], [7, 0, 9, 10]]


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "set") if request.param == "local" else MemoryStorage(uuid.uuid4().hex)


@pytest.fixture
def dataset(storage: Storage) -> Dataset:
    return make_dataset(storage, SHARDS)


@pytest.fixture
def records(storage: Storage) -> Dataset:
    with record_writer(storage) as out:
        out.write([{"id": n, "source": f"part-{n % 2}", "note": None if n == 3 else "x" * n} for n in range(8)])
    return open_dataset(storage)


def ids_of(dataset: Dataset, *, live: bool = True) -> list[str]:
    read = dataset.live_documents if live else dataset.documents
    return [name for shard in range(len(dataset.segments)) for name in read(shard).column("id").to_pylist()]


def test_documents_are_deleted_by_id_and_stay_in_the_version_before(storage: Storage, dataset: Dataset) -> None:
    names = ids_of(dataset)
    report = delete(storage, ids=[names[1], names[7]])
    assert (report.version, report.documents, report.tokens, report.committed) == (2, 2, 14, True)
    assert [(shard.documents, shard.tokens) for shard in report.shards] == [(1, 4), (1, 10)]
    after = open_dataset(storage)
    assert ids_of(after) == [name for name in names if name not in {names[1], names[7]}]
    assert ids_of(after, live=False) == names
    assert ids_of(open_dataset(storage, version=1)) == names
    assert (after.commit.operation, after.totals.deleted_documents, after.totals.deleted_tokens) == ("delete", 2, 14)
    assert after.commit.segments == dataset.commit.segments
    assert verify(after).ok


conditions = st.sampled_from(
    [
        ("tokens > 4", pc.field("tokens") > 4, lambda row: row["tokens"] > 4),
        ('"offset" = 0', pc.field("offset") == 0, lambda row: row["offset"] == 0),
        ("id LIKE '%-1'", pc.match_like(pc.field("id"), "%-1"), lambda row: row["id"].endswith("-1")),
        ("false", pc.field("tokens") < 0, lambda _: False),
        ("true", pc.field("tokens") >= 0, lambda _: True),
    ]
)


@settings(max_examples=40)
@given(conditions, st.sampled_from(["sql", "pyarrow"]), st.lists(st.integers(0, 7), max_size=3), st.integers(1, 20))
def test_a_condition_means_the_same_rows_in_sql_in_pyarrow_and_in_python(
    condition: tuple, language: str, named: list[int], chunk: int
) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    rows = [row for shard in range(3) for row in make_dataset(storage, SHARDS).documents(shard).to_pylist()]
    ids = [rows[index]["id"] for index in named] or None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deleting, "_CHUNK_DOCUMENTS", chunk)
        delete(storage, ids=ids, where=condition[0] if language == "sql" else condition[1])
    expected = [row["id"] for row in rows if not (condition[2](row) and (ids is None or row["id"] in ids))]
    assert ids_of(open_dataset(storage)) == expected


def test_all_criteria_must_hold_and_patterns_match_whole_sources(storage: Storage, dataset: Dataset) -> None:
    source = dataset.documents(0).column("source")[0].as_py()
    assert delete(storage, sources=[source[:-1]], dry_run=True).documents == 0
    assert delete(storage, sources=[source], dry_run=True).documents == 3
    assert delete(storage, sources=["source-*", "nothing"], where="tokens >= 9", dry_run=True).documents == 2
    assert delete(storage, sources=["source_%"], dry_run=True).documents == 0
    assert delete(storage, sources=["source?" + source[7:-4] + "*"], dry_run=True).documents == 3


def test_a_dry_run_says_what_there_is_and_commits_nothing(storage: Storage, dataset: Dataset) -> None:
    report = delete(storage, where="tokens < 5", dry_run=True)
    assert (report.documents, report.tokens, report.committed, report.version) == (3, 7, False, 1)
    assert open_dataset(storage).version == 1
    assert report.read_bytes == sum(shard.docs_bytes for shard in dataset.segments)


def test_what_is_deleted_already_is_counted_and_not_deleted_twice(storage: Storage, dataset: Dataset) -> None:
    first = ids_of(dataset)[0]
    delete(storage, ids=[first])
    again = delete(storage, ids=[first])
    assert (again.committed, again.already, again.documents, again.version) == (False, 1, 0, 2)
    more = delete(storage, where="tokens < 5")
    assert (more.already, more.documents, more.version) == (1, 2, 3)
    assert open_dataset(storage).totals.deleted_documents == 3


def test_an_id_that_no_document_has_is_an_error_and_nothing_is_deleted(storage: Storage, dataset: Dataset) -> None:
    names = [ids_of(dataset)[0], "nobody"]
    with pytest.raises(MissingError, match=r"1 of the ids.*nobody"):
        delete(storage, ids=names)
    assert open_dataset(storage).version == 1
    report = delete(storage, ids=names, allow_missing=True)
    assert (report.documents, report.missing) == (1, ("nobody",))


def test_more_ids_than_a_chunk_has_documents_are_all_found(storage: Storage, dataset: Dataset) -> None:
    names = [*ids_of(dataset), *(f"other-{number}" for number in range(100))]
    report = delete(storage, ids=names, allow_missing=True)
    assert (report.documents, len(report.missing)) == (8, 100)


@pytest.mark.usefixtures("records")
def test_records_are_deleted_by_their_own_columns(storage: Storage) -> None:
    assert delete(storage, where="length(note) > 5").documents == 2
    assert delete(storage, where=pc.is_null(pc.field("note"))).documents == 1
    assert delete(storage, ids=["0"], sources=["part-0"]).documents == 1
    after = open_dataset(storage)
    assert [row["id"] for row in after.iter_records()] == [1, 2, 4, 5]
    assert after.totals.deleted_documents == 4
    assert verify(after).ok


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (pa.uuid(), uuid.UUID(int=7), str(uuid.UUID(int=7))),
        (pa.int64(), 5, "5"),
        (pa.decimal128(30, 0), 2**70, str(2**70)),
        (pa.binary(), b"a", "a"),
    ],
    ids=str,
)
def test_ids_of_other_types_are_named_by_their_text(
    storage: Storage, kind: pa.DataType, value: object, text: str
) -> None:
    with record_writer(storage, schema=pa.schema([("id", kind)])) as out:
        out.write({"id": value})
    assert delete(storage, ids=[text]).documents == 1


def test_ids_that_are_no_text_are_refused(storage: Storage) -> None:
    with record_writer(storage, schema=pa.schema([("id", pa.binary())])) as out:
        out.write({"id": b"\xff"})
    with pytest.raises(ConfigError, match="cannot be compared with text"):
        delete(storage, ids=["ff"])


def test_records_without_an_id_are_named_by_a_condition_only(storage: Storage) -> None:
    with record_writer(storage) as out:
        out.write([{"text": "a"}, {"text": "b"}])
    with pytest.raises(ConfigError, match="no column id"):
        delete(storage, ids=["a"])
    with pytest.raises(ConfigError, match="no column source"):
        delete(storage, sources=["a"])
    assert delete(storage, where="text = 'a'").documents == 1


@pytest.mark.parametrize(
    "where",
    [
        "nosuch = 1",
        "tokens >",
        "tokens = 1; DROP TABLE x",
        "id",
        "(SELECT count(*) FROM read_csv('/etc/passwd')) > 0",
        " ",
        pc.field("nosuch") == 1,
        pc.field("tokens") == "text",
    ],
    ids=str,
)
def test_a_condition_that_does_not_fit_is_refused(storage: Storage, dataset: Dataset, where: object) -> None:
    with pytest.raises(ConfigError, match="condition"):
        delete(storage, where=where)  # type: ignore[arg-type]
    assert open_dataset(storage).version == dataset.version


def test_nothing_given_is_refused_and_no_ids_mean_no_document(storage: Storage, dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="nothing says"):
        delete(storage)
    with pytest.raises(ConfigError, match="must be text"):
        delete(storage, ids=[1])  # type: ignore[list-item]
    assert not delete(storage, ids=[]).committed
    assert open_dataset(storage).version == dataset.version


def test_without_duckdb_ids_and_sources_work_and_sql_names_the_extra(
    storage: Storage, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    with pytest.raises(DependencyError, match=r"datastore\[sql\]"):
        delete(storage, where="tokens > 1")
    assert delete(storage, ids=[ids_of(dataset)[0]], sources=["*"]).documents == 1


def test_a_condition_may_name_columns_in_any_case_or_all_of_them() -> None:
    schema = pa.schema({"Text": pa.string(), "n": pa.int64(), "other": pa.string()})
    assert Matcher(Selection.of(ids=None, where="TEXT = 'x'"), schema).columns == ["Text"]
    assert Matcher(Selection.of(ids=None, where='COLUMNS(*) IS NULL AND "n" > 1'), schema).columns == schema.names


def test_a_damaged_documents_file_deletes_nothing(storage: Storage, dataset: Dataset) -> None:
    shard = dataset.segments.shard(2)
    raw = bytearray(storage.get(shard.docs_path))
    raw[len(raw) // 2] ^= 1
    storage.put(shard.docs_path, bytes(raw))
    with pytest.raises(CorruptError):
        delete(storage, where="tokens = 3")
    assert open_dataset(storage).version == 1


def test_a_version_in_the_url_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", SHARDS)
    with pytest.raises(ConfigError, match="a version cannot be changed"):
        delete(f"{tmp_path / 'set'}@1", where="true")


def test_an_append_that_comes_between_is_kept(storage: Storage, dataset: Dataset) -> None:
    make_dataset(storage, [[8]], name="more")
    assert delete(dataset, where="true").documents == 8
    after = open_dataset(storage)
    assert (after.version, after.totals.documents, after.totals.deleted_documents) == (3, 9, 8)


def test_deletes_of_other_shards_merge_and_those_of_the_same_shard_conflict(storage: Storage, dataset: Dataset) -> None:
    names = ids_of(dataset)
    delete(dataset, ids=[names[0]])
    delete(dataset, ids=[names[3]])
    with pytest.raises(ConflictError, match=r"changed meanwhile.*Give the same delete again"):
        delete(dataset, ids=[names[1]])
    assert ids_of(open_dataset(storage)) == [name for name in names if name not in {names[0], names[3]}]
    delete(storage, ids=[names[1]])
    assert open_dataset(storage).totals.deleted_documents == 3


def test_a_delete_conflicts_with_an_overwrite(storage: Storage, dataset: Dataset) -> None:
    with record_writer(storage, operation="overwrite") as out:
        out.write({"x": 1})
    with pytest.raises(ConflictError, match="changed meanwhile"):
        delete(dataset, where="true")


def test_many_deletes_leave_few_tables(storage: Storage) -> None:
    dataset = make_dataset(storage, [[1] * 60, [1] * 60])
    names = ids_of(dataset)
    for name in names[:100]:
        delete(storage, ids=[name])
    after = open_dataset(storage)
    assert len(after.commit.deletions) <= 5
    assert ids_of(after) == names[100:]
    assert after.deletions.tokens == after.totals.deleted_tokens == 100
    assert verify(after).ok


def test_ids_in_a_file_are_its_lines(tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text("\ufeffone\n\n  two words \r\nthree", encoding="utf-8")
    assert read_ids(file) == ["one", "two words", "three"]
    with pytest.raises(MissingError, match="no such file"):
        read_ids(tmp_path / "none")
    file.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ids(file)


def test_a_shard_s_uid_stays_what_it_is(storage: Storage, dataset: Dataset) -> None:
    before = [batch.column("uid") for batch in dataset.segments.batches]
    delete(storage, where="tokens = 3")
    after = open_dataset(storage).segments
    assert [batch.column("uid") for batch in after.batches] == before
    assert np.array_equal(after.tokens, dataset.segments.tokens)
    assert after.batches[0].schema.equals(SEGMENT_SCHEMA)
