"""A few threads that fetch blocks ahead of their use, in the order in which they will be needed.

The future is known, so nothing is guessed. A fetch that fails here is dropped: whoever needs the block fetches it
again and gets the error, at the sample it belongs to. Threads start with the first request and end with `close`, or
when the prefetcher is garbage; a fork does not copy them, so a child makes its own prefetcher.
"""

import logging
import os
import threading
import weakref
from collections.abc import Iterable

from datastore.errors import DatastoreError
from datastore.loader.cache.blocks import TokenBlocks

__all__ = ["Prefetcher"]

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
            self._threads.append(thread)
            thread.start()
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
        except DatastoreError as error:
            _LOGGER.debug("could not fetch block %d ahead: %s", block, error)


def _end(queue: _Queue, threads: list[threading.Thread], pid: int) -> None:
    if os.getpid() != pid:
        return  # In a forked child there are no threads to end, and their lock may have been copied locked.
    queue.close()
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_END_TIMEOUT_S)
