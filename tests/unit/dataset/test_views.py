"""A dataset as Arrow, pandas, Polars, `datasets`, pyarrow's scanner and SQL see it; deleted documents are in none of them."""

import decimal
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.delete import delete
from datastore.dataset.shards.files import shard_uid, write_token_shard
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, DependencyError
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.records import RecordFormat
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import documents_of, make_dataset

LENGTHS = [[3, 0, 5], [40, 41], [7]]


@pytest.fixture(params=["disk", "memory"])
def url(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return str(tmp_path / "set") if request.param == "disk" else f"memory://{tmp_path.name}-{id(request)}/set"


@pytest.fixture
def dataset(url: str) -> Dataset:
    return make_dataset(url, LENGTHS)


@pytest.fixture
def thinned(dataset: Dataset) -> Dataset:
    """The same, without two of its documents; one shard is untouched."""
    ids = dataset.to_arrow()["id"].to_pylist()
    delete(dataset.url, ids=[ids[2], ids[3]])
    return open_dataset(dataset.url)


@pytest.fixture
def records(url: str) -> Dataset:
    with record_writer(url, schema=pa.schema([("text", pa.string()), ("n", pa.int64())])) as out:
        out.write({"text": f"ü{n}", "n": n} for n in range(1000))
    return open_dataset(url)


def documents(dataset: Dataset) -> list[dict[str, Any]]:
    """Return the live documents with their tokens, from the two files of each shard."""
    found = []
    for index in range(len(dataset.segments)):
        values, offsets = dataset.token_shard(index)
        lists = [part.tolist() for part in np.split(values, offsets[1:-1])]
        live = dataset.live_rows(index)
        rows = dataset.documents(index).to_pylist()
        found += [
            {**row, "tokens": tokens}
            for row, tokens, there in zip(rows, lists, live if live is not None else [True] * len(rows), strict=True)
            if there
        ]
    return found


SEEN: dict[str, Callable[[Dataset], list[dict[str, Any]]]] = {
    "arrow": lambda dataset: dataset.to_arrow(tokens=True).to_pylist(),
    "batches": lambda dataset: dataset.to_batches().read_all().to_pylist(),
    "pandas": lambda dataset: [
        {**row, "tokens": row["tokens"].tolist()} for row in dataset.to_pandas(tokens=True).to_dict("records")
    ],
    "polars": lambda dataset: dataset.to_polars(tokens=True).to_dicts(),
}


@pytest.mark.parametrize("way", SEEN)
def test_every_way_shows_the_same_documents(way: str, dataset: Dataset, thinned: Dataset) -> None:
    assert (len(documents(dataset)), len(documents(thinned))) == (6, 4)
    assert SEEN[way](dataset) == documents(dataset)
    assert SEEN[way](thinned) == documents(thinned)


def test_documents_alone_count_their_tokens(thinned: Dataset) -> None:
    table = thinned.to_arrow()
    assert table.schema.equals(DOCUMENTS_SCHEMA)
    assert table["tokens"].to_pylist() == [len(row["tokens"]) for row in documents(thinned)]


def test_a_dataset_goes_to_another_process_as_its_place_and_version(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    dataset = make_dataset(url, LENGTHS)
    rows = dataset.to_arrow()
    delete(url, ids=[rows["id"][2].as_py()])
    assert len(pickle.dumps(dataset)) < 1000  # What it has read of the version stays behind.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(Dataset.to_arrow, dataset).result() == rows


@pytest.mark.parametrize("kind", [pa.float16(), pa.list_(pa.float16(), 2), pa.decimal256(60, 2)])
def test_a_column_that_sql_lacks_does_not_close_the_others(tmp_path: Path, kind: pa.DataType) -> None:
    url = str(tmp_path / "set")
    with record_writer(url, schema=pa.schema([("id", pa.string()), ("odd", kind)])) as out:
        out.write([{"id": "a", "odd": None}, {"id": "b", "odd": None}])
    assert open_dataset(url).sql("SELECT * FROM records").to_pylist() == [{"id": "a"}, {"id": "b"}]
    with pytest.raises(ConfigError, match="SQL cannot name odd"):
        open_dataset(url).sql("SELECT odd FROM records")
    delete(url, ids=["a"])
    assert open_dataset(url).sql("SELECT * FROM records").to_pylist() == [{"id": "b"}]


def test_columns_that_differ_in_case_only_are_never_taken_for_each_other(tmp_path: Path) -> None:
    url = str(tmp_path / "set")
    with record_writer(url, schema=pa.schema([("id", pa.string()), ("flag", pa.bool_()), ("Flag", pa.bool_())])) as out:
        out.write([{"id": "a", "flag": False, "Flag": True}, {"id": "b", "flag": True, "Flag": False}])
    with pytest.raises(ConfigError, match="SQL cannot name flag, Flag"):
        open_dataset(url).sql('SELECT "Flag" FROM records')
    with pytest.raises(ConfigError, match="differ only in case"):
        delete(url, where='"Flag"')
    delete(url, where=pc.field("Flag"))
    assert open_dataset(url).to_arrow()["id"].to_pylist() == ["b"]


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_readers_that_trust_extremes_find_all_floats(tmp_path: Path, form: RecordFormat) -> None:
    table = pa.table({"label": [0.0, 0.0, 0.0], "score": [1.0, float("nan"), 1.0]})
    with record_writer(str(tmp_path / "d"), schema=table.schema, format=form) as out:
        out.write(table)
    rows = open_dataset(str(tmp_path / "d")).arrow_dataset("rows")
    assert rows.to_table(filter=pc.field("label").isin([0.0, 1.0])).num_rows == 3
    assert rows.to_table(filter=pc.field("score") != 1.0).num_rows == 1
    assert rows.count_rows(filter=pc.field("score") <= 4.0) == 2
    assert rows.to_table(filter=pc.field("label") > 0.0).num_rows == 0


def test_columns_are_chosen_and_checked(dataset: Dataset) -> None:
    assert dataset.to_arrow(columns=["tokens", "id"]).column_names == ["tokens", "id"]
    with pytest.raises(ConfigError, match=r"no such column.*nope.*There are: id, source"):
        dataset.to_arrow(columns=["nope"])


def test_narrow_and_wide_shards_are_one_table(tmp_path: Path) -> None:
    make_dataset(tmp_path, [[3]], dtype="uint16", name="a")
    dataset = make_dataset(tmp_path, [[3]], dtype="uint32", name="b")
    assert dataset.to_arrow(tokens=True)["tokens"].to_pylist() == [row["tokens"] for row in documents(dataset)]
    assert dataset.to_hf()[:]["tokens"] == [row["tokens"] for row in documents(dataset)]
    assert dataset.arrow_dataset().to_table()["tokens"].to_pylist() == [row["tokens"] for row in documents(dataset)]


def test_what_lies_beside_the_tokens_comes_with_them(tmp_path: Path) -> None:
    lengths, uid = [3, 2], shard_uid("a", 0)
    columns = {
        "loss_mask": np.array([1, 0, 1, 1, 0], np.uint8),
        "logits": np.arange(10, dtype=np.float16).reshape(5, 2),
    }
    from datastore.storage.resolve import open_storage

    storage = open_storage(tmp_path)
    info = write_token_shard(
        storage,
        uid=uid,
        values=np.arange(5, dtype=np.uint16),
        offsets=np.array([0, 3, 5]),
        documents=documents_of(uid, lengths),
        columns=columns,
    )
    commit_shards(storage, [info])
    dataset = open_dataset(tmp_path)
    table = dataset.to_arrow(tokens=True)
    assert table["loss_mask"].to_pylist() == [[1, 0, 1], [1, 0]]
    assert table["logits"].to_pylist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]]
    assert dataset.to_hf()[1] == {"tokens": [3, 4], "loss_mask": [1, 0], "logits": [[6, 7], [8, 9]]}
    assert dataset.arrow_dataset().to_table(columns=["loss_mask"]).to_pydict() == {"loss_mask": [[1, 0, 1], [1, 0]]}


@pytest.mark.filterwarnings("ignore")
class TestHuggingFace:
    def test_tokens_and_only_live_ones(self, thinned: Dataset) -> None:
        found = thinned.to_hf()
        assert found.column_names == ["tokens"]
        assert found[:]["tokens"] == [row["tokens"] for row in documents(thinned)]

    def test_records(self, records: Dataset) -> None:
        assert list(records.to_hf()) == list(records.iter_records())

    def test_a_local_shard_is_mapped_not_copied(self, tmp_path: Path) -> None:
        dataset = make_dataset(tmp_path, [[1_000_000]])
        before = pa.total_allocated_bytes()
        found = dataset.to_hf()
        assert len(found.with_format("numpy")[0]["tokens"]) == 1_000_000
        assert pa.total_allocated_bytes() - before < 200_000

    def test_it_goes_to_another_process_by_name(self, thinned: Dataset) -> None:
        found = thinned.to_hf().select_columns(["tokens"])
        raw = pickle.dumps(found)
        assert pickle.loads(raw)[:] == found[:]

    def test_the_copy_for_another_process_holds_no_tokens(self, tmp_path: Path) -> None:
        assert len(pickle.dumps(make_dataset(tmp_path, [[1_000_000]]).to_hf())) < 100_000


class TestScanning:
    def test_the_files_are_one_dataset(self, dataset: Dataset) -> None:
        assert dataset.arrow_dataset().to_table()["tokens"].to_pylist() == [r["tokens"] for r in documents(dataset)]
        table = dataset.arrow_dataset("documents").to_table(columns=["id"], filter=pc.field("tokens") > 6)
        assert table["id"].to_pylist() == [row["id"] for row in documents(dataset) if len(row["tokens"]) > 6]

    def test_deleted_rows_are_refused_not_shown(self, thinned: Dataset) -> None:
        with pytest.raises(ConfigError, match=r"would show deleted rows.*deleted=2.*to_batches"):
            thinned.arrow_dataset()
        assert thinned.arrow_dataset(ignore_deletions=True).count_rows() == 6

    def test_records_have_no_documents(self, records: Dataset) -> None:
        assert records.arrow_dataset().count_rows() == 1000
        with pytest.raises(ConfigError, match="records have no documents"):
            records.arrow_dataset("documents")
        with pytest.raises(ConfigError, match="no such part"):
            records.arrow_dataset("rest")  # type: ignore[arg-type]

    def test_polars_scans_it(self, records: Dataset) -> None:
        found = pl.scan_pyarrow_dataset(records.arrow_dataset()).filter(pl.col("n") > 997).collect()
        assert found.to_dicts() == [{"text": "ü998", "n": 998}, {"text": "ü999", "n": 999}]

    def test_it_goes_to_another_process(self, tmp_path: Path) -> None:
        found = make_dataset(tmp_path, LENGTHS).arrow_dataset()
        assert pickle.loads(pickle.dumps(found)).count_rows() == 6


def count_reads(monkeypatch: pytest.MonkeyPatch, into: list[int]) -> None:
    """Note in `into` the bytes of every range that is read."""
    original = MemoryStorage.get_ranges

    def counted(self: MemoryStorage, key: str, ranges: Any) -> list[bytes]:
        into.extend(stop - start for start, stop in ranges)
        return original(self, key, ranges)

    monkeypatch.setattr(MemoryStorage, "get_ranges", counted)


class TestSql:
    def test_sums_by_source(self, dataset: Dataset) -> None:
        found = dataset.sql("SELECT source, sum(tokens)::BIGINT AS n FROM documents GROUP BY 1 ORDER BY 2").to_pydict()
        assert found["n"] == [7, 8, 81]

    def test_deleted_documents_are_not_there(self, thinned: Dataset) -> None:
        found = thinned.sql("SELECT id, tokens FROM documents ORDER BY id").to_pylist()
        expected = [{"id": row["id"], "tokens": len(row["tokens"])} for row in documents(thinned)]
        assert found == sorted(expected, key=lambda row: row["id"])

    def test_a_table_can_be_read_twice_in_one_query(self, thinned: Dataset) -> None:
        query = "SELECT count(*) AS n FROM documents a JOIN documents b USING (id)"
        assert thinned.sql(query).to_pylist() == [{"n": 4}]

    def test_records(self, records: Dataset) -> None:
        found = records.sql("SELECT text FROM records WHERE n BETWEEN 7 AND 8 ORDER BY n")
        assert found.to_pydict() == {"text": ["ü7", "ü8"]}

    def test_deleted_records_are_not_there(self, records: Dataset) -> None:
        delete(records.url, where="n >= 5")
        left = open_dataset(records.url)
        assert left.sql("SELECT max(n) AS n, count(*) AS c FROM records").to_pylist() == [{"n": 4, "c": 5}]

    def test_an_empty_result_keeps_its_columns(self, dataset: Dataset) -> None:
        assert dataset.sql("SELECT id, tokens FROM documents WHERE tokens < 0").column_names == ["id", "tokens"]

    @pytest.mark.parametrize(
        "query",
        [
            "SELECT * FROM read_parquet('{file}')",
            "SELECT * FROM '{file}'",
            "SELECT * FROM read_text('/etc/passwd')",
            "SELECT * FROM glob('/etc/*')",
            "SELECT * FROM secret",
            "COPY (SELECT 1) TO '{folder}/x.csv'",
            "ATTACH '{folder}/x.db'",
            "INSTALL httpfs",
            "SET enable_external_access = true",
            "CREATE TABLE x AS SELECT 1",
            "SELECT 1; SELECT 2",
            "",
        ],
    )
    def test_nothing_else_can_be_reached_or_changed(self, dataset: Dataset, tmp_path: Path, query: str) -> None:
        secret = pa.table({"a": [1]})  # noqa: F841 - what DuckDB would find in its caller
        (tmp_path / "some.txt").write_text("x")
        with pytest.raises(ConfigError):
            dataset.sql(query.format(file=f"{tmp_path}/some.parquet", folder=tmp_path))
        assert [path.name for path in tmp_path.iterdir() if path.name != "set"] == ["some.txt"]

    def test_a_wrong_query_says_which_columns_there_are(self, dataset: Dataset) -> None:
        with pytest.raises(ConfigError, match=r"nope.*Columns of documents: id, source"):
            dataset.sql("SELECT nope FROM documents")

    def test_only_the_columns_that_are_asked_for_are_read(self, monkeypatch: pytest.MonkeyPatch) -> None:
        name = "memory://pushed-down/set"
        with record_writer(name, schema=pa.schema([("text", pa.string()), ("n", pa.int64())])) as out:
            out.write({"text": "x" * 10_000, "n": n} for n in range(1000))
        dataset = open_dataset(name)
        read: list[int] = []
        count_reads(monkeypatch, read)
        assert dataset.sql("SELECT sum(n)::BIGINT AS n FROM records").to_pylist() == [{"n": 499_500}]
        assert 0 < sum(read) < 500_000 < dataset.totals.size_bytes


def test_row_groups_that_cannot_match_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "memory://row-groups/set"
    dataset = make_dataset(name, [[1] * 200_000])
    read: list[int] = []
    count_reads(monkeypatch, read)
    assert dataset.sql('SELECT id FROM documents WHERE "offset" = 799996').num_rows == 1
    some = sum(read)
    read.clear()
    assert dataset.sql("SELECT id FROM documents").num_rows == 200_000
    assert 0 < some < sum(read) / 2


@pytest.mark.parametrize(("library", "call"), [("polars", "to_polars"), ("datasets", "to_hf"), ("duckdb", "sql")])
def test_a_library_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str, call: str
) -> None:
    dataset = make_dataset(tmp_path, [[1]])
    monkeypatch.setitem(sys.modules, library, None)
    for name in ("datastore.dataset.query.hf", "datastore.dataset.query.sql"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(DependencyError, match=rf"{library} is not installed.*pip install"):
        getattr(dataset, call)(*["SELECT 1"] * (call == "sql"))


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize(
    "odd",
    [
        pa.array([decimal.Decimal("1E2"), None], pa.decimal128(5, -2)),
        pa.array([10**15, 1], pa.duration("s")),
        pa.array([1.5, 2], pa.float16()),
    ],
    ids=["negative scale", "long duration", "float16"],
)
def test_a_column_that_sql_cannot_hold_does_not_close_the_others(tmp_path: Path, odd: Any, deleted: bool) -> None:  # noqa: FBT001
    with record_writer(tmp_path / "set") as out:
        out.write(pa.table({"i": [0, 1], "odd": odd}))
    if deleted:
        delete(open_dataset(tmp_path / "set"), where=pc.field("i") == 1)
    found = open_dataset(tmp_path / "set")
    assert found.sql("SELECT max(i) AS i FROM records").to_pylist() == [{"i": 0 if deleted else 1}]
    with pytest.raises(ConfigError, match="query failed"):
        found.sql("SELECT odd FROM records")
