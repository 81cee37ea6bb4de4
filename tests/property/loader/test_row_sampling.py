"""Other ways to go through rows: each weight and each stratum at its rate, the same on any number of ranks, resumed anywhere."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import datastore as ds
from datastore.errors import ConfigError, ResumeError
from datastore.loader.order.order import OrderKey
from datastore.loader.rows.batch import Rows
from datastore.loader.rows.grid import RowGrid
from datastore.loader.rows.loader import RowLoader
from datastore.loader.rows.sampling import Stratified, Weighted
from datastore.loader.rows.strata import stratified_grid
from datastore.loader.rows.weighted import subset_grid, weighted_grid
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.resume import check_resumes_everywhere

ROWS = 300


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ds.Dataset:
    """Rows in three shards: a rare class, a common one, and weights of 0 to 9."""
    url = str(tmp_path_factory.mktemp("rows") / "rows")
    numbers = np.arange(ROWS)
    rows = pa.table(
        {
            "number": numbers,
            "label": np.where(numbers % 37 == 0, "rare", "common"),
            "weight": (numbers % 10).astype(float),
        }
    )
    for start, stop in ((0, 40), (40, 200), (200, ROWS)):
        with ds.record_writer(url, schema=rows.schema) as out:
            out.write(rows.slice(start, stop - start))
    return ds.open(url)


def load(dataset: Any, sample: Any, *, batch: int = 8, rank: Rank | None = None, **options: Any) -> RowLoader:
    settings = LoaderSettings(**{"threads": 0, "prefetch_batches": 0, "window": 16} | options)
    rows = Rows(sample=sample)
    return RowLoader(dataset, global_batch=batch, seed=5, rank=rank or Rank(), rows=rows, options=settings)


def grid_of(shards: list[int]) -> tuple[RowGrid, np.ndarray]:
    rows = np.array(shards)
    starts = np.cumsum(rows) - rows
    return RowGrid(int(rows.sum()), starts, rows, starts), np.arange(len(rows), dtype=np.uint64) * 77


shards = st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(lambda rows: sum(rows) > 0)
keys = st.builds(OrderKey, st.integers(0, 2**63 - 1), st.integers(1, 40), st.integers(1, 40), st.booleans())


def drawn(grid: Any, uid64: np.ndarray, key: OrderKey, start: int, stop: int) -> np.ndarray:
    positions = np.arange(start, stop)
    return grid.numbers(grid.order(uid64, key).locate(positions).samples, positions)


# With replacement


@given(shards, keys, st.data())
def test_a_row_comes_as_often_as_its_weight_says_up_to_two(rows: list[int], key: OrderKey, data: st.DataObject) -> None:
    grid, uid64 = grid_of(rows)
    weights = np.array(data.draw(st.lists(st.integers(0, 1000), min_size=grid.samples, max_size=grid.samples)), float)
    if not weights.any():
        weights[0] = 1
    draws = data.draw(st.integers(1, 2000), label="draws")
    found = weighted_grid(grid, weights, draws=draws, seed=key.seed)
    assert draws <= found.rows_per_epoch < draws + found.passes
    for epoch in range(2):
        start = epoch * found.rows_per_epoch
        counts = np.bincount(drawn(found, uid64, key, start, start + found.rows_per_epoch), minlength=grid.samples)
        ideal = found.rows_per_epoch * weights / weights.sum()
        assert (np.abs(counts - ideal) < 2).all()
        assert not counts[weights == 0].any()


def test_a_heavy_row_comes_all_the_time_and_epochs_differ() -> None:
    grid, uid64 = grid_of([500, 1500])
    weights = np.ones(2000)
    weights[1234] = 400  # a sixth of all
    found = weighted_grid(grid, weights, draws=12_000, seed=3)
    key = OrderKey(3, 1, 256)
    draws = drawn(found, uid64, key, 0, 2 * found.rows_per_epoch) == 1234
    for start in range(0, found.rows_per_epoch, 1200):
        assert 150 < draws[start : start + 1200].sum() < 250
    epochs = [drawn(found, uid64, key, start, start + found.rows_per_epoch) for start in (0, found.rows_per_epoch)]
    assert (np.bincount(epochs[0], minlength=2000) != np.bincount(epochs[1], minlength=2000)).any()


def test_which_row_is_drawn_is_chance_within_its_share() -> None:
    # Over many epochs the mean count is the ideal one: the rounding is not always to one side.
    grid, uid64 = grid_of([10])
    weights = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 5.5])
    found = weighted_grid(grid, weights, draws=7, seed=11)
    epochs = 3000
    counts = np.bincount(drawn(found, uid64, OrderKey(11, 1, 16), 0, epochs * 7), minlength=10)
    ideal = epochs * 7 * weights / weights.sum()
    assert (np.abs(counts - ideal) < 6 * np.sqrt(epochs)).all()  # Each epoch adds a variance of 1 at most.


# Without replacement


@given(shards, keys, st.data())
def test_without_replacement_a_row_comes_once_an_epoch_at_most(
    rows: list[int], key: OrderKey, data: st.DataObject
) -> None:
    grid, uid64 = grid_of(rows)
    weights = np.array(data.draw(st.lists(st.integers(0, 9), min_size=grid.samples, max_size=grid.samples)), float)
    if not weights.any():
        weights[0] = 1
    draws = data.draw(st.integers(1, int(np.count_nonzero(weights))), label="draws")
    found = subset_grid(grid, weights, draws=draws, seed=key.seed)
    for epoch in range(3):
        numbers = drawn(found, uid64, key, epoch * draws, (epoch + 1) * draws)
        assert len(set(numbers.tolist())) == draws
        assert (weights[numbers] > 0).all()


def test_without_replacement_the_chance_of_a_row_follows_its_weight() -> None:
    grid, uid64 = grid_of([1000])
    weights = np.repeat([1.0, 3.0], 500)
    found = subset_grid(grid, weights, draws=100, seed=2)
    epochs = 200
    numbers = drawn(found, uid64, OrderKey(2, 1, 100), 0, 100 * epochs)
    heavy = np.count_nonzero(numbers >= 500) / len(numbers)
    assert abs(heavy - 0.75) < 0.02
    assert len(set(numbers.tolist())) > 990  # Each epoch draws anew.


# Strata


@given(shards, keys, st.data())
def test_each_stratum_has_its_share_at_every_moment_and_each_row_comes_once(
    rows: list[int], key: OrderKey, data: st.DataObject
) -> None:
    grid, uid64 = grid_of(rows)
    strata = np.array(data.draw(st.lists(st.integers(0, 5), min_size=grid.samples, max_size=grid.samples)))
    found = stratified_grid(grid, strata)
    numbers = drawn(found, uid64, key, 0, 2 * grid.samples)
    for epoch in (numbers[: grid.samples], numbers[grid.samples :]):
        assert sorted(epoch.tolist()) == list(range(grid.samples))
    for value in np.unique(strata):
        so_far = np.cumsum(strata[numbers] == value)
        ideal = np.arange(1, len(numbers) + 1) * np.count_nonzero(strata == value) / grid.samples
        assert (np.abs(so_far - ideal) <= 2).all()


@given(shards, st.integers(0, 2**63 - 1), st.data())
def test_shards_are_those_of_the_rows(rows: list[int], seed: int, data: st.DataObject) -> None:
    grid, uid64 = grid_of(rows)
    strata = np.array(data.draw(st.lists(st.integers(0, 3), min_size=grid.samples, max_size=grid.samples)))
    found = stratified_grid(grid, strata)
    located = found.order(uid64, OrderKey(seed, 7, 5)).locate(np.arange(grid.samples))
    numbers = found.numbers(located.samples, np.arange(grid.samples))
    ends = np.cumsum(rows)
    assert located.shards.tolist() == np.searchsorted(ends, numbers, side="right").tolist()


# All of them, in the loader

SAMPLES = [
    Weighted("weight"),
    Weighted(np.arange(ROWS) % 3, rows=100),
    Weighted("weight", replacement=False, rows=60),
    Stratified("label"),
]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("world", [2, 3, 8])
def test_each_step_has_the_same_rows_on_any_number_of_ranks(dataset: ds.Dataset, sample: Any, world: int) -> None:
    alone = [sorted(next(loader).numbers.tolist()) for loader in [load(dataset, sample)] for _ in range(60)]
    ranks = [load(dataset, sample, rank=Rank(rank, world)) for rank in range(world)]
    for step in range(60):
        parts = [next(rank) for rank in ranks]
        assert sorted(itertools.chain.from_iterable(part.numbers.tolist() for part in parts)) == alone[step]
        for part in parts:
            assert part.data["number"].to_pylist() == part.numbers.tolist()


@pytest.mark.parametrize("sample", [None, *SAMPLES])
def test_epochs_differ(dataset: ds.Dataset, sample: Any) -> None:
    loader = load(dataset, sample)
    rows = loader.rows_per_epoch
    first, second = loader.numbers_at(0, rows), loader.numbers_at(rows, rows)
    assert np.count_nonzero(first == second) < rows / 4


@pytest.mark.parametrize("sample", SAMPLES)
def test_it_resumes_everywhere(dataset: ds.Dataset, sample: Any) -> None:
    def open_at(state: Any) -> RowLoader:
        loader = load(dataset, sample, batch=30, epochs=2)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    check_resumes_everywhere(open_at, steps=12, value=lambda batch: batch.numbers.tolist())


@settings(max_examples=15)
@given(st.sampled_from([None, *SAMPLES]), st.data())
def test_a_state_goes_on_with_another_world_and_batch(dataset: ds.Dataset, sample: Any, data: st.DataObject) -> None:
    whole = load(dataset, sample).numbers_at(0, 700)
    position, state = 0, None
    while position < 500:
        world = data.draw(st.integers(1, 5), label="world")
        batch = data.draw(st.integers(20, 90), label="batch")
        ranks = [load(dataset, sample, batch=batch, rank=Rank(rank, world)) for rank in range(world)]
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(state)
        taken = [next(loader) for loader in ranks]
        numbers = {
            position: number
            for part in taken
            for position, number in zip(part.positions.tolist(), part.numbers.tolist(), strict=True)
        }
        assert numbers == {at: int(whole[at]) for at in range(position, position + batch)}
        states = [loader.state_dict() for loader in ranks]
        assert all(each == states[0] for each in states)
        state, position = states[0], position + batch


@pytest.mark.parametrize("sample", SAMPLES)
def test_the_way_is_part_of_the_state(dataset: ds.Dataset, sample: Any) -> None:
    state = load(dataset, sample).state_dict()
    others = [None, Weighted(np.arange(ROWS) % 4), Weighted("weight", rows=50), Stratified("weight")]
    for other in others:
        with pytest.raises(ResumeError, match="fingerprint"):
            load(dataset, other).load_state_dict(state)


def test_a_choice_goes_with_every_way(dataset: ds.Dataset) -> None:
    for sample in (Weighted("weight"), Weighted("weight", replacement=False, rows=20), Stratified("label")):
        rows = Rows(where="number < 100", sample=sample)
        options = LoaderSettings(threads=0, epochs=1)
        loader = RowLoader(dataset, global_batch=10, rows=rows, options=options)
        assert max(number for batch in loader for number in batch.numbers.tolist()) < 100


def test_seek_and_numbers_at_read_nothing_and_agree_with_what_comes(dataset: ds.Dataset) -> None:
    loader = load(dataset, None)
    wanted = loader.numbers_at(10**12 + 5, 8)
    loader.seek(10**12 + 5)
    assert loader.stats()["fills"] == 0
    assert sorted(next(loader).numbers.tolist()) == sorted(wanted.tolist())
    short = load(dataset, None, epochs=1)
    assert len(short.numbers_at(ROWS - 3, 8)) == 3
    short.seek(ROWS)
    assert list(short) == []
    for position in (-1, ROWS + 1):
        with pytest.raises(ConfigError, match="no such position"):
            short.seek(position)
    with pytest.raises(ConfigError, match="no such positions"):
        loader.numbers_at(-1, 3)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_an_evaluation_has_each_row_once_on_one_rank(dataset: ds.Dataset, world: int) -> None:
    ranks = [load(dataset, None, rank=Rank(rank, world), epochs=1, shuffle=False) for rank in range(world)]
    steps = [list(rank) for rank in ranks]
    assert {len(batches) for batches in steps} == {-(-ROWS // 8)}
    rows = [batch.numbers.tolist() for batches in zip(*steps, strict=True) for batch in batches]
    assert list(itertools.chain.from_iterable(rows)) == list(range(ROWS))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Weighted("nothing"), "no such column"),
        (Weighted("label"), "weights are numbers"),
        (Weighted([1.0, 2.0]), "one number for each row"),
        (Weighted(np.full(ROWS, -1.0)), "negative or not finite"),
        (Weighted(np.full(ROWS, np.nan)), "negative or not finite"),
        (Weighted(np.zeros(ROWS)), "no row has a weight"),
        (Weighted("weight", rows=0), "an epoch has no rows"),
        (Weighted("weight", replacement=False), "without replacement"),
        (Weighted("weight", replacement=False, rows=ROWS), "without replacement"),
        (Stratified("nothing"), "no such column"),
        ("weighted", "no such way"),
    ],
)
def test_what_cannot_be_is_refused_at_once(dataset: ds.Dataset, sample: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(dataset, sample)


def test_a_column_of_too_many_values_is_no_strata(tmp_path: Path) -> None:
    with ds.record_writer(str(tmp_path / "x"), schema={"id": "int64"}) as out:
        out.write(pa.table({"id": range(5000)}))
    with pytest.raises(ConfigError, match="too many values"):
        load(ds.open(tmp_path / "x"), Stratified("id"))
