"""When each block is needed next, as far as the batches to come are planned: what tells which block to give up.

Lanes are visited in turn, so a rank comes back to its blocks in a cycle. If memory is too short for the cycle, giving up the
block used least recently gives up the one needed next, and nothing is ever found; giving up the one needed last keeps as
many as fit. A wrong answer here costs time, never a wrong batch.

Memory: 16 bytes for each block that was ever planned (untouched pages cost nothing), 16 for each use that is.

Source: L. A. Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np

from datastore.cache.layout import I64

__all__ = ["NEVER", "Future"]

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
