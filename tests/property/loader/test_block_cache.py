"""The block cache as a state machine: whatever is held, fetched ahead or damaged, the budget holds and the data is right."""

import threading
import uuid
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typing_extensions import Buffer, override

from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, CorruptError, StorageError
from datastore.loader.cache.memory import BlockCache
from datastore.loader.cache.prefetch import Prefetcher
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset

BLOCK = 4096
SHARDS = [[3000, 4000], [500], [9000], [1, 1, 1]]
"""Tokens of the documents of four shards: of 4, 1, 5 and 1 blocks."""


class FaultyStorage(MemoryStorage):
    """Damages or refuses the next reads, and looks at the cache while it is being filled."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.flips = self.failures = 0
        self.cache: BlockCache | None = None

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        if self.cache is not None:
            the_budget_holds(self.cache)
        if self.failures:
            self.failures -= 1
            raise StorageError("connection reset", key=key, transient=True)
        super().read_into(key, start, target)
        if self.flips:
            self.flips -= 1
            memoryview(target).cast("B")[-1] ^= 1


def the_budget_holds(cache: BlockCache) -> None:
    stats = cache.stats()
    assert cache.budget_bytes is not None
    assert 0 <= stats.resident_bytes <= stats.peak_bytes <= cache.budget_bytes


def faulty_dataset(shards: list[list[int]] = SHARDS, *, block_bytes: int = BLOCK) -> tuple[FaultyStorage, Dataset]:
    storage = FaultyStorage(uuid.uuid4().hex)
    make_dataset(storage, shards, block_bytes=block_bytes)
    return storage, open_dataset(storage)


class CacheMachine(RuleBasedStateMachine):
    """The model is the dataset itself, and the list of what is held."""

    def __init__(self) -> None:
        super().__init__()
        # 1,000 is no multiple of a page: neighbouring blocks share one.
        self.storage, dataset = faulty_dataset(block_bytes=1000)
        self.truth = [dataset.token_shard(shard)[0] for shard in range(len(dataset.segments))]
        self.cache = BlockCache(dataset.storage, dataset.segments, budget_bytes=9_500)
        self.storage.cache = self.cache
        self.held: list[tuple[ExitStack, list[int]]] = []

    blocks = st.lists(st.integers(0, 33), min_size=1, max_size=4)

    def pinned(self) -> set[int]:
        return {block for _, blocks in self.held for block in blocks}

    def fits(self, blocks: list[int]) -> bool:
        wanted = np.array(sorted(self.pinned() | set(blocks)), np.int64)
        return int(self.cache.layout.sizes(wanted).sum()) <= 9_500

    @rule(blocks=blocks)
    def hold(self, blocks: list[int]) -> None:
        stack = ExitStack()
        if self.fits(blocks):
            stack.enter_context(self.cache.hold(np.array(blocks, np.int64)))
            self.held.append((stack, blocks))
        else:
            with pytest.raises(ConfigError, match="too small for what must be held at once"):
                stack.enter_context(self.cache.hold(np.array(blocks, np.int64)))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        stack, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        stack.close()

    @rule(block=st.integers(0, 33))
    def fetch_ahead(self, block: int) -> None:
        there = self.cache.fetch(block)
        assert there == (not self.cache.absent(np.array([block])).size)

    @rule(block=st.integers(0, 33))
    def one_read_is_damaged(self, block: int) -> None:
        self.storage.flips = 1
        self.cache.fetch(block)
        self.storage.flips = 0

    @rule(block=st.integers(0, 33))
    def two_reads_are_damaged(self, block: int) -> None:
        absent = bool(self.cache.absent(np.array([block])).size) and self.fits([block])
        self.storage.flips = 2
        if absent:
            with pytest.raises(CorruptError, match=r"a block does not match its digest \(shard='shards/.*block=\d"):
                self.cache.fetch(block)
            assert self.cache.absent(np.array([block])).size
        self.storage.flips = 0

    @rule(blocks=blocks)
    def a_read_fails(self, blocks: list[int]) -> None:
        if self.fits(blocks) and self.cache.absent(np.array(blocks)).size:
            self.storage.failures = 1
            with pytest.raises(StorageError, match="connection reset"), self.cache.hold(np.array(blocks, np.int64)):
                pass

    @invariant()
    def the_budget_holds(self) -> None:
        the_budget_holds(self.cache)

    @invariant()
    def what_is_counted_is_what_is_there(self) -> None:
        there = np.flatnonzero(self.cache._resident)
        assert self.cache.stats().resident_bytes == int(self.cache.layout.sizes(there).sum())

    @invariant()
    def a_held_block_is_resident_and_right(self) -> None:
        for block in self.pinned():
            assert not self.cache.absent(np.array([block])).size
            place = self.cache.layout.range_of(block)
            info = self.cache._segments.shard(place.shard)
            start = max(0, (place.start - info.values_start + 1) // 2)
            stop = min(info.tokens, (place.stop - info.values_start) // 2)
            at = info.values_start + 2 * start
            found = np.frombuffer(
                self.cache.read(*np.array([[place.shard], [at], [max(0, 2 * (stop - start))]])), np.uint16
            )
            assert np.array_equal(found, self.truth[place.shard][start:stop])

    def teardown(self) -> None:
        for stack, _ in self.held:
            stack.close()


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_the_cache_keeps_its_promises_in_any_order_of_events = CacheMachine.TestCase


def test_evicted_blocks_give_their_memory_back() -> None:
    storage, dataset = faulty_dataset([[8_000_000]], block_bytes=2**20)
    cache = BlockCache(storage, dataset.segments, budget_bytes=4 * 2**20)
    blocks = list(cache.layout.of_shard(0))
    before = resident_bytes()
    for block in blocks:
        with cache.hold(np.array([block])):
            pass
    assert cache.stats().evictions == len(blocks) - 4
    assert resident_bytes() - before < 8 * 2**20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def test_threads_that_fetch_ahead_never_break_the_budget_and_never_starve_the_holder() -> None:
    storage, dataset = faulty_dataset([[20_000]] * 5)
    cache = BlockCache(storage, dataset.segments, budget_bytes=12 * BLOCK)
    storage.cache = cache
    truth = [dataset.token_shard(shard)[0] for shard in range(5)]
    prefetcher = Prefetcher(cache, threads=3)
    generator = np.random.default_rng(0)
    for _ in range(300):
        shard = int(generator.integers(5))
        start = int(generator.integers(0, 20_000 - 4_000))
        first, last = cache.layout.of_tokens(np.array([shard]), np.array([start]), np.array([start + 4_000]))
        prefetcher.request(generator.integers(0, cache.layout.blocks, 4).tolist())
        with cache.hold(np.arange(int(first[0]), int(last[0]) + 1)):
            at = dataset.segments.shard(shard).values_start + 2 * start
            found = np.frombuffer(cache.read(*np.array([[shard], [at], [8_000]])), np.uint16)
            assert np.array_equal(found, truth[shard][start : start + 4_000])
    prefetcher.close()
    the_budget_holds(cache)


def test_while_a_holder_waits_for_room_no_thread_that_fetches_ahead_takes_it() -> None:
    storage, dataset = faulty_dataset()
    cache = BlockCache(storage, dataset.segments, budget_bytes=2**20)
    cache._short = 1
    assert not cache.fetch(5)
    cache._short = 0
    assert cache.fetch(5)


def test_a_holder_that_waits_for_a_fetch_keeps_nobody_from_fetching_ahead() -> None:
    storage, dataset = faulty_dataset()
    cache = BlockCache(storage, dataset.segments, budget_bytes=2**20)
    answered, asked = threading.Event(), threading.Event()

    def slow(key: str, start: int, target: Buffer) -> None:
        if start == 0:
            asked.set()
            answered.wait(60)
        MemoryStorage.read_into(storage, key, start, target)

    storage.read_into = slow  # type: ignore[method-assign]
    fetching = threading.Thread(target=cache.fetch, args=(0,))
    fetching.start()
    assert asked.wait(60)
    holding = threading.Thread(target=lambda: cache.hold(np.array([0])).__enter__())
    holding.start()
    while not cache._waiting:
        threading.Event().wait(0.001)
    assert cache.fetch(6)
    answered.set()
    fetching.join(60)
    holding.join(60)
    assert not cache.absent(np.array([0, 6])).size


def test_holds_that_wait_for_each_other_end_in_an_error() -> None:
    storage, dataset = faulty_dataset()
    cache = BlockCache(storage, dataset.segments, budget_bytes=3 * BLOCK)
    with cache.hold(np.array([0, 1])), pytest.raises(ConfigError, match="too small"), cache.hold(np.array([2, 3])):
        pass


def test_the_threads_end_when_the_prefetcher_is_closed_or_garbage() -> None:
    storage, dataset = faulty_dataset()
    cache = BlockCache(storage, dataset.segments, budget_bytes=2**20)
    before = threading.active_count()
    closed, dropped = Prefetcher(cache, threads=2), Prefetcher(cache, threads=2)
    closed.request([0, 1])
    dropped.request([2, 3])
    assert threading.active_count() == before + 4
    closed.close()
    assert threading.active_count() == before + 2
    del dropped
    assert threading.active_count() == before
