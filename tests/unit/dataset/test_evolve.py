"""Changing the columns of records: what is allowed, what it means for old rows, and who is told when two do it."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.log import commits
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.evolve import evolve
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError, CorruptError, FormatError
from datastore.formats.evolution import SchemaChange, adapt, changed
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import make_dataset

ROWS = [{"text": "one", "stars": 1}, {"text": "two", "stars": None}]


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    made = LocalStorage(tmp_path / "set") if request.param == "local" else MemoryStorage(uuid.uuid4().hex)
    with record_writer(made, schema={"text": "string", "stars": "int32"}) as out:
        out.write(ROWS)
    return made


def rows(storage: Storage, version: int | None = None) -> list[dict[str, Any]]:
    return list(open_dataset(storage, version=version).iter_records())


def keys(storage: Storage, folder: str) -> list[str]:
    return [stat.key for stat in storage.list(folder)]


def test_one_commit_changes_the_schema_and_no_other_file_is_written(storage: Storage) -> None:
    before = [*keys(storage, "shards"), *keys(storage, "_segments")]
    commit = evolve(storage, add={"lang": "string"}, defaults={"lang": "en"}, widen={"stars": "int64"})
    assert [*keys(storage, "shards"), *keys(storage, "_segments")] == before
    assert (commit.version, commit.operation, "evolution" in commit.features) == (2, "evolve", True)
    dataset = open_dataset(storage)
    assert dataset.schema.field("stars").type == pa.int64()
    assert rows(storage) == [row | {"lang": "en"} for row in ROWS]
    assert rows(storage, 1) == ROWS
    assert "evolution" not in open_dataset(storage, version=1).commit.features
    assert verify(dataset).ok


def test_a_column_that_is_added_again_starts_empty(storage: Storage) -> None:
    evolve(storage, drop=["stars"])
    evolve(storage, add={"stars": "int32"})
    assert rows(storage) == [{"text": "one", "stars": None}, {"text": "two", "stars": None}]
    evolve(storage, drop=["stars"], add={"stars": "string"}, defaults={"stars": "*"})
    assert [row["stars"] for row in rows(storage)] == ["*", "*"]


def test_names_may_change_places(storage: Storage) -> None:
    evolve(storage, rename={"text": "stars", "stars": "text"})
    assert rows(storage) == [{"stars": "one", "text": 1}, {"stars": "two", "text": None}]


def test_new_rows_have_the_new_columns_and_both_are_read_together(storage: Storage) -> None:
    evolve(storage, add={"vector": "fixed_size_list<float>[2]"})
    with pytest.raises(ConfigError, match="other columns"), record_writer(storage) as out:
        out.write(ROWS)
    with record_writer(storage, format="parquet") as out:
        out.write({"text": "new", "stars": 3, "vector": [1, 2]})
    assert [row["vector"] for row in rows(storage)] == [None, None, [1, 2]]
    assert open_dataset(storage).to_arrow()["vector"].null_count == 2


@pytest.mark.parametrize(
    ("kind", "default", "value"),
    [
        ("int64", 7, 7),
        ("int64 not null", 7, 7),
        ("list<string>", ["a"], ["a"]),
        ("struct<a: int8>", {"a": 1}, {"a": 1}),
        ("dictionary<string>", "cat", "cat"),
        ("decimal128(5, 2)", "1.25", Decimal("1.25")),
        ("bool", False, False),
        ("large_string", "x", "x"),
    ],
)
def test_a_default_may_be_any_value_that_json_can_write(storage: Storage, kind: str, default: Any, value: Any) -> None:
    evolve(storage, add={"new": kind}, defaults={"new": default})
    assert [row["new"] for row in rows(storage)] == [value, value]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "changes nothing"),
        ({"drop": ["x"]}, "no such column"),
        ({"rename": {"x": "y"}}, "no such column"),
        ({"widen": {"x": "int64"}}, "no such column"),
        ({"drop": ["text", "stars"]}, "no column would be left"),
        ({"add": {"text": "string"}}, "there already"),
        ({"rename": {"text": "stars"}}, "two columns would have the same name"),
        ({"add": {"new": "int64 not null"}}, "never null needs a value"),
        ({"add": {"new": "int64"}, "defaults": {"new": "many"}}, "the default does not fit"),
        ({"add": {"new": "binary"}, "defaults": {"new": b"\xff"}}, "the default does not fit"),
        ({"defaults": {"stars": 1}}, "a default is given for a column that is not added"),
        ({"add": {"new": "number"}}, "not a type"),
        ({"add": {"new": pa.string_view()}}, "a column is a view"),
        ({"widen": {"stars": "int16"}}, "can only be widened"),
        ({"widen": {"stars": "double"}}, "can only be widened"),
        ({"widen": {"text": "binary"}}, "can only be widened"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changes(
    storage: Storage, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        evolve(storage, **change)
    assert open_dataset(storage).version == 1


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int8", "int64"),
        ("uint32", "int64"),
        ("float", "double"),
        ("halffloat", "float"),
        ("string", "large_string"),
        ("decimal128(5, 2)", "decimal128(9, 2)"),
        ("list<int32>", "list<int64>"),
        ("list<int32>", "large_list<int64>"),
        ("fixed_size_list<float>[2]", "fixed_size_list<double>[2]"),
        ("struct<a: list<int8 not null>>", "struct<a: list<int64>>"),
        ("dictionary<values=string, indices=int8>", "dictionary<values=string, indices=int32>"),
    ],
)
def test_widening_keeps_every_value_and_never_goes_back(old: str, new: str) -> None:
    table = pa.table([pa.nulls(2, changed_type(old))], names=["x"])
    wider = changed(table.schema, SchemaChange(widen={"x": new}))
    assert adapt(table, wider).column("x").type == wider.field("x").type
    with pytest.raises(ConfigError):
        changed(wider, SchemaChange(widen={"x": old}))


def changed_type(text: str) -> pa.DataType:
    return changed(pa.schema({"y": pa.int8()}), SchemaChange(add={"x": text})).field("x").type


def test_only_a_field_that_says_so_lets_a_column_be_null() -> None:
    schema = pa.schema([pa.field("x", pa.int32(), nullable=False)])
    assert not changed(schema, SchemaChange(widen={"x": "int64"})).field("x").nullable
    assert changed(schema, SchemaChange(widen={"x": pa.field("x", pa.int64())})).field("x").nullable


def test_a_field_keeps_what_its_metadata_say(storage: Storage) -> None:
    evolve(storage, add={"image": "image/png"})
    evolve(storage, rename={"image": "picture"})
    metadata = open_dataset(storage).schema.field("picture").metadata
    assert metadata is not None
    assert metadata[b"media_type"] == b"image/png"


def test_rows_of_the_old_schema_are_not_committed_after_a_change(storage: Storage) -> None:
    files = keys(storage, "shards")
    out = record_writer(storage)
    out.write(ROWS)
    evolve(storage, add={"lang": "string"})
    with pytest.raises(ConfigError, match="another schema than the dataset has now"), out:
        pass
    assert rows(storage) == [row | {"lang": None} for row in ROWS]
    assert keys(storage, "shards") == files


@pytest.mark.parametrize(
    "change",
    [
        {"add": {"more": "int32"}, "defaults": {"more": 3}},
        {"rename": {"text": "words"}},
        {"drop": ["stars"]},
        {"drop": ["stars"], "add": {"stars": "string"}},
        {"widen": {"stars": "int64"}},
        {"drop": ["stars"], "rename": {"text": "stars"}},
    ],
)
def test_the_same_change_given_again_is_done(storage: Storage, change: dict[str, Any]) -> None:
    first = evolve(storage, **change)
    assert evolve(storage, **change) == first
    delete(storage, where=pc.field(first_name(storage)).is_valid())
    assert evolve(storage, **change).version == first.version + 1
    assert open_dataset(storage).schema == open_dataset(storage, version=first.version).schema


def first_name(storage: Storage) -> str:
    return str(open_dataset(storage).schema.names[0])


def test_a_change_that_another_one_followed_is_made_again_or_refused(storage: Storage) -> None:
    evolve(storage, rename={"text": "words"})
    evolve(storage, rename={"words": "text"})
    assert evolve(storage, rename={"text": "words"}).version == open_dataset(storage).version
    assert "words" in open_dataset(storage).schema.names


def test_an_append_that_was_first_is_kept(storage: Storage) -> None:
    dataset = open_dataset(storage)
    with record_writer(storage) as out:
        out.write(ROWS)
    evolve(dataset, drop=["stars"])
    assert rows(storage) == [{"text": row["text"]} for row in ROWS + ROWS]


def test_of_many_changes_at_once_each_is_made_or_refused_and_none_is_lost(storage: Storage) -> None:
    def change(number: int) -> bool:
        try:
            evolve(storage, add={f"c{number // 2}": "int64"}, defaults={f"c{number // 2}": number})
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(change, range(8)))
    assert sum(done) == 4
    dataset = open_dataset(storage)
    assert sorted(dataset.schema.names) == ["c0", "c1", "c2", "c3", "stars", "text"]
    assert {row["c1"] for row in rows(storage)} <= {2, 3}
    assert dataset.version == 5


def test_a_version_is_not_changed_and_tokens_have_no_columns(storage: Storage, tmp_path: Path) -> None:
    make_dataset(tmp_path / "tokens", [[1]])
    with pytest.raises(ConfigError, match="only records have columns"):
        evolve(tmp_path / "tokens", drop=["tokens"])
    with pytest.raises(ConfigError, match="a version cannot be changed"):
        evolve(f"{tmp_path}/set@1", drop=["stars"])
    assert open_dataset(storage).version == 1


def test_a_package_that_does_not_know_changes_refuses_what_was_changed(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    evolve(storage, drop=["stars"])
    monkeypatch.setattr(commits, "READABLE_FEATURES", commits.READABLE_FEATURES - {"evolution"})
    with pytest.raises(FormatError, match="does not know"):
        open_dataset(storage)


def test_an_overwrite_starts_anew(storage: Storage) -> None:
    evolve(storage, add={"lang": "string"})
    schema = open_dataset(storage).schema
    with record_writer(storage, schema=schema, operation="overwrite") as out:
        out.write({"text": "x", "stars": 1, "lang": "de"})
    dataset = open_dataset(storage)
    assert dataset.schema.metadata is None
    assert dataset.commit.features == ("layout", "packed")
    assert rows(storage) == [{"text": "x", "stars": 1, "lang": "de"}]
    assert rows(storage, 1) == ROWS


def test_sql_sees_old_and_new_rows_and_a_scan_of_files_says_no(storage: Storage) -> None:
    pytest.importorskip("duckdb")
    evolve(storage, rename={"stars": "n"}, add={"lang": "string"}, defaults={"lang": "en"})
    with record_writer(storage) as out:
        out.write({"text": "x", "n": 5, "lang": "de"})
    dataset = open_dataset(storage)
    found = dataset.sql("SELECT sum(n) AS n, count(lang) AS langs FROM records").to_pylist()
    assert found == [{"n": 6, "langs": 3}]
    assert len(dataset.older_shards()) == 1
    with pytest.raises(ConfigError, match="older schema"):
        dataset.arrow_dataset()


def test_a_shard_of_an_unrelated_schema_is_damage(storage: Storage) -> None:
    dataset = open_dataset(storage)
    schema = pa.schema({"other": pa.int64()}).serialize().to_pybytes()
    forged = type(dataset)(
        storage, info=dataset.info, commit=msgspec.structs.replace(dataset.commit, record_schema=schema)
    )
    for read in (forged.to_arrow, lambda: list(forged.iter_records())):
        with pytest.raises(CorruptError, match="another schema than its version"):
            read()
