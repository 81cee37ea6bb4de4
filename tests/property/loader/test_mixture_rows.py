"""A mixture of rows keeps the promises that one of tokens keeps."""

import json
import os
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import datastore as ds
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, ResumeError
from datastore.loader.rows.batch import RowBatch, Rows
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.resume import check_resumes_everywhere

OPTIONS = LoaderSettings(lanes=8, window=8, threads=2, prefetch_batches=2)
SIZES = {"chat": 90, "clicks": 40, "old": 13}
SCHEMA = pa.schema([("id", pa.string()), ("n", pa.int64())])


def made(name: str, size: int) -> Dataset:
    url = f"memory://rows-{os.getpid()}-{name}"
    for part in range(3):
        with ds.record_writer(url, schema=SCHEMA) as out:
            out.write([{"id": f"{name}-{row}", "n": row} for row in range(size) if row % 3 == part])
    return ds.open(url)


@pytest.fixture(scope="module")
def sets() -> dict[str, Dataset]:
    return {name: made(name, size) for name, size in SIZES.items()}


def loader_of(mixture: ds.Mixture, *, rank: Rank = Rank(), batch: int = 12, rows: Rows = Rows()) -> RowLoader:  # noqa: B008
    return RowLoader(mixture, global_batch=batch, seed=5, rank=rank, rows=rows, options=OPTIONS)


def ids_of(batch: RowBatch) -> list[str]:
    return batch.data["id"].to_pylist()


def test_rows_come_by_weight_and_say_which_source_they_are_of(sets: dict[str, Dataset]) -> None:
    mixture = ds.Mixture(sets, {"chat": 3, "clicks": 1})
    seen: Counter[str] = Counter()
    with loader_of(mixture) as loader:
        for _ in range(30):
            batch = next(loader)
            names = [mixture.names[source] for source in batch.sources.tolist()]
            assert Counter(names) == {"chat": 9, "clicks": 3}
            assert [row.rpartition("-")[0] for row in ids_of(batch)] == names
            stored = {name: [row["id"] for row in sets[name].iter_records()] for name in SIZES}
            own = batch.own_numbers.tolist()
            assert ids_of(batch) == [stored[name][number] for name, number in zip(names, own, strict=True)]
            seen.update(ids_of(batch))
    assert {seen[f"chat-{row}"] for row in range(90)} == {3}
    assert {seen[f"clicks-{row}"] for row in range(40)} == {2, 3}


def test_epochs_end_it_and_every_row_came_as_often_as_said(sets: dict[str, Dataset]) -> None:
    mixture = ds.Mixture(sets, epochs={"chat": 1, "clicks": 2, "old": 0})
    for world in (1, 3):
        ranks = [loader_of(mixture, rank=Rank(rank, world)) for rank in range(world)]
        seen: Counter[str] = Counter()
        for step in zip(*ranks, strict=True):
            for batch in step:
                seen.update(ids_of(batch))
        assert seen == Counter({f"chat-{row}": 1 for row in range(90)}) + Counter(
            {f"clicks-{row}": 2 for row in range(40)}
        )
        assert ranks[0].batches == -(-170 // 12)


def test_it_resumes_everywhere_with_a_condition_and_on_other_ranks(sets: dict[str, Dataset]) -> None:
    mixture = ds.Mixture(sets, {"chat": 1, "old": 1})

    def open_at(state: object, rank: Rank = Rank()) -> RowLoader:  # noqa: B008
        loader = loader_of(mixture, rank=rank, rows=Rows(where="n % 2 = 0"))
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        return loader

    check_resumes_everywhere(open_at, steps=8, value=ids_of)
    whole = [sorted(ids_of(next(loader))) for loader in [open_at(None)] for _ in range(8)]
    state, found = open_at(None).state_dict(), []
    for step in range(8):
        ranks = [open_at(state, Rank(rank, 1 + step)) for rank in range(1 + step)]
        found.append(sorted(row for rank in ranks for row in ids_of(next(rank))))
        state = ranks[0].state_dict()
        for rank in ranks:
            rank.close()
    assert found == whole
    assert all(int(row.rpartition("-")[2]) % 2 == 0 for step in whole for row in step)


def test_weights_change_and_deleted_rows_leave_the_batches() -> None:
    sets = {name: made(f"{name}-gone", 30) for name in ("a", "b")}
    mixture = ds.Mixture(sets, {"a": 1, "b": 1})
    loader = loader_of(mixture)
    next(loader)
    loader.reweigh({"a": 2, "b": 1})
    state = loader.state_dict()
    assert Counter(next(loader).sources.tolist()) == {0: 8, 1: 4}
    ds.delete(sets["a"].url, ids=["a-gone-3", "a-gone-4"])
    later = ds.Mixture({name: ds.open(one.url) for name, one in sets.items()}, {"a": 1, "b": 1})
    again = loader_of(later)
    again.load_state_dict(state)
    seen = [row for _ in range(6) for row in ids_of(next(again))]
    assert not {"a-gone-3", "a-gone-4"} & set(seen)
    with pytest.raises(ResumeError, match="other weights"):
        loader_of(ds.Mixture(sets, {"a": 1, "b": 5})).load_state_dict(state)


def test_files_and_datasets_mix_on_the_columns_that_they_share(sets: dict[str, Dataset], tmp_path: Path) -> None:
    table = pa.table(
        {"id": [f"file-{row}" for row in range(20)], "n": pa.array(range(20), pa.int64()), "more": [0.5] * 20}
    )
    (tmp_path / "files").mkdir()
    pq.write_table(table, tmp_path / "files" / "one.parquet")
    files = ds.open_files(str(tmp_path / "files"), index=str(tmp_path / "index"))
    mixture = ds.Mixture({"files": files, "old": sets["old"]}, {"files": 1, "old": 1})
    with pytest.raises(ConfigError, match="different columns"):
        loader_of(mixture)
    options = LoaderSettings(lanes=8, window=8, threads=0, columns=("n", "id"))
    loader = RowLoader(mixture, global_batch=8, options=options)
    batch = next(loader)
    assert batch.data.schema.names == ["n", "id"]
    assert Counter(row.partition("-")[0] for row in ids_of(batch)) == {"file": 4, "old": 4}


def test_what_a_mixture_of_rows_cannot_do_is_said(sets: dict[str, Dataset]) -> None:
    with pytest.raises(ConfigError, match="gone through as they are"):
        loader_of(ds.Mixture(sets), rows=Rows(numbers=[1, 2]))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no such column"):
        RowLoader(ds.Mixture(sets), global_batch=8, options=LoaderSettings(columns=("nope",)))
    with pytest.raises(ConfigError, match="nothing to reweigh"):
        RowLoader(sets["old"], global_batch=8).reweigh({"old": 1})
