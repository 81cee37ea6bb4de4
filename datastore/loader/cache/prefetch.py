"""Blocks fetched ahead of their use by a few threads, in the order of need; and when each is needed next.

The future is known, so nothing is guessed. A fetch that fails here is dropped: whoever needs the block fetches it
again and gets the error, at the sample it belongs to. Threads start with the first request and end with `close`, or
when the prefetcher is garbage; a fork does not copy them, so a child makes its own prefetcher.

When each block is needed next, as far as the batches to come are planned, tells which block to give up. Lanes are visited in turn, so a rank comes back to its blocks in a cycle. If memory is too short for the cycle, giving up the
block used least recently gives up the one needed next, and nothing is ever found; giving up the one needed last keeps as
many as fit. A wrong answer here costs time, never a wrong batch.

Memory: 16 bytes for each block that was ever planned (untouched pages cost nothing), 16 for each use that is.

Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
"""

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

from datastore.errors import DatastoreError
from datastore.loader.cache.blocks import I64, TokenBlocks

__all__ = ["NEVER", "Future", "Prefetcher"]

_LOGGER = logging.getLogger(__name__)

_END_TIMEOUT_S = 5.0


class _Queue:
    """Blocks to fetch. The threads know this and the cache, but not the prefetcher: so that it can become garbage."""

    def __init__(self) -> None:
        self._blocks: dict[int, None] = {}
        """In order, each once."""
        self._changed = threading.Condition()
        self._open = True

    def put(self, blocks: Iterable[int]) -> None:
        with self._changed:
            self._blocks.update(dict.fromkeys(blocks))
            self._changed.notify_all()

    def take(self) -> int | None:
        """Return the next block, waiting for one; None once the queue is closed."""
        with self._changed:
            while self._open and not self._blocks:
                self._changed.wait()
            if not self._open:
                return None
            block = next(iter(self._blocks))
            del self._blocks[block]
            return block

    def clear(self) -> None:
        with self._changed:
            self._blocks.clear()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify_all()


class Prefetcher:
    """Fetches what is requested into `blocks`, with `threads` threads."""

    def __init__(self, blocks: TokenBlocks, *, threads: int) -> None:
        self._blocks = blocks
        self._wanted = threads
        self._queue = _Queue()
        self._threads: list[threading.Thread] = []
        self._end = weakref.finalize(self, _end, self._queue, self._threads, os.getpid())

    def request(self, blocks: Iterable[int]) -> None:
        """Fetch `blocks`, after all that was requested before."""
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
            self._queue.put(blocks)

    def forget(self) -> None:
        """Drop what was requested and not yet begun."""
        self._queue.clear()

    def close(self) -> None:
        """End the threads; a fetch under way is waited for, 5 seconds at most."""
        self._end()


def _work(queue: _Queue, blocks: TokenBlocks) -> None:
    while (block := queue.take()) is not None:
        try:
            blocks.fetch(block)
        except (DatastoreError, MemoryError, OSError, RuntimeError) as error:
            _LOGGER.debug("could not fetch block %d ahead: %s", block, error)


def _end(queue: _Queue, threads: list[threading.Thread], pid: int) -> None:
    if os.getpid() != pid:
        return  # In a forked child there are no threads to end, and their lock may have been copied locked.
    queue.close()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_END_TIMEOUT_S)


NEVER = 2**62
"""No use is planned."""


class Future:
    """The uses of `blocks` blocks by batches that are planned in order, some at a time, and pass one by one."""

    def __init__(self, blocks: int) -> None:
        # Batches count from 1, so that zeroed memory means that nothing is planned.
        self._next = np.zeros(blocks, np.int64)
        self._later = np.zeros(blocks, np.int64)
        """First use in the batches planned last."""
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
        self._waiting.extend(zip(used, np.split(again, np.cumsum([len(blocks) for blocks in used])[:-1]), strict=True))

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
        self._waiting.clear()

    def next_use(self, blocks: I64) -> I64:
        """Return the number of the batch that uses each of `blocks` next, or `NEVER`."""
        found = self._next[blocks]
        return np.where(found > self._passed, found, NEVER)
