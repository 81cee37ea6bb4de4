"""The loader's promise, held against real data: however a run is cut up, together it is the undisturbed one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.snapshot import Dataset
from datastore.loader.batch import Batch
from datastore.loader.loader import Loader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.examples import make_dataset
from datastore.testing.resume import check_resumes_everywhere

SHARDS = [[700, 300], [5], [2_000, 11], [1, 1, 1], [900]]
SEQ_LEN = 7
BLOCK = 1024

seeds = st.integers(0, 2**63 - 1)


@dataclass(frozen=True)
class Known:
    """A dataset and, read the simple way, all of its tokens."""

    dataset: Dataset
    tokens: np.ndarray = field(repr=False)

    def sample(self, number: int) -> list[int]:
        return self.tokens[number * SEQ_LEN : number * SEQ_LEN + SEQ_LEN + 1].tolist()


@pytest.fixture(scope="module", params=["memory", "local"])
def known(request: pytest.FixtureRequest) -> Iterator[Known]:
    folder = Path(tempfile.mkdtemp())
    url = f"memory://resume-{os.getpid()}" if request.param == "memory" else str(folder / "data")
    dataset = make_dataset(url, SHARDS, block_bytes=BLOCK)
    yield Known(dataset, np.concatenate([dataset.token_shard(shard)[0] for shard in range(len(SHARDS))]))
    shutil.rmtree(folder)


def small(**changes: int) -> LoaderSettings:
    return LoaderSettings(**{"lanes": 16, "window": 8, "threads": 0, "memory_bytes": 6 * BLOCK} | changes)


def one_step(loaders: list[Loader]) -> list[Batch]:
    return [next(loader) for loader in loaders]


def rows_of(step: list[Batch]) -> dict[int, tuple[int, list[int]]]:
    """position -> (sample, its tokens), over all ranks."""
    return {
        int(position): (int(sample), row.tolist())
        for batch in step
        for position, sample, row in zip(batch.positions, batch.samples, batch.tokens, strict=True)
        if position >= 0
    }


@settings(max_examples=40)
@given(seed=seeds, data=st.data())
@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
def test_stop_after_any_step_and_resume_with_any_world_and_batch_size(
    known: Known, seed: int, data: st.DataObject
) -> None:
    state, cursor, union = None, 0, {}
    for _ in range(data.draw(st.integers(1, 4), label="launches")):
        world = data.draw(st.integers(1, 8), label="world")
        global_batch = data.draw(st.integers(world, 64), label="global batch")
        loaders = [
            Loader(
                known.dataset,
                seq_len=SEQ_LEN,
                global_batch=global_batch,
                seed=seed,
                rank=Rank(rank, world),
                options=small(lanes=data.draw(st.sampled_from([16, 3])) if state else 16),
            )
            for rank in range(world)
        ]
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(data.draw(st.integers(0, 12), label="steps")):
            rows = rows_of(one_step(loaders))
            assert sorted(rows) == list(range(cursor, cursor + global_batch))
            union |= rows
            cursor += global_batch
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states)
        state = states[0]
        for loader in loaders:
            loader.close()
    assert state is not None
    assert state["cursor"] == cursor
    undisturbed = Loader(known.dataset, seq_len=SEQ_LEN, global_batch=max(1, cursor), seed=seed, options=small())
    assert union == (rows_of([next(undisturbed)]) if cursor else {})
    for sample, tokens in union.values():
        assert tokens == known.sample(sample)
    epoch = undisturbed.samples_per_epoch
    for first in range(0, cursor - epoch + 1, epoch):
        assert sorted(union[position][0] for position in range(first, first + epoch)) == list(range(epoch))


@settings(max_examples=30)
@given(seed=seeds, world=st.integers(1, 8), more=st.integers(0, 60), steps=st.integers(1, 4))
@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
def test_fingerprints_of_the_ranks_add_up_to_that_of_the_whole(
    known: Known, seed: int, world: int, more: int, steps: int
) -> None:
    def loader(place: Rank) -> Loader:
        return Loader(known.dataset, seq_len=SEQ_LEN, global_batch=world + more, seed=seed, rank=place, options=small())

    alone = loader(Rank())
    ranks = [loader(Rank(rank, world)) for rank in range(world)]
    for _ in range(steps):
        parts = [batch.fingerprint() for batch in one_step(ranks)]
        assert sum(parts) % 2**64 == next(alone).fingerprint()


@settings(max_examples=30)
@given(
    seed=seeds,
    threads=st.integers(0, 3),
    ahead=st.integers(0, 5),
    memory=st.sampled_from([2 * BLOCK, 5 * BLOCK, 100 * BLOCK]),
    seq_len=st.sampled_from([1, 7, 900, 3_000]),
)
@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
def test_threads_memory_and_prefetching_change_nothing(
    known: Known, seed: int, threads: int, ahead: int, memory: int, seq_len: int
) -> None:
    if seq_len > 500:
        memory += 12 * BLOCK  # One sample has that many blocks.
    options = small(threads=threads, prefetch_batches=ahead, memory_bytes=memory)
    with Loader(known.dataset, seq_len=seq_len, global_batch=5, seed=seed, options=options) as loader:
        for _ in range(12):
            (planned,) = loader.plan(1)
            batch = next(loader)
            assert batch.samples.tolist() == planned.tolist()
            for row, sample in zip(batch.tokens, batch.samples.tolist(), strict=True):
                assert np.array_equal(row, known.tokens[sample * seq_len : sample * seq_len + seq_len + 1])
        stats = loader.stats()
        assert stats["peak_bytes"] <= memory


@settings(max_examples=20)
@given(seed=seeds, global_batch=st.integers(3, 300), world=st.integers(1, 3), epochs=st.integers(1, 2))
@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
def test_a_finite_pass_takes_the_same_steps_on_every_rank_and_holds_each_sample(
    known: Known, seed: int, global_batch: int, world: int, epochs: int
) -> None:
    ranks = [
        list(
            Loader(
                known.dataset,
                seq_len=SEQ_LEN,
                global_batch=global_batch,
                seed=seed,
                rank=Rank(rank, world),
                options=small(epochs=epochs),
            )
        )
        for rank in range(world)
    ]
    total = epochs * ((len(known.tokens) - 1) // SEQ_LEN)
    assert {len(batches) for batches in ranks} == {-(-total // global_batch)}
    rows = rows_of([batch for batches in ranks for batch in batches])
    assert sorted(rows) == list(range(total))
    assert sorted(sample for sample, _ in rows.values()) == sorted(list(range(total // epochs)) * epochs)
    for batches in ranks:
        for batch in batches:
            assert not batch.tokens[~batch.valid].any()


@pytest.mark.parametrize("epochs", [None, 1])
@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
def test_a_loader_resumes_after_every_step(known: Known, epochs: int | None) -> None:
    def open_at(state: dict | None) -> Loader:
        options = LoaderSettings(lanes=16, window=8, threads=1, epochs=epochs)
        loader = Loader(known.dataset, seq_len=SEQ_LEN, global_batch=37, seed=5, rank=Rank(1, 3), options=options)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    check_resumes_everywhere(open_at, steps=20)


class Rows:
    """Counts, and loses or repeats `off` numbers when it is resumed."""

    def __init__(self, at: int, *, off: int, end: int = 1_000) -> None:
        self.at, self.end = at + off * (at > 0), end

    def __next__(self) -> int:
        if self.at >= self.end:
            raise StopIteration
        self.at += 1
        return self.at

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}


def at_of(state: dict | None) -> int:
    return 0 if state is None else state["at"]


def test_the_check_passes_what_resumes_rightly() -> None:
    check_resumes_everywhere(lambda state: Rows(at_of(state), off=0), steps=25)
    check_resumes_everywhere(lambda state: Rows(at_of(state), off=0, end=7), steps=25)


@pytest.mark.parametrize("off", [1, -1])
def test_the_check_catches_one_row_lost_or_repeated_on_resume(off: int) -> None:
    with pytest.raises(AssertionError, match="resumed at step 1, item 1 differs"):
        check_resumes_everywhere(lambda state: Rows(at_of(state), off=off), steps=25)


def test_the_check_catches_an_end_that_moves_on_resume() -> None:
    with pytest.raises(AssertionError, match="resumed at step 0, it gave items up to 9, not 8"):
        check_resumes_everywhere(lambda state: Rows(at_of(state), off=0, end=8 if state is None else 9), steps=25)
