"""Every way of reading, stopped after every step and gone on with by another number of ranks: from 1 to 8, in turn.

All ranks of a world read here in one process. A step is what they have together, by the rows' own contents, so a row that is lost,
repeated, moved to another step or altered shows, whoever has it.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import pytest
from torch.utils.data import DataLoader

import datastore as ds
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.examples import make_dataset
from datastore.testing.resume import check_resumes_everywhere
from datastore.torch import SampleDataset, TokenDataset

pytestmark = pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")

SEQ, BATCH, STEPS = 16, 24, 12
"""An epoch of 100 samples or rows ends within the fifth step, so three are seen."""

OPTIONS = LoaderSettings(lanes=8, window=4, threads=2)

State = Mapping[str, Any]


class Reader(Protocol):
    """One rank."""

    def take(self) -> list[Any]:
        """Return the rows of the next step."""
        ...

    def state_dict(self) -> State: ...


class Tokens:
    """`Loader` itself."""

    def __init__(self, data: Any, rank: Rank, state: State | None) -> None:
        self.loader = ds.Loader(data, seq_len=SEQ, global_batch=BATCH, seed=3, rank=rank, options=OPTIONS)
        if state is not None:
            self.loader.load_state_dict(state)

    def take(self) -> list[Any]:
        return next(self.loader).tokens.tolist()

    def state_dict(self) -> State:
        return self.loader.state_dict()


class TokensOfTorch(Tokens):
    """A `TokenDataset` in a `DataLoader`, pass after pass."""

    def __init__(self, data: Any, rank: Rank, state: State | None) -> None:
        super().__init__(data, rank, state)
        self.loading = DataLoader(TokenDataset(self.loader), batch_size=None)
        self.batches: Iterator[Any] = iter(())

    def take(self) -> list[Any]:
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loading)
            batch = next(self.batches)
        return batch.tokens.tolist()


class Rows:
    """`RowLoader`, with a transform that depends on chance."""

    def __init__(self, data: Any, rank: Rank, state: State | None) -> None:
        rows = ds.Rows(transform=lambda row, random: (row["id"], row["text"], random.random()), collate=list)
        self.loader = ds.RowLoader(data, global_batch=BATCH, seed=3, rank=rank, rows=rows, options=OPTIONS)
        if state is not None:
            self.loader.load_state_dict(state)

    def take(self) -> list[Any]:
        return list(next(self.loader).data)

    def state_dict(self) -> State:
        return self.loader.state_dict()


class ByNumber:
    """`SampleDataset`, of which each rank takes its part of every `BATCH` numbers; the state is the number."""

    def __init__(self, data: Any, rank: Rank, state: State | None) -> None:
        self.data = SampleDataset(data, seq_len=SEQ, seed=3, options=LoaderSettings(epochs=3, lanes=8, window=4))
        self.rank, self.at = rank, 0 if state is None else state["at"]

    def take(self) -> list[Any]:
        start, stop = self.rank.share(BATCH)
        self.at += BATCH
        return [
            item["input_ids"].tolist()
            for item in self.data.__getitems__(range(self.at - BATCH + start, self.at - BATCH + stop))
        ]

    def state_dict(self) -> State:
        return {"at": self.at}


class World:
    """All ranks of one number of them."""

    def __init__(self, readers: list[Reader]) -> None:
        self.readers = readers

    def __next__(self) -> list[Any]:
        return sorted(row for reader in self.readers for row in reader.take())

    def state_dict(self) -> State:
        states = [reader.state_dict() for reader in self.readers]
        assert all(state == states[0] for state in states)
        return states[0]


def tokens_at(url: str) -> Any:
    make_dataset(url, [[900], [600, 101]], block_bytes=1024)  # 100 samples
    return lambda: ds.open(url)


def mixture_at(url: str) -> Any:
    make_dataset(f"{url}/a", [[900], [201]], block_bytes=1024)
    make_dataset(f"{url}/b", [[500]], block_bytes=1024, name="other")
    return lambda: ds.Mixture({"a": ds.open(f"{url}/a"), "b": ds.open(f"{url}/b")}, weights={"a": 2, "b": 1})


def rows_at(url: str) -> Any:
    for part in range(2):
        with ds.record_writer(url, schema={"id": "int64", "text": "string"}) as out:
            out.write([{"id": number, "text": f"row {number}"} for number in range(50 * part, 50 * part + 50)])
    return lambda: ds.open(url)


WAYS: dict[str, tuple[Callable[[str], Any], Callable[..., Reader]]] = {
    "Loader": (tokens_at, Tokens),
    "Loader of a mixture": (mixture_at, Tokens),
    "TokenDataset": (tokens_at, TokensOfTorch),
    "SampleDataset": (tokens_at, ByNumber),
    "RowLoader": (rows_at, Rows),
}


def check(way: str, url: str, *, steps: int) -> None:
    make, kind = WAYS[way]
    opened = make(url)
    worlds = cycle(
        [1, 8, 3, 2, 7, 4, 6, 5]
    )  # The undisturbed run has one rank, then none has as many as the one before.
    met = set()

    def open_at(state: State | None) -> World:
        world = next(worlds)
        met.add(world)
        return World([kind(opened(), Rank(rank, world), state) for rank in range(world)])

    check_resumes_everywhere(open_at, steps=steps)
    assert met == {1, 2, 3, 4, 5, 6, 7, 8}


@pytest.mark.parametrize("way", WAYS)
def test_whoever_goes_on_sees_what_the_undisturbed_run_saw(way: str, tmp_path: Path) -> None:
    check(way, str(tmp_path / "data"), steps=STEPS)


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_same_from_an_object_store(way: str, s3_url: str) -> None:
    check(way, s3_url, steps=7)


def test_the_check_would_see_a_row_that_two_ranks_read(tmp_path: Path) -> None:
    opened = tokens_at(str(tmp_path / "data"))
    worlds = iter([1, 2, 2, 2])

    def open_at(state: State | None) -> World:
        world = next(worlds)
        return World([ByNumber(opened(), Rank(0, world), state) for _ in range(world)])

    with pytest.raises(AssertionError, match="resumed at step 0, item 0 differs"):
        check_resumes_everywhere(open_at, steps=2)
