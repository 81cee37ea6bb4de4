"""The next use of every block, held against looking it up; and what that is worth where memory is short."""

import uuid
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.loader.cache.memory import BlockCache
from datastore.loader.cache.prefetch import NEVER, Future
from datastore.loader.loader import Loader
from datastore.loader.order.ahead import blocks_at_once
from datastore.loader.settings import LoaderSettings
from datastore.testing.examples import make_dataset

BLOCKS = 12
batch = st.lists(st.integers(0, BLOCKS - 1), max_size=5)


@given(
    chunks=st.lists(st.lists(batch, max_size=6), max_size=6), left=st.lists(st.integers(0, 3), min_size=6, max_size=6)
)
def test_the_next_use_is_the_first_planned_batch_that_has_the_block(
    chunks: list[list[list[int]]], left: list[int]
) -> None:
    future, waiting, passed = Future(BLOCKS), list[list[int]](), 0
    for chunk, keep in zip(chunks, left, strict=False):
        future.plan([np.array(blocks, np.int64) for blocks in chunk])
        waiting += chunk
        while len(waiting) > min(keep, len(chunk)):
            waiting.pop(0)
            future.pass_one()
            passed += 1
            for block, found in enumerate(future.next_use(np.arange(BLOCKS)).tolist()):
                uses = [passed + 1 + at for at, blocks in enumerate(waiting) if block in blocks]
                assert found == min(uses, default=NEVER)


@given(st.lists(batch, max_size=6), st.lists(batch, min_size=1, max_size=6))
def test_what_is_forgotten_is_not_expected_any_more(before: list[list[int]], after: list[list[int]]) -> None:
    future = Future(BLOCKS)
    future.plan([np.array(blocks, np.int64) for blocks in before])
    future.forget()
    assert set(future.next_use(np.arange(BLOCKS)).tolist()) == {NEVER}
    future.plan([np.array(blocks, np.int64) for blocks in after])
    for block, found in enumerate(future.next_use(np.arange(BLOCKS)).tolist()):
        uses = [at for at, blocks in enumerate(after, start=len(before) + 1) if block in blocks]
        assert found == min(uses, default=NEVER)


def cache_of(blocks: int) -> BlockCache:
    dataset = make_dataset(f"memory://{uuid.uuid4().hex}", [[40_000]], block_bytes=4096)
    return BlockCache(dataset.storage, dataset.segments, budget_bytes=blocks * 4096)


@pytest.mark.parametrize(("told", "hits"), [("all", 41), ("nothing", 0)])
def test_a_cycle_longer_than_memory_still_finds_what_fits_if_it_is_known(told: str, hits: int) -> None:
    cycle = [np.array([block]) for block in range(8)] * 10
    cache = cache_of(6)
    if told == "all":
        cache.expect(cycle)
    for blocks in cycle:
        with cache.hold(blocks):
            pass
        cache.passed()
    assert cache.stats().hits >= hits
    assert (cache.stats().hits > 0) == (told == "all")


def test_a_block_fetched_ahead_does_not_push_out_what_is_needed_before_it() -> None:
    cache = cache_of(2)
    cache.expect([np.array([block]) for block in (0, 1, 2)])
    assert cache.fetch(0)
    assert cache.fetch(1)
    assert not cache.fetch(2)
    assert cache.fetch(0)
    cache.passed()
    assert cache.fetch(2)
    assert cache.absent(np.array([0, 1, 2])).tolist() == [0]


def test_a_block_that_is_needed_some_time_outlives_those_that_are_not() -> None:
    cache = cache_of(2)
    cache.announce([0])
    for block in (0, 1):
        assert cache.fetch(block)
    cache.fetch_run(range(2, 3))
    assert cache.absent(np.array([0, 1, 2])).tolist() == [1]
    cache.forget()
    cache.fetch(3)
    assert cache.absent(np.array([0, 2, 3])).tolist() == [0]


def test_blocks_are_fetched_together_only_as_far_as_memory_and_one_request_go() -> None:
    layout = cache_of(1).layout

    def at_once(blocks: int | None, stretches: int) -> int:
        return blocks_at_once(layout, budget_bytes=None if blocks is None else blocks * 4096, stretches=stretches)

    assert [at_once(blocks, 4) for blocks in (1, 8, 11, 12, 40)] == [1, 1, 1, 2, 9]
    assert at_once(10**6, 4) == 4096
    assert at_once(None, 4) == 1


@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
def test_a_loader_with_too_little_memory_fetches_again_only_what_does_not_fit() -> None:
    block = 4096
    dataset = make_dataset(f"memory://{uuid.uuid4().hex}", [[50_000]] * 8, block_bytes=block)
    options = LoaderSettings(lanes=32, window=8, threads=0, epochs=1, memory_bytes=28 * block)
    with Loader(dataset, seq_len=64, global_batch=8, options=options) as loader:
        for _ in loader:
            pass
        stats = loader.stats()
    assert stats["lanes"] == 32
    assert stats["peak_bytes"] <= 28 * block
    # Least recently used first would fetch a block for nearly every one of 6,249 samples.
    assert stats["fills"] < 2_500


def test_a_disk_with_room_for_half_of_the_dataset_serves_nearly_half_of_each_epoch(tmp_path: Path) -> None:
    block = 4096
    dataset = make_dataset(f"memory://{uuid.uuid4().hex}", [[100_000]] * 8, block_bytes=block)
    total = int(dataset.segments.size_bytes.sum())
    options = LoaderSettings(
        lanes=16, window=8, threads=0, memory_bytes=40 * block, cache_dir=str(tmp_path), cache_bytes=total // 2
    )
    with Loader(dataset, seq_len=64, global_batch=8, options=options) as loader:
        fetched = [0.0]
        for _ in range(4):
            for _ in range(loader.batches_per_epoch):
                next(loader)
            fetched.append(loader.stats()["fetched_bytes"])
    each = [(after - before) / total for before, after in pairwise(fetched[1:])]
    # Least recently used first would find next to nothing: what is needed soonest has been there for longest.
    assert max(each) < 0.65
