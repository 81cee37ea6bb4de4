"""Writing records: one commit at the end of the block, or none."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pytest
from typing_extensions import Buffer, override

from datastore.dataset.durability.verify import verify
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError, StorageError
from datastore.ingestion.writers import records
from datastore.ingestion.writers.records import RecordWriter, record_writer
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import make_dataset

SCHEMA = pa.schema({"text": pa.string(), "stars": pa.int64()})
ROWS = [{"text": "one", "stars": 1}, {"text": "zwei ä", "stars": None}]


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "set") if request.param == "local" else MemoryStorage(uuid.uuid4().hex)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_SHARD_BYTES", 1000)


def many(rows: int) -> Iterator[dict]:
    return ({"text": f"row {index}", "stars": index} for index in range(rows))


def interrupted(out: RecordWriter, error: BaseException) -> None:
    out.write(many(500))
    raise error


@pytest.mark.parametrize(
    "given",
    [ROWS, tuple(ROWS), pa.Table.from_pylist(ROWS, SCHEMA), pa.RecordBatch.from_pylist(ROWS, SCHEMA)],
    ids=["list", "tuple", "table", "batch"],
)
def test_rows_come_back_in_whatever_form_they_were_given(storage: Storage, given: object) -> None:
    with record_writer(storage, schema=SCHEMA) as out:
        out.write(given)  # type: ignore[arg-type]
    assert out.commit is not None
    dataset = open_dataset(storage)
    assert dataset.commit == out.commit
    assert (dataset.kind, dataset.totals.documents, dataset.schema) == ("records", 2, SCHEMA)
    assert list(dataset.iter_records()) == ROWS
    assert dataset.to_arrow().to_pylist() == ROWS


def test_rows_may_be_given_one_by_one_and_the_first_decides_the_schema(storage: Storage) -> None:
    with record_writer(storage) as out:
        for row in ROWS:
            out.write(row)
    assert open_dataset(storage).schema.equals(SCHEMA)


@pytest.mark.usefixtures("small_shards")
def test_an_exception_in_the_block_leaves_nothing(storage: Storage) -> None:
    out = record_writer(storage, schema=SCHEMA)
    with pytest.raises(OSError, match="broken"), out:
        interrupted(out, OSError("broken"))
    assert [stat.key for stat in storage.list()] == ["datastore.json"]


@pytest.mark.usefixtures("small_shards")
def test_an_exception_leaves_the_version_before(storage: Storage) -> None:
    with record_writer(storage, schema=SCHEMA) as out:
        out.write(many(500))
    before = sorted(stat.key for stat in storage.list())
    out = record_writer(storage)
    with pytest.raises(KeyboardInterrupt), out:
        interrupted(out, KeyboardInterrupt())
    assert sorted(stat.key for stat in storage.list()) == before
    assert verify(open_dataset(storage)).ok


@pytest.mark.usefixtures("small_shards")
def test_many_rows_become_many_shards_in_order(storage: Storage) -> None:
    with record_writer(storage) as out:
        out.write(many(300))
        out.write(many(300))
    dataset = open_dataset(storage)
    assert dataset.version == 1
    assert len(dataset.segments) > 5
    assert list(dataset.iter_records()) == [*many(300), *many(300)]


def test_a_second_block_appends_and_may_leave_out_the_schema(storage: Storage) -> None:
    for _ in range(2):
        with record_writer(storage) as out:
            out.write(ROWS)
    dataset = open_dataset(storage)
    assert dataset.version == 2
    assert list(dataset.iter_records()) == ROWS + ROWS


def test_an_overwrite_may_change_the_schema(storage: Storage) -> None:
    with record_writer(storage) as out:
        out.write(ROWS)
    with record_writer(storage, operation="overwrite") as out:
        out.write({"n": 1})
    assert list(open_dataset(storage).iter_records()) == [{"n": 1}]
    assert list(open_dataset(storage, version=1).iter_records()) == ROWS


def test_no_rows_are_a_dataset_if_the_schema_is_known(storage: Storage) -> None:
    with record_writer(storage, schema=SCHEMA):
        pass
    assert open_dataset(storage).to_arrow().schema.equals(SCHEMA)
    assert list(open_dataset(storage).iter_records()) == []


def test_no_rows_and_no_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no schema is known"), record_writer(tmp_path / "set") as out:
        out.write([])


@pytest.mark.parametrize(
    "row",
    [{"text": "x"}, {"text": "x", "stars": 1, "more": 2}, {"text": "x", "stars": "many"}, {"text": 5, "stars": 1}, {}],
    ids=["missing column", "unknown column", "wrong type", "number as text", "nothing"],
)
def test_a_row_that_does_not_fit_is_refused_and_the_block_may_go_on(storage: Storage, row: dict) -> None:
    with record_writer(storage, schema=SCHEMA) as out:
        out.write(ROWS)
        with pytest.raises(ConfigError):
            out.write([ROWS[0], row])
    assert list(open_dataset(storage).iter_records()) == ROWS


def test_another_schema_than_the_dataset_s_is_refused_before_any_row(storage: Storage) -> None:
    with record_writer(storage) as out:
        out.write(ROWS)
    with pytest.raises(ConfigError, match="another schema"):
        record_writer(storage, schema=pa.schema({"text": pa.string()}))


def test_records_are_not_appended_to_tokens(storage: Storage) -> None:
    make_dataset(storage, [[1]])
    with pytest.raises(ConfigError, match="tokens, not records"):
        record_writer(storage, schema=SCHEMA)


def test_a_place_that_holds_something_else_is_refused(storage: Storage) -> None:
    storage.put("notes.txt", b"x")
    with pytest.raises(ConfigError, match="not a dataset"):
        record_writer(storage, schema=SCHEMA)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_a_schema_may_be_written_as_texts(storage: Storage, kind: Literal["arrow", "parquet"]) -> None:
    row = {"text": "a cat", "image": b"\xff\xd8", "vector": [0.5, 1.0], "label": "cat"}
    schema = {
        "text": "string",
        "image": "image/jpeg",
        "vector": "fixed_size_list<float>[2]",
        "label": "dictionary<string>",
    }
    with record_writer(storage, schema=schema, format=kind) as out:
        out.write(row)
    dataset = open_dataset(storage)
    assert list(dataset.iter_records()) == [row]
    assert dataset.schema.field("image").metadata == {b"media_type": b"image/jpeg"}
    assert dataset.segments.shard(0).layout.format == kind


def test_a_dataset_may_hold_both_formats(storage: Storage) -> None:
    for kind in ("arrow", "parquet", "arrow"):
        with record_writer(storage, schema=SCHEMA, format=kind) as out:  # type: ignore[arg-type]
            out.write(ROWS)
    dataset = open_dataset(storage)
    assert [shard.path.rpartition(".")[2] for shard in dataset.segments] == ["arrow", "parquet", "arrow"]
    assert list(dataset.iter_records()) == dataset.to_arrow().to_pylist() == ROWS * 3
    assert verify(dataset).ok


def test_a_column_that_the_format_cannot_keep_is_refused_before_any_row(storage: Storage) -> None:
    schema = pa.schema({"x": pa.month_day_nano_interval()})
    with pytest.raises(ConfigError, match="cannot be stored as Parquet"):
        record_writer(storage, schema=schema, format="parquet")
    with record_writer(storage, schema=schema) as out:
        out.write({"x": None})
    with pytest.raises(ConfigError, match="cannot be stored as Parquet"):
        record_writer(storage, format="parquet")


def test_a_schema_read_from_a_parquet_file_with_numbered_columns_is_taken_without_the_numbers(storage: Storage) -> None:
    field = pa.field("n", pa.int64(), metadata={"PARQUET:field_id": "7", "unit": "m"})
    with record_writer(storage, schema=pa.schema([field])) as out:
        out.write({"n": 1})
    assert open_dataset(storage).schema.field("n").metadata == {b"unit": b"m"}


class Slow(MemoryStorage):
    """Takes its time for shards, or cannot store them; remembers what was stored in which order."""

    def __init__(self, name: str, *, fails: bool = False) -> None:
        super().__init__(name)
        self.fails = fails
        self.stored: list[str] = []

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        if key.startswith(("shards/", "docs/")):
            time.sleep(0.05)
            if self.fails:
                raise StorageError("the disk is full", hint="Make room.")
        super().put(key, *chunks)
        self.stored.append(key.partition("/")[0])

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        super().put_new(key, *chunks)
        self.stored.append(key.partition("/")[0])


def test_nothing_is_committed_before_the_last_shard_is_there() -> None:
    storage = Slow(uuid.uuid4().hex)
    with record_writer(storage, schema=pa.schema({"n": pa.int64()})) as out:
        out.write({"n": number} for number in range(10))
    assert [each for each in storage.stored if each in {"shards", "_segments", "_log"}][:3] == [
        "_segments",
        "shards",
        "_log",
    ]
    assert open_dataset(storage).totals.documents == 10


def test_a_last_shard_that_cannot_be_stored_is_an_error_and_nothing_is_committed() -> None:
    storage = Slow(uuid.uuid4().hex, fails=True)
    out = record_writer(storage, schema=pa.schema({"n": pa.int64()}))
    out.write({"n": number} for number in range(10))
    with pytest.raises(StorageError, match="the disk is full"):
        out.__exit__(None, None, None)
    assert CommitLog(storage).newest() is None


def test_many_small_commits_read_no_segment_again_and_keep_little_beside_the_data() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    for number in range(100):
        with record_writer(storage, schema=pa.schema({"text": pa.string(), "n": pa.int64()})) as out:
            out.write({"text": f"{number} {row}", "n": row} for row in range(100))
    sizes = [stat.size_bytes for folder in ("_log", "_segments") for stat in storage.list(folder)]
    assert sum(sizes) / 100 < 2500
    assert open_dataset(storage).totals.documents == 10_000
    # The identity, the hint, the hinted version and the one after it; and no segment.
    before = storage.statistics()["get"].requests
    with record_writer(storage) as out:
        out.write({"text": "one more", "n": 1})
    assert storage.statistics()["get"].requests - before == 4


@pytest.mark.parametrize("age_s", [0, 100])
def test_a_writer_that_another_was_faster_than_adds_to_what_that_made(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, age_s: float
) -> None:
    with record_writer(storage, schema=SCHEMA) as out:
        out.write(ROWS)
    first, second = record_writer(storage), record_writer(storage)
    monkeypatch.setattr(records, "_AT_ONCE_S", 10.0 - age_s)
    for out in (first, second):
        with out:
            out.write(ROWS)
    assert [out.commit and out.commit.version for out in (first, second)] == [2, 3]
    assert open_dataset(storage).totals.documents == 6
    assert verify(open_dataset(storage)).ok


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize(
    "column", [pa.array([True] * 100_000), pa.nulls(100_000), pa.array([7] * 100_000)], ids=["bool", "nothing", "one"]
)
def test_a_shard_may_have_more_rows_than_bytes(
    storage: Storage, column: pa.Array, kind: Literal["arrow", "parquet"]
) -> None:
    with record_writer(storage, format=kind) as out:
        out.write(pa.table({"x": column}))
    dataset = open_dataset(storage)
    assert dataset.to_arrow().column("x").combine_chunks().equals(column)
    assert sum(batch.num_rows for batch in dataset.iter_batches()) == 100_000
    assert verify(dataset).ok


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int8(), pa.struct({"a": pa.int64()})),
        pa.dictionary(pa.int8(), pa.null()),
        pa.dictionary(pa.int8(), pa.json_()),
        pa.opaque(pa.string_view(), "kind", "vendor"),
    ],
    ids=str,
)
def test_what_could_not_be_put_together_later_is_refused_before_any_row(storage: Storage, kind: pa.DataType) -> None:
    with pytest.raises(ConfigError, match=r"a column is .*Cast it to"):
        record_writer(storage, schema={"x": kind})
