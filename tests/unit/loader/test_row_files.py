"""Rows of files that others wrote: the same order, ranks, state and choice as those of a dataset, and no ingest."""

import itertools
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import datastore as ds
from datastore.errors import ConfigError, CorruptError, ResumeError
from datastore.loader.rows.batch import RowBatch, Rows
from datastore.loader.rows.files.opening import FileRows, open_files
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.media import decode_image
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Stat
from datastore.testing.resume import check_resumes_everywhere

ROWS = 230


def table(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    return pa.table(
        {
            "number": pa.array(numbers, pa.int64()),
            "a.b": [f"dotted {number}" for number in numbers],
            "a": pa.array(
                [{"b": number, "c": "x" * (number % 5)} for number in numbers],
                pa.struct([("b", pa.int64()), ("c", pa.string())]),
            ),
            "turns": pa.array(
                [[{"role": "user", "text": "x" * (number % 7)}] * (number % 3) for number in numbers],
                pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())])),
            ),
            "image": pa.array([bytes([number]) * 500 if number % 2 else None for number in numbers], pa.binary()),
        }
    )


def write_parquet(folder: Path) -> None:
    (folder / "more").mkdir(parents=True)
    pq.write_table(table(0, 100), folder / "a.parquet", row_group_size=30)
    pq.write_table(table(100, 101), folder / "b.parquet", compression="gzip", use_dictionary=False)
    pq.write_table(table(101, ROWS), folder / "more" / "c.parquet", row_group_size=64, write_statistics=False)
    pq.write_table(table(0, 0), folder / "more" / "d.parquet")
    (folder / "README.txt").write_text("not rows")


def write_hf(folder: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 20)
        datasets.Dataset(table(0, ROWS)).save_to_disk(str(folder), num_shards=3)


@pytest.fixture(params=["parquet", "datasets"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Rows numbered from 0, in three files or more, of several batches each."""
    found = tmp_path / "rows"
    (write_parquet if request.param == "parquet" else write_hf)(found)
    return found


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., FileRows]:
    return lambda url: open_files(url, index=tmp_path / "index")


Opened = Callable[..., FileRows]


def load(
    source: Any, *, batch: int = 7, rank: Rank | None = None, rows: Rows | None = None, **options: Any
) -> RowLoader:
    settings = LoaderSettings(**{"threads": 2, "prefetch_batches": 3, "window": 16} | options)
    return RowLoader(source, global_batch=batch, seed=5, rank=rank or Rank(), rows=rows or Rows(), options=settings)


def all_of(parts: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


def numbers(batch: RowBatch) -> list[int]:
    found: list[int] = batch.data["number"].to_pylist()
    return found


def test_an_epoch_has_each_row_once_as_it_was_written(folder: Path, opened: Opened) -> None:
    source = opened(folder)
    assert max(len(source.batch_rows(shard)) for shard in range(len(source.segments.documents))) > 1
    batches = list(load(source, epochs=1))
    assert sorted(all_of(map(numbers, batches))) == list(range(ROWS))
    assert all_of(map(numbers, batches)) != list(range(ROWS))
    for batch in batches:
        assert batch.numbers.tolist() == numbers(batch)
        assert batch.data.to_pylist() == [table(number, number + 1).to_pylist()[0] for number in numbers(batch)]
    assert all_of(map(numbers, load(source, shuffle=False, epochs=1))) == list(range(ROWS))


@pytest.mark.parametrize("world", [2, 3])
def test_each_step_has_the_same_rows_on_any_number_of_ranks(folder: Path, opened: Opened, world: int) -> None:
    source = opened(folder)
    alone = [sorted(numbers(batch)) for batch, _ in zip(load(source), range(40), strict=False)]
    ranks = [load(source, rank=Rank(rank, world)) for rank in range(world)]
    for step in range(40):
        assert sorted(all_of(numbers(next(rank)) for rank in ranks)) == alone[step]


def test_it_resumes_everywhere_also_where_the_folder_was_copied_to(
    folder: Path, opened: Opened, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    places = itertools.cycle([folder, tmp_path / "copy"])

    def open_at(state: Any) -> RowLoader:
        loader = load(opened(next(places)), batch=30, epochs=2)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    check_resumes_everywhere(open_at, steps=16, value=numbers)


def test_choice_columns_and_transform_are_as_with_a_dataset(folder: Path, opened: Opened) -> None:
    source = opened(folder)
    chosen = load(source, rows=Rows(where="number % 10 = 3"), columns=("number",), epochs=1)
    assert sorted(all_of(map(numbers, chosen))) == list(range(3, ROWS, 10))
    state = chosen.state_dict()
    with pytest.raises(ResumeError, match="fingerprint"):
        load(source).load_state_dict(state)
    for name in ("a.b", "a", "turns"):
        batch = next(load(source, columns=(name,)))
        assert batch.data.schema.names == [name]
        wanted = [table(number, number + 1).to_pylist()[0][name] for number in batch.numbers.tolist()]
        assert batch.data[name].to_pylist() == wanted
    with load(source, rows=Rows(transform=number_of, workers=1), epochs=1) as made:
        assert sorted(all_of(batch.data for batch in made)) == list(range(ROWS))


def number_of(row: dict[str, Any], _random: np.random.Generator) -> int:
    number: int = row["number"]
    return number


def test_the_index_is_made_once_and_again_where_a_file_has_changed(folder: Path, opened: Opened) -> None:
    first = opened(folder)
    files = len(first.index.files)
    assert first.indexed.files_read == files
    again = opened(folder)
    assert again.indexed.files_read == 0
    assert again.index == first.index
    assert again.schema.equals(first.schema)
    one = folder / first.index.files[0].path
    os.utime(one, (1, 1))
    touched = opened(folder)
    assert touched.indexed.files_read == 1
    assert touched.uuid == first.uuid


def test_a_changed_file_is_named_at_resume_and_while_a_run_goes_on(folder: Path, opened: Opened) -> None:
    source = opened(folder)
    loader = load(source, memory_bytes=2**30)
    next(loader)
    state = loader.state_dict()
    name = source.index.files[0].path
    rewrite(folder / name)
    running = load(source, epochs=1)
    with pytest.raises(CorruptError, match="a file has changed since it was indexed") as caught:
        deque(running, maxlen=0)
    assert caught.value.values["file"] == name
    with pytest.raises(ResumeError, match=f"files have changed since the state was saved: {name} had"):
        load(opened(folder)).load_state_dict(state)


def rewrite(path: Path) -> None:
    rows = table(0, 90)
    if path.suffix == ".parquet":
        pq.write_table(rows, path)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, rows.schema) as writer:
        writer.write_table(rows)


def test_files_that_come_and_go_are_named(tmp_path: Path, opened: Opened) -> None:
    folder = tmp_path / "rows"
    write_parquet(folder)
    state = load(opened(folder)).state_dict()
    (folder / "b.parquet").rename(folder / "e.parquet")
    with pytest.raises(ResumeError, match=r"b.parquet is gone; e.parquet is new"):
        load(opened(folder)).load_state_dict(state)
    (folder / "e.parquet").rename(folder / "b.parquet")
    load(opened(folder)).load_state_dict(state)


def test_an_index_that_cannot_be_kept_or_read_is_made_again(tmp_path: Path) -> None:
    write_parquet(tmp_path / "rows")
    (tmp_path / "taken").write_text("a file")
    with pytest.warns(RuntimeWarning, match="could not be kept"):
        assert open_files(tmp_path / "rows", index=tmp_path / "taken").indexed.files_read == 4
    open_files(tmp_path / "rows", index=tmp_path / "index")
    for kept in (tmp_path / "index").rglob("*.json"):
        kept.write_bytes(b"{}" + kept.read_bytes()[2:])
    assert open_files(tmp_path / "rows", index=tmp_path / "index").indexed.files_read == 4


# Reading


def test_only_the_columns_asked_for_are_fetched(tmp_path: Path, opened: Opened) -> None:
    wide = pa.table({"small": range(1000), "large": [os.urandom(1000) for _ in range(1000)], "last": range(1000)})
    sink = pa.BufferOutputStream()
    pq.write_table(wide, sink, row_group_size=250, compression="none", use_dictionary=False)
    storage = MemoryStorage(f"fetched {tmp_path}")
    storage.put("x.parquet", sink.getvalue())
    fetched: list[tuple[int, int]] = []

    class Counted(MemoryStorage):
        def get_ranges(self, key: str, ranges: Any) -> list[bytes]:
            fetched.extend(ranges)
            return super().get_ranges(key, ranges)

    source = opened(Counted(f"fetched {tmp_path}"))
    fetched.clear()
    loader = load(source, columns=("small", "last"), epochs=1)
    assert sorted(all_of(batch.data["last"].to_pylist() for batch in loader)) == list(range(1000))
    assert sum(stop - start for start, stop in fetched) < 100_000
    assert len(fetched) == 1 + 4 * 2


def test_files_of_several_writers_in_one_folder(tmp_path: Path, opened: Opened) -> None:
    import duckdb
    import polars as pl

    folder = tmp_path / "rows"
    folder.mkdir()
    rows = {"i": list(range(10)), "text": [f"t{i % 3}" for i in range(10)], "items": [[i] * (i % 3) for i in range(10)]}
    pq.write_table(pa.table(rows), folder / "a.parquet")
    pq.write_table(pa.table({"items": rows["items"], "i": rows["i"], "text": rows["text"]}), folder / "b.parquet")
    pl.DataFrame(rows, schema_overrides={"text": pl.Categorical}).write_parquet(folder / "c.parquet")
    frame = pa.table(rows)  # noqa: F841 - DuckDB finds it by its name
    duckdb.sql(f"COPY (SELECT i::INTEGER AS i, text, items FROM frame) TO '{folder}/d.parquet'")
    typed = pa.table(rows).set_column(1, "text", pa.array(rows["text"]).dictionary_encode())
    not_null = pa.schema([field.with_nullable(False) if field.name == "i" else field for field in typed.schema])
    pq.write_table(typed.cast(not_null), folder / "e.parquet")
    source = opened(folder)
    assert source.schema.field("i").type == pa.int64()
    batches = list(load(source, epochs=1))
    for batch in batches:
        for number, row in zip(batch.numbers.tolist(), batch.data.to_pylist(), strict=True):
            assert row == {name: values[number % 10] for name, values in rows.items()}
    assert sum(map(len, batches)) == 50


def test_large_row_groups_are_warned_of(tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "rows")
    monkeypatch.setattr("datastore.loader.rows.files.opening._LARGE_BYTES", 1000)
    with pytest.warns(RuntimeWarning, match=r"a row group of .*\.parquet takes .* in memory"):
        opened(tmp_path / "rows")


def test_where_few_row_groups_fit_into_memory_there_are_few_lanes_and_wide_windows(
    tmp_path: Path, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = 40_000
    pq.write_table(pa.table({"number": range(rows)}), folder / "a.parquet", row_group_size=1000, compression="none")
    monkeypatch.setattr("datastore.loader.rows.stream.SMALL_BYTES", 60_000)
    monkeypatch.setattr("datastore.loader.rows.stream.BATCH_BYTES", 1000)
    source = opened(folder)
    loader = load(source, batch=100, epochs=1, window=256)
    assert loader.stats()["lanes"] == 60_000 // source.batch_bytes < 10
    assert loader.stats()["window"] == 1000
    assert sorted(all_of(map(numbers, loader))) == list(range(rows))


# What is refused


def put(folder: Path, name: str, rows: pa.Table) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(rows, folder / name)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"i": [1], "more": [2]}, "the files do not have the same columns"),
        ({"j": [1]}, "the files do not have the same columns"),
        ({"i": ["text"]}, "the files do not have the same columns"),
    ],
)
def test_files_of_other_columns_are_refused_by_name(
    tmp_path: Path, opened: Opened, other: dict[str, Any], message: str
) -> None:
    put(tmp_path / "rows", "a.parquet", pa.table({"i": [1]}))
    put(tmp_path / "rows", "b.parquet", pa.table(other))
    with pytest.raises(ConfigError, match=message) as caught:
        opened(tmp_path / "rows")
    assert caught.value.values["file"] == "b.parquet"


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (pa.array([1.0], pa.float32()), pa.array([16_777_217.0])),
        (pa.array([1], pa.int8()), pa.array([2**40])),
        (pa.array(["x"]), pa.array(["y"], pa.large_string())),
        (pa.nulls(1), pa.array([7])),
    ],
)
def test_the_first_file_does_not_change_the_values_of_the_rest(
    tmp_path: Path, opened: Opened, first: Any, later: Any
) -> None:
    put(tmp_path / "rows", "a.parquet", pa.table({"i": first}))
    put(tmp_path / "rows", "b.parquet", pa.table({"i": later}))
    found = next(load(opened(tmp_path / "rows"), batch=2, shuffle=False)).data["i"].to_pylist()
    assert found == first.to_pylist() + later.to_pylist()


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (pa.array([1]), pa.array([7.5])),
        (pa.array([1.0]), pa.array([2**53 + 1])),
        (pa.array([True]), pa.array([7])),
        (pa.array([date(2026, 1, 1)]), pa.array([datetime(2026, 1, 2, 12)], pa.timestamp("us"))),  # noqa: DTZ001
    ],
)
def test_what_would_change_is_refused_and_its_file_named(
    tmp_path: Path, opened: Opened, first: Any, later: Any
) -> None:
    put(tmp_path / "rows", "a.parquet", pa.table({"i": first}))
    put(tmp_path / "rows", "b.parquet", pa.table({"i": later}))
    with pytest.raises(ConfigError, match=r"the files do not have the same columns|does not fit the others") as caught:
        next(load(opened(tmp_path / "rows"), batch=2))
    assert caught.value.values["file"] == "b.parquet"


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1PAR1" * 3, b"x" * 100, b"PAR1" + b"x" * 50 + b"\x20\0\0\0PAR1"]
)
def test_what_is_no_parquet_is_named(tmp_path: Path, opened: Opened, content: bytes) -> None:
    put(tmp_path / "rows", "a.parquet", pa.table({"i": [1]}))
    (tmp_path / "rows" / "b.parquet").write_bytes(content)
    with pytest.raises(CorruptError) as caught:
        opened(tmp_path / "rows")
    assert caught.value.values["where"] == "b.parquet"


@pytest.mark.parametrize("cut", [0, 3, 8, 100, -100, -1000])
def test_a_stream_that_is_cut_is_named(tmp_path: Path, opened: Opened, cut: int) -> None:
    write_hf(tmp_path / "rows")
    path = next((tmp_path / "rows").glob("*.arrow"))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(CorruptError) as caught:
        opened(tmp_path / "rows")
    assert caught.value.values["where"] == path.name


def test_several_saved_splits_and_empty_folders_are_refused(tmp_path: Path, opened: Opened) -> None:
    import datasets

    datasets.disable_progress_bars()
    one = datasets.Dataset.from_dict({"i": [1, 2]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(ConfigError, match="several datasets") as caught:
        opened(tmp_path / "dict")
    assert caught.value.values["splits"] == ["train", "test"]
    assert opened(tmp_path / "dict" / "train").segments.documents.tolist() == [2]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \.parquet file"):
        opened(tmp_path / "empty")


def test_a_dataset_and_files_give_the_same_rows_unshuffled(tmp_path: Path, opened: Opened) -> None:
    put(tmp_path / "rows", "a.parquet", table(0, ROWS))
    with ds.record_writer(str(tmp_path / "ours"), schema=table(0, 1).schema) as out:
        out.write(table(0, ROWS))
    sources: list[Any] = [opened(tmp_path / "rows"), ds.open(tmp_path / "ours")]
    files, ours = (load(source, shuffle=False, epochs=1) for source in sources)
    for one, other in zip(files, ours, strict=True):
        assert one.data.equals(other.data)


def test_columns_that_only_folders_have_are_warned_of(tmp_path: Path, opened: Opened) -> None:
    (tmp_path / "rows").mkdir()
    put(tmp_path / "rows" / "hour=3", "a.parquet", pa.table({"i": [1]}))
    with pytest.warns(RuntimeWarning, match="hour"):
        opened(tmp_path / "rows")
    put(tmp_path / "rows" / "hour=3", "a.parquet", pa.table({"i": [1], "hour": [3]}))
    opened(tmp_path / "rows")


def test_features_of_datasets_come_along(tmp_path: Path, opened: Opened) -> None:
    import datasets
    from PIL import Image

    datasets.disable_progress_bars()
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "grid": datasets.Array2D((2, 3), "float32"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
            "turns": [{"role": datasets.Value("string"), "text": datasets.Value("string")}],
        }
    )
    rows = {
        "image": [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in range(10)],
        "grid": [np.full((2, 3), value, np.float32) for value in range(10)],
        "label": [value % 2 for value in range(10)],
        "turns": [[{"role": "user", "text": "x" * value}] * value for value in range(10)],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "rows"))
    source = opened(tmp_path / "rows")
    assert b"ClassLabel" in source.schema.field("label").metadata[b"huggingface"]
    for batch in load(source, epochs=1):
        for number, row in zip(batch.numbers.tolist(), batch.data.to_pylist(), strict=True):
            assert decode_image(row["image"]).tolist() == np.full((4, 4, 3), number).tolist()
            assert row["grid"] == np.full((2, 3), number).tolist()
            assert (row["label"], row["turns"]) == (number % 2, rows["turns"][number])
    only = next(load(source, batch=10, columns=("image", "label"), epochs=1))
    assert only.data.schema.names == ["image", "label"]
    assert sorted(decode_image(image)[0, 0, 0] for image in only.data["image"].to_pylist()) == list(range(10))


class Timeless(MemoryStorage):
    """A storage that does not say when its files were changed."""

    def list(self, folder: str = "") -> Iterator[Stat]:
        return (replace(stat, modified=0.0) for stat in super().list(folder))


def parquet(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    return sink.getvalue().to_pybytes()


def test_elsewhere_a_file_is_known_by_its_footer(tmp_path: Path, opened: Opened) -> None:
    storage = MemoryStorage(f"elsewhere {tmp_path}")
    storage.put("a.parquet", parquet(table(0, 10)))
    storage.put("b.parquet", parquet(table(10, 20)))
    source = opened(storage)
    storage.put("b.parquet", parquet(table(10, 19)))
    with pytest.raises(CorruptError, match="a file has changed") as caught:
        deque(load(source, epochs=1), maxlen=0)
    assert caught.value.values["file"] == "b.parquet"


def test_without_times_the_index_is_made_each_time(tmp_path: Path, opened: Opened) -> None:
    storage = Timeless(f"timeless {tmp_path}")
    storage.put("a.parquet", parquet(table(0, 10)))
    first = opened(storage)
    again = opened(storage)
    assert again.indexed.files_read == 1
    assert again.uuid == first.uuid


def test_the_index_is_kept_at_home_unless_told_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    put(tmp_path / "rows", "a.parquet", table(0, 10))
    for wanted in (1, 0):
        assert open_files(tmp_path / "rows").indexed.files_read == wanted
    assert len(list((tmp_path / "home" / ".cache" / "datastore" / "files").rglob("*.json"))) == 1


def test_only_the_last_few_indexes_of_a_folder_are_kept(tmp_path: Path, opened: Opened) -> None:
    for number in range(7):
        put(tmp_path / "rows", f"{number}.parquet", table(0, 10))
        opened(tmp_path / "rows")
    assert len(list((tmp_path / "index").rglob("*.json"))) == 4
