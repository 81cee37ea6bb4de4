"""Blocks fetched ahead of their use by a few threads, in the order of need; and when each is needed next.

The future is known, so nothing is guessed. A fetch that fails here is dropped: whoever needs the block fetches it
again and gets the error, at the sample it belongs to. Threads start with the first request and end with `close`, or
when the prefetcher is garbage; a fork does not copy them, so a child makes its own prefetcher.

When each block is needed next, as far as the batches to come are planned, tells which block to give up. Lanes are visited in turn, so a rank comes back to its blocks in a cycle. If memory is too short for the cycle, giving up the
block used least recently gives up the one needed next, and nothing is ever found; giving up the one needed last keeps as
many as fit. A wrong answer here costs time, never a wrong batch.

Memory: 17 bytes for each block that was ever planned (untouched pages cost nothing), 16 for each use that is.

Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
"""

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from datastore.errors import DatastoreError
from datastore.loader.cache.blocks import I64, TokenBlocks

__all__ = ["NEVER", "Future", "Prefetcher", "blocks_of_a_run"]

_LOGGER = logging.getLogger(__name__)

_END_TIMEOUT_S = 5.0

RUN_BYTES = 16 * 2**20
"""Neighbours that wait together are fetched by one request of so many bytes at most."""


def blocks_of_a_run(largest_bytes: int) -> int:
    """Return how many neighbours of at most `largest_bytes` one request brings."""
    return max(1, RUN_BYTES // max(1, largest_bytes))


class _Queue:
    """Blocks to fetch. The threads know this and the cache, but not the prefetcher: so that it can become garbage."""

    def __init__(self, *, run: int, threads: int) -> None:
        self._soon: dict[int, None] = {}
        """In order, each once."""
        self._later: dict[int, None] = {}
        """What has time: half of the threads at most fetch it, and only while nothing is needed sooner."""
        self._run = run
        self._most_later = max(1, threads // 2)
        self._fetching_later = 0
        self._changed = threading.Condition()
        self._open = True

    def put(self, blocks: Iterable[int], *, later: bool) -> None:
        with self._changed:
            (self._later if later else self._soon).update(dict.fromkeys(blocks))
            self._changed.notify_all()

    def take(self) -> tuple[range, bool] | None:
        """Return the next block with its neighbours that are in the queue, waiting for one, and whether it has time.

        None once the queue is closed. Say `done` after one that has time.
        """
        with self._changed:
            while self._open and not self._soon and not self._may_take_later():
                self._changed.wait()
            if not self._open:
                return None
            later = not self._soon
            self._fetching_later += later
            return self._run_of(self._later if later else self._soon), later

    def done(self) -> None:
        with self._changed:
            self._fetching_later -= 1
            self._changed.notify_all()

    def clear(self) -> None:
        with self._changed:
            self._soon.clear()
            self._later.clear()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify_all()

    def _may_take_later(self) -> bool:
        return bool(self._later) and self._fetching_later < self._most_later

    def _run_of(self, blocks: dict[int, None]) -> range:
        start = next(iter(blocks))
        stop = start + 1
        while stop in blocks and stop - start < self._run:
            stop += 1
        while start - 1 in blocks and stop - start < self._run:
            start -= 1
        found = range(start, stop)
        for block in found:
            del blocks[block]
            self._later.pop(block, None)
        return found


class Prefetcher:
    """Fetches what is requested into `blocks`, with `threads` threads."""

    def __init__(self, blocks: TokenBlocks, *, threads: int) -> None:
        self._blocks = blocks
        self._wanted = threads
        self._queue = _Queue(run=blocks_of_a_run(blocks.layout.largest_bytes), threads=threads)
        self._threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, _end, self._queue, self._threads, os.getpid())

    def request(self, blocks: Iterable[int], *, later: bool = False) -> None:
        """Fetch `blocks`, after all that was requested before; those for `later` only when there is time."""
        while len(self._threads) < self._wanted:
            thread = threading.Thread(
                target=_work, args=(self._queue, self._blocks), name="datastore-prefetch", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # The system has no more: fewer fetch ahead, or none.
                self._wanted = len(self._threads)
            else:
                self._threads.append(thread)
        if self._threads:
            self._queue.put(blocks, later=later)

    def forget(self) -> None:
        """Drop what was requested and not yet begun."""
        self._queue.clear()

    def close(self) -> None:
        """End the threads; fetches under way are waited for, 5 seconds at most."""
        self._end()

    def abandon(self) -> None:
        """Have the threads end, and wait for none of them: one may hang."""
        self._end.detach()
        self._queue.close()


def _work(queue: _Queue, blocks: TokenBlocks) -> None:
    while (taken := queue.take()) is not None:
        run, later = taken
        try:
            blocks.fetch_run(run)
        except (DatastoreError, MemoryError, OSError, RuntimeError) as error:
            _LOGGER.debug("could not fetch %s ahead: %s", run, error)
        if later:
            queue.done()


def _end(queue: _Queue, threads: list[threading.Thread], pid: int) -> None:
    if os.getpid() != pid:
        return  # In a forked child there are no threads to end, and their lock may have been copied locked.
    queue.close()
    deadline = time.monotonic() + _END_TIMEOUT_S
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(max(0.0, deadline - time.monotonic()))


NEVER = 2**62
"""No use is planned."""

SOME_TIME = NEVER - 1
"""A use is sure to come, after all that are planned."""


class Future:
    """The uses of `blocks` blocks by batches that are planned in order, some at a time, and pass one by one."""

    def __init__(self, blocks: int) -> None:
        # Batches count from 1, so that zeroed memory means that nothing is planned.
        self._next = np.zeros(blocks, np.int64)
        self._later = np.zeros(blocks, np.int64)
        """First use in the batches planned last."""
        self._announced = np.zeros(blocks, np.bool_)
        self._waiting: deque[tuple[I64, I64]] = deque()
        """Per batch that has not passed its blocks, and when each is used again among those planned with it, or 0."""
        self._passed = 0

    def plan(self, batches: Sequence[I64]) -> None:
        """Add the blocks of batches that follow those planned so far; repeats in a batch are allowed."""
        if not batches:
            return
        used = [np.unique(blocks) for blocks in batches]
        first = self._passed + len(self._waiting) + 1
        number = np.repeat(np.arange(first, first + len(used)), [len(blocks) for blocks in used])
        block = np.concatenate(used)
        order = np.argsort(block, kind="stable")  # By block, and for each by batch.
        again = np.zeros_like(number)
        same = block[order[:-1]] == block[order[1:]]
        again[order[:-1][same]] = number[order[1:][same]]
        starts = order[np.concatenate([[True], ~same])[: len(order)]]
        self._later[block[starts]] = number[starts]
        fresh = starts[self._next[block[starts]] <= self._passed]
        self._next[block[fresh]] = number[fresh]
        self._announced[block[starts]] = False
        self._waiting.extend(zip(used, np.split(again, np.cumsum([len(blocks) for blocks in used])[:-1]), strict=True))

    def announce(self, blocks: Sequence[int]) -> None:
        """Note that `blocks` are needed after all batches planned so far."""
        self._announced[list(blocks)] = True

    def pass_one(self) -> None:
        """Note that the batch planned first was delivered."""
        if not self._waiting:
            return
        blocks, again = self._waiting.popleft()
        self._passed += 1
        later = self._later[blocks]
        self._next[blocks] = np.where(again > 0, again, np.where(later > self._passed, later, 0))

    def forget(self) -> None:
        """Drop what is planned."""
        self._passed += len(self._waiting)
        for blocks, _ in self._waiting:
            self._next[blocks] = self._later[blocks] = 0
        self._announced.fill(False)
        self._waiting.clear()

    def next_use(self, blocks: I64) -> I64:
        """Return the number of the batch that uses each of `blocks` next; or `SOME_TIME`, or `NEVER`."""
        found = self._next[blocks]
        return np.where(found > self._passed, found, np.where(self._announced[blocks], SOME_TIME, NEVER))
