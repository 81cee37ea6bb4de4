"""Batches of rows: each row once an epoch, the same on any number of ranks, resumed anywhere, made by any hands."""

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

import datastore as ds
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, CorruptError, RejectedError, ResumeError
from datastore.loader.order.order import Planner
from datastore.loader.place.position import Position
from datastore.loader.rows.assemble import Assembler
from datastore.loader.rows.batch import RowBatch, Rows
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.resume import check_resumes_everywhere

ROWS = 230
FEW = LoaderSettings(threads=2, prefetch_batches=3)


def table(start: int, stop: int) -> pa.Table:
    numbers = range(start, stop)
    return pa.table(
        {
            "id": [f"row {number}" for number in numbers],
            "number": pa.array(numbers, pa.int64()),
            "turns": [[{"role": "user", "text": "x" * (number % 7)}] * (number % 3) for number in numbers],
            "image": pa.array([bytes([number % 256]) * 50 for number in numbers], pa.binary()),
        }
    )


@pytest.fixture(params=["arrow", "parquet"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    """Rows numbered from 0, in three shards of several batches each."""
    url = str(tmp_path / "rows")
    for start, stop in ((0, 100), (100, 101), (101, ROWS)):
        with ds.record_writer(url, schema=table(0, 3).schema, format=request.param) as out:
            out.write(table(start, stop))
    return ds.open(url)


def load(
    dataset: Dataset, *, batch: int = 7, rank: Rank | None = None, rows: Rows | None = None, **options: Any
) -> RowLoader:
    settings = LoaderSettings(**{"threads": 2, "prefetch_batches": 3, "window": 16} | options)
    return RowLoader(dataset, global_batch=batch, seed=5, rank=rank or Rank(), rows=rows or Rows(), options=settings)


def all_of(parts: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(parts))


def numbers(batch: RowBatch) -> list[int]:
    found: list[int] = batch.data["number"].to_pylist()
    return found


def test_an_epoch_has_each_row_once_and_the_rows_are_those_that_were_written(dataset: Dataset) -> None:
    batches = list(load(dataset, epochs=1))
    assert len(batches) == -(-ROWS // 7)
    assert sorted(all_of(map(numbers, batches))) == list(range(ROWS))
    assert all_of(map(numbers, batches)) != list(range(ROWS))
    for batch in batches:
        assert batch.numbers.tolist() == numbers(batch)
        wanted = [table(number, number + 1).to_pylist()[0] for number in numbers(batch)]
        assert batch.data.to_pylist() == wanted
    two = list(load(dataset, epochs=2))
    assert sorted(all_of(map(numbers, two))) == sorted([*range(ROWS)] * 2)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_each_step_has_the_same_rows_on_any_number_of_ranks(dataset: Dataset, world: int) -> None:
    alone = [sorted(numbers(batch)) for batch, _ in zip(load(dataset), range(40), strict=False)]
    ranks = [load(dataset, rank=Rank(rank, world)) for rank in range(world)]
    for step in range(40):
        parts = [next(rank) for rank in ranks]
        assert sorted(all_of(map(numbers, parts))) == alone[step]
        assert len({part.cursor for part in parts}) == 1


def test_threads_memory_and_foresight_change_nothing(dataset: Dataset) -> None:
    wanted = [numbers(batch) for batch in load(dataset, epochs=1, threads=0)]
    for options in ({"threads": 8, "prefetch_batches": 16}, {"prefetch_batches": 0}):
        assert [numbers(batch) for batch in load(dataset, epochs=1, **options)] == wanted
    with pytest.warns(RuntimeWarning, match="will be read again and again"):
        short = load(dataset, epochs=1, memory_bytes=1)
    assert [numbers(batch) for batch in short] == wanted
    assert short.stats()["evictions"] > 0


def test_unshuffled_rows_come_in_the_order_of_the_dataset_on_any_number_of_ranks(dataset: Dataset) -> None:
    assert all_of(map(numbers, load(dataset, epochs=2, shuffle=False))) == [*range(ROWS)] * 2
    ranks = [load(dataset, epochs=1, shuffle=False, rank=Rank(rank, 2)) for rank in range(2)]
    steps = zip(*ranks, strict=True)
    assert [numbers(one) + numbers(two) for one, two in steps][:5] == [[*range(at, at + 7)] for at in range(0, 35, 7)]
    chosen = load(dataset, rows=Rows(numbers=np.array([9, 3, 3, 200])), epochs=1, shuffle=False)
    assert all_of(map(numbers, chosen)) == [3, 3, 9, 200]
    with pytest.raises(ResumeError, match="shuffle"):
        load(dataset).load_state_dict(load(dataset, shuffle=False).state_dict())


def test_it_resumes_everywhere(dataset: Dataset) -> None:
    def open_at(state: Any) -> RowLoader:
        loader = load(dataset, batch=30, epochs=2)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    check_resumes_everywhere(open_at, steps=20, value=numbers)


def test_a_state_goes_on_with_another_batch_and_world(dataset: Dataset) -> None:
    whole = np.concatenate([np.sort(batch.positions) for batch in load(dataset, epochs=1)])
    first = load(dataset, epochs=1)
    taken = [next(first) for _ in range(4)]
    second = [load(dataset, batch=11, epochs=1, rank=Rank(rank, 2)) for rank in range(2)]
    for loader in second:
        loader.load_state_dict(first.state_dict())
    rest = [batch.positions for loader in second for batch in loader]
    assert sorted(np.concatenate([*(batch.positions for batch in taken), *rest]).tolist()) == whole.tolist()


def test_skip_and_plan_read_nothing_and_agree_with_what_comes(dataset: Dataset) -> None:
    loader = load(dataset)
    planned = loader.plan(5)
    loader.skip(3)
    assert [next(loader).numbers.tolist() for _ in range(2)] == [one.tolist() for one in planned[3:]]


def test_rows_taken_together_are_those_taken_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.table(
        {
            "number": range(400),
            "text": [None if number % 5 == 0 else "x" * (number % 9) for number in range(400)],
            "turns": [[{"role": "user", "at": [number] * (number % 3)}] * (number % 4) for number in range(400)],
            "sure": pa.array([bool(number % 2) for number in range(400)]),
        }
    )
    for start in range(0, 400, 100):
        with ds.record_writer(str(tmp_path / "x"), schema=rows.schema) as out:
            out.write(rows.slice(start, 100))
    dataset = ds.open(tmp_path / "x")
    for taken in (1, 10**9):
        monkeypatch.setattr("datastore.loader.rows.gather._TAKEN", taken)
        for batch in load(dataset, batch=64, epochs=1, window=64):
            assert batch.data.to_pylist() == [rows.slice(number, 1).to_pylist()[0] for number in batch.numbers.tolist()]


# What is chosen


@pytest.mark.parametrize("where", ["number % 10 = 3", pc.equal(pc.field("number"), 103)])
def test_a_condition_chooses_rows(dataset: Dataset, where: Any) -> None:
    rows = Rows(where=where)
    found = sorted(all_of(map(numbers, load(dataset, rows=rows, epochs=1))))
    assert found == ([103] if not isinstance(where, str) else list(range(3, ROWS, 10)))


def test_a_list_chooses_rows_and_may_repeat_them(dataset: Dataset) -> None:
    wanted = [5, 5, 5, 100, 229, 0]
    loader = load(dataset, rows=Rows(numbers=np.array(wanted)), epochs=1, batch=4)
    assert sorted(all_of(map(numbers, loader))) == sorted(wanted)
    assert loader.rows_per_epoch == 6


def test_the_choice_is_part_of_the_state(dataset: Dataset) -> None:
    state = load(dataset, rows=Rows(where="number < 100")).state_dict()
    load(dataset, rows=Rows(numbers=np.arange(100))).load_state_dict(state)
    with pytest.raises(ResumeError, match="fingerprint"):
        load(dataset, rows=Rows(where="number < 101")).load_state_dict(state)
    with pytest.raises(ResumeError, match="fingerprint"):
        load(dataset).load_state_dict(state)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (Rows(numbers=np.array([ROWS])), "there is no such row"),
        (Rows(numbers=np.array([-1])), "there is no such row"),
        (Rows(numbers=np.array([0.5])), "whole numbers"),
        (Rows(numbers=np.array([], np.int64)), "no row is chosen"),
        (Rows(where="number < 0"), "no row is chosen"),
        (Rows(where="number < 0", numbers=np.array([1])), "both a condition and a list"),
        (Rows(workers=-1), "workers"),
    ],
)
def test_a_wrong_choice_is_refused_at_once(dataset: Dataset, rows: Rows, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(dataset, rows=rows)


def test_only_the_columns_asked_for_are_there(dataset: Dataset) -> None:
    batch = next(load(dataset, columns=("number", "image")))
    assert batch.data.schema.names == ["number", "image"]
    columns = batch.columns()
    assert columns["number"].dtype == np.int64
    assert columns["image"][0] == bytes([columns["number"][0] % 256]) * 50
    with pytest.raises(ConfigError, match="no such column"):
        load(dataset, columns=("nothing",))


# Deleted rows


def test_deleted_rows_leave_the_batches_and_the_order_stays(dataset: Dataset) -> None:
    before = load(dataset, epochs=1)
    wanted = [numbers(batch) for batch in before]
    first = load(dataset, epochs=1)
    assert [numbers(next(first)) for _ in range(3)] == wanted[:3]
    ds.delete(dataset.url, where="number % 2 = 0")
    later = load(ds.open(dataset.url), epochs=1)
    later.load_state_dict(first.state_dict())
    assert [numbers(batch) for batch in later] == [[one for one in batch if one % 2] for batch in wanted[3:]]
    compact = load(ds.open(dataset.url), epochs=1, deletions="compact")
    assert sorted(all_of(map(numbers, compact))) == list(range(1, ROWS, 2))


# Transform and collate


def shout(row: dict[str, Any], random: np.random.Generator) -> tuple[int, int, int]:
    """The row's number, a draw, and who made it."""
    return row["number"], int(random.integers(2**40)), os.getpid()


def fails_on_13(row: dict[str, Any], _random: np.random.Generator) -> int:
    if row["number"] == 13:
        raise ZeroDivisionError("thirteen")
    number: int = row["number"]
    return number


def total(rows: list[tuple[int, int, int]]) -> int:
    return sum(row[0] for row in rows)


def test_a_draw_depends_on_seed_and_position_not_on_who_makes_it(dataset: Dataset) -> None:
    plain = load(dataset, rows=Rows(transform=shout), threads=0, epochs=1)
    wanted = [[row[:2] for row in batch.data] for batch in plain]
    assert len({draw for batch in wanted for _, draw in batch}) == ROWS
    threads = load(dataset, rows=Rows(transform=shout), threads=4, epochs=1)
    assert [[row[:2] for row in batch.data] for batch in threads] == wanted
    with load(dataset, rows=Rows(transform=shout, workers=2), epochs=1) as processes:
        batches = [batch.data for batch in processes]
    assert [[row[:2] for row in batch] for batch in batches] == wanted
    makers = {pid for batch in batches for _, _, pid in batch}
    assert os.getpid() not in makers
    assert 1 <= len(makers) <= 2
    split = [load(dataset, rows=Rows(transform=shout), epochs=1, rank=Rank(rank, 2)) for rank in range(2)]
    assert sorted(row[:2] for rank in split for batch in rank for row in batch.data) == sorted(all_of(wanted))


def test_collate_is_given_what_transform_made_or_the_rows(dataset: Dataset) -> None:
    made = load(dataset, rows=Rows(transform=shout, collate=total), epochs=1)
    assert sum(batch.data for batch in made) == ROWS * (ROWS - 1) // 2
    rows = load(dataset, rows=Rows(collate=lambda batch: pc.sum(batch["number"]).as_py()), epochs=1)
    assert sum(batch.data for batch in rows) == ROWS * (ROWS - 1) // 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_that_fails_is_named_and_tried_again_or_left_out(dataset: Dataset, workers: int) -> None:
    loader = load(dataset, rows=Rows(transform=fails_on_13, workers=workers), epochs=1)
    seen: list[int] = []

    def drain() -> None:
        for batch in loader:
            seen.extend(batch.data)

    for _ in range(2):
        with pytest.raises(RejectedError, match=r"ZeroDivisionError: thirteen \(row=13, id='row 13'\)"):
            drain()
        before = loader.cursor
    assert loader.cursor == before == len(seen)
    loader.close()
    with load(dataset, rows=Rows(transform=fails_on_13, workers=workers, on_error="leave_out"), epochs=1) as rest:
        batches = list(rest)
        assert rest.stats()["failed"] == 1
    assert sorted(all_of(batch.data for batch in batches)) == [one for one in range(ROWS) if one != 13]
    assert [batch.failed for batch in batches if batch.failed] == [{13: "ZeroDivisionError: thirteen"}]
    assert all(batch.numbers.tolist() == batch.data for batch in batches)


def test_what_cannot_be_sent_to_workers_is_refused_at_once(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="at the top of a module"):
        load(dataset, rows=Rows(transform=lambda row, _: row, workers=1))


@pytest.mark.parametrize(("owner", "name"), [(Planner, "plan"), (Assembler, "make"), (Position, "end_of")])
@pytest.mark.parametrize("after", [False, True], ids=["before it", "after it"])
def test_after_any_exception_the_next_batch_is_the_next_one(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, *, after: bool
) -> None:
    wanted = [numbers(batch) for batch in load(dataset, epochs=1)]
    loader = load(dataset, epochs=1, threads=0)
    honest, calls = getattr(owner, name), itertools.count(1)
    interrupted = 0

    def now_and_then(self: Any, *arguments: Any, **named: Any) -> Any:
        stop = next(calls) % 3 == 1
        if stop and not after:
            raise KeyboardInterrupt
        result = honest(self, *arguments, **named)
        if stop:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, now_and_then)
    seen: list[list[int]] = []
    while True:
        try:
            seen.append(numbers(next(loader)))
        except KeyboardInterrupt:
            interrupted += 1
        except StopIteration:
            break
    assert seen == wanted
    assert interrupted


def test_damage_names_the_shard_and_the_cursor_stays(dataset: Dataset) -> None:
    shard = dataset.segments.shard(2)
    path = Path(dataset.url) / shard.path
    raw = bytearray(path.read_bytes())
    start = shard.layout.batches[0].start
    raw[start + 40] ^= 255
    path.write_bytes(raw)
    loader = load(ds.open(dataset.url), epochs=1)
    with pytest.raises(CorruptError, match=shard.path):
        list(loader)
    before = loader.cursor
    with pytest.raises(CorruptError, match=shard.path):
        next(loader)
    assert loader.cursor == before


def test_tokens_are_refused_and_say_where_to_go(tmp_path: Path) -> None:
    from datastore.testing.examples import make_dataset

    with pytest.raises(ConfigError, match="Read it with `Loader`"):
        RowLoader(make_dataset(tmp_path / "tokens", [[100]]), global_batch=2)
