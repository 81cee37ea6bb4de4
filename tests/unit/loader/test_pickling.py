"""Whatever holds a dataset goes to another process, which opens it again; or says at once what to do instead."""

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datastore.dataset.diff import diff
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError
from datastore.ingestion.writers.records import record_writer
from datastore.loader.loader import Loader
from datastore.loader.rows.batch import Rows
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.examples import make_dataset
from datastore.torch import TokenDataset, stream
from datastore.training.run.split import make_split


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "set", [[400, 70, 90]] * 4)


def loader_of(dataset: Dataset, *, taken: int = 3) -> Loader:
    options = LoaderSettings(lanes=4, window=8, epochs=2)
    loader = Loader(dataset, seq_len=8, global_batch=6, seed=3, rank=Rank(1, 2), options=options)
    for _ in range(taken):
        next(loader)
    return loader


def sent(value: Any) -> Any:
    raw = pickle.dumps(value)
    assert len(raw) < 5_000  # What it has read stays behind.
    return pickle.loads(raw)


@pytest.mark.parametrize("taken", [0, 3])
def test_a_loader_goes_on_where_it_stands(dataset: Dataset, taken: int) -> None:
    with loader_of(dataset, taken=taken) as here, sent(here) as there:
        assert (there.rank, there.options, there.state_dict()) == (here.rank, here.options, here.state_dict())
        assert [batch.tokens.tolist() for batch in there] == [batch.tokens.tolist() for batch in here]


def test_a_stream_goes_on_where_it_stands(dataset: Dataset) -> None:
    here = stream(loader_of(dataset))
    next(here)
    there = sent(here)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.tokens, other.tokens)


def test_batches_and_differences_are_what_they_were(dataset: Dataset) -> None:
    batch = next(loader_of(dataset))
    assert sent(batch).fingerprint() == batch.fingerprint()
    assert sent(batch).documents() == batch.documents()
    assert str(sent(diff(dataset, dataset))) == str(diff(dataset, dataset))


def test_a_part_of_a_dataset_is_that_part(dataset: Dataset) -> None:
    split = make_split(dataset, holdout=0.2, validation=None)
    for part in (split.training, split.validation[""]):
        assert sent(part).segments.tokens.tolist() == part.segments.tokens.tolist()
        assert part.segments.tokens.sum() < dataset.segments.tokens.sum()


@pytest.mark.parametrize("taken", [0, 3])
def test_a_loader_of_rows_goes_on_where_it_stands(tmp_path: Path, taken: int) -> None:
    with record_writer(str(tmp_path / "rows"), schema={"a": "int64"}) as out:
        out.write([{"a": row} for row in range(50)])
    dataset = open_dataset(tmp_path / "rows")
    with RowLoader(dataset, global_batch=6, rank=Rank(1, 2), options=LoaderSettings(epochs=1)) as here:
        for _ in range(taken):
            next(here)
        with sent(here) as there:
            assert [batch.numbers.tolist() for batch in there] == [batch.numbers.tolist() for batch in here]


def test_a_loader_of_rows_that_cannot_be_sent_says_why(tmp_path: Path) -> None:
    with record_writer(str(tmp_path / "rows"), schema={"a": "int64"}) as out:
        out.write([{"a": row} for row in range(50)])
    rows = Rows(transform=lambda row: row)
    with pytest.raises(ConfigError, match="transform"):
        pickle.dumps(RowLoader(open_dataset(tmp_path / "rows"), global_batch=6, rows=rows))


def test_a_dataset_of_tensors_says_at_once_what_to_do(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="num_workers=0"):
        pickle.dumps(TokenDataset(loader_of(dataset)))


def first_tokens(loader: Loader) -> list[list[int]]:
    return next(loader).tokens.tolist()


@pytest.mark.parametrize("wrap", [lambda loader: loader, stream], ids=["loader", "stream"])
def test_a_spawned_process_gets_the_next_batch(dataset: Dataset, wrap: Callable[[Loader], Any]) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.apply(first_tokens, (wrap(loader_of(dataset)),))
    assert there == first_tokens(wrap(loader_of(dataset)))
