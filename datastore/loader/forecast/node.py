"""The ranks of one node beside each other: what they fetch, when it is there, and how long they wait for it; event by event.

Each rank has the blocks of its next batches in a queue, in the order of need, and threads that fetch them: neighbours in one
request, as the loader's do. A request waits for the delay of the link, and then shares its rate evenly with all others under way. A
block that does not fit into memory takes the place of the one needed last. All ranks take a step together.

Left out: processor time, lost packets, a store that is slow now and then.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Need", "NodeRun", "Wire", "run_node"]

_NEVER = 2**62
_FOREVER = float("inf")


@dataclass(frozen=True, slots=True)
class Wire:
    """What the ranks of a node share."""

    bytes_per_s: float
    delay_s: float
    threads: int
    """Of each rank."""

    run: int
    """Neighbours that one request brings at most."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a batch of a rank needs."""

    blocks: tuple[int, ...]
    """Each once, in the order they are requested in."""

    coming: tuple[int, ...] = ()
    """What its lanes read on: fetched when there is time."""


@dataclass(slots=True)
class NodeRun:
    """What happened, step by step, on all ranks of the node."""

    ready_s: list[float] = field(default_factory=list)
    """When the batches of each step were there."""

    began_s: list[float] = field(default_factory=list)
    """When each step began to wait for its batches."""

    requests: list[int] = field(default_factory=list)
    fetched_bytes: list[int] = field(default_factory=list)
    asked: int = 0
    """Blocks that batches needed."""

    there: int = 0
    """Those of them that were there when the step began to wait."""

    evictions: int = 0


class _Rank:
    def __init__(self, needs: Sequence[Need], sizes: npt.NDArray[np.int64], budget_bytes: int) -> None:
        self.needs = needs
        self.sizes = sizes
        self.budget_bytes = budget_bytes
        self.soon: dict[int, None] = {}
        self.later: dict[int, None] = {}
        self.busy = self.busy_later = self.used_bytes = 0
        self.resident: dict[int, None] = {}
        """In the order of their last use."""
        self.fetching: set[int] = set()
        self.requested = self.evictions = 0
        self.step = 0
        uses: dict[int, list[int]] = {}
        for step, need in enumerate(needs):
            for block in need.blocks:
                uses.setdefault(block, []).append(step)
        self._uses = uses

    def want(self, upto: int) -> None:
        """Queue what the batches before `upto` need."""
        for need in self.needs[self.requested : upto]:
            for block in need.blocks:
                if block not in self.resident and block not in self.fetching:
                    self.later.pop(block, None)
                    self.soon.setdefault(block)
            for block in need.coming:
                if block not in self.resident and block not in self.fetching and block not in self.soon:
                    self.later.setdefault(block)
        self.requested = max(self.requested, upto)

    def got(self, blocks: Sequence[int], *, later: bool) -> None:
        """Take note of blocks that are there now."""
        self.busy, self.busy_later = self.busy - 1, self.busy_later - later
        for block in blocks:
            self.fetching.discard(block)
            self.resident[block] = None

    def is_ready(self) -> bool:
        return all(block in self.resident for block in self.needs[self.step].blocks)

    def take(self, wire: Wire) -> tuple[list[int], bool] | None:
        """Return the blocks of the next request, and whether they have time; None: nothing to do, or no room."""
        urgent = self.needs[self.step].blocks
        for queue, later in ((self.soon, False), (self.later, True)):
            if later and self.busy_later >= max(1, wire.threads // 2):
                return None
            if not queue:
                continue
            start = next(iter(queue))
            run = [start]
            while run[-1] + 1 in queue and len(run) < wire.run:
                run.append(run[-1] + 1)
            while run[0] - 1 in queue and len(run) < wire.run:
                run.insert(0, run[0] - 1)
            found = [block for block in run if self._has_room(block, urgent=block in urgent)]
            if not found:
                return None
            for block in found:
                del queue[block]
                self.fetching.add(block)
            return found, later
        return None

    def _has_room(self, block: int, *, urgent: bool) -> bool:
        size = int(self.sizes[block])
        pinned = self.needs[self.step].blocks
        while self.used_bytes + size > self.budget_bytes:
            free = [other for other in self.resident if other not in pinned]
            last = max(free, key=self._next_use, default=None)
            if last is None or (not urgent and self._next_use(last) <= self._next_use(block)):
                return False
            del self.resident[last]
            self.used_bytes -= int(self.sizes[last])
            self.evictions += 1
        self.used_bytes += size
        return True

    def _next_use(self, block: int) -> int:
        uses = self._uses.get(block, [])
        place = bisect_right(uses, self.step - 1)
        return uses[place] if place < len(uses) else _NEVER


@dataclass(order=True, slots=True)
class _Transfer:
    end: float
    """On the clock that runs by bytes for each transfer under way."""

    number: int
    rank: _Rank = field(compare=False)
    blocks: list[int] = field(compare=False)
    later: bool = field(compare=False)


class _Link:
    """The requests under way, and the clock."""

    def __init__(self, wire: Wire) -> None:
        self.now = 0.0
        self._wire = wire
        self._served = 0.0
        """Bytes that a transfer would have got that was there all the time: they all get the same."""
        self._number = 0
        self._waiting: list[tuple[float, int, _Transfer]] = []
        self._flowing: list[_Transfer] = []

    def request(self, rank: _Rank, blocks: list[int], *, later: bool) -> None:
        self._number += 1
        transfer = _Transfer(0.0, self._number, rank, blocks, later)
        heapq.heappush(self._waiting, (self.now + self._wire.delay_s, self._number, transfer))

    def advance(self, until: float) -> bool:
        """Go on to the next event, `until` at the latest; return whether there is one."""
        arrives = self._waiting[0][0] if self._waiting else _FOREVER
        ends = _FOREVER
        if self._flowing:
            ends = self.now + (self._flowing[0].end - self._served) * len(self._flowing) / self._wire.bytes_per_s
        upcoming = min(arrives, ends, until)
        if upcoming == _FOREVER:
            return False
        if self._flowing:
            self._served += (upcoming - self.now) * self._wire.bytes_per_s / len(self._flowing)
        self.now = upcoming
        if upcoming == ends:
            transfer = heapq.heappop(self._flowing)
            transfer.rank.got(transfer.blocks, later=transfer.later)
        elif upcoming == arrives:
            transfer = heapq.heappop(self._waiting)[2]
            transfer.end = self._served + int(transfer.rank.sizes[transfer.blocks].sum())
            heapq.heappush(self._flowing, transfer)
        return True


def run_node(
    needs: Sequence[Sequence[Need]],
    *,
    sizes: npt.NDArray[np.int64],
    budget_bytes: int,
    wire: Wire,
    ahead: int,
    step_s: float,
) -> NodeRun:
    """Return how the ranks of a node, with `needs` for each step, go through their steps.

    `ahead` is how many batches they fetch ahead of the one that they wait for; before the first, none.
    """
    ranks = [_Rank(need, sizes, budget_bytes) for need in needs]
    link, found = _Link(wire), NodeRun()
    for step in range(len(needs[0])):
        found.began_s.append(link.now)
        for rank in ranks:
            rank.step = step
            rank.want(step + 1 + (ahead if step else 0))
            found.asked += len(rank.needs[step].blocks)
            found.there += sum(block in rank.resident for block in rank.needs[step].blocks)
        found.requests.append(0)
        found.fetched_bytes.append(0)
        # First until all is there, then until the step is taken: transfers go on meanwhile.
        until = _FOREVER
        while link.now < until:
            _request(ranks, link, wire, found)
            if until == _FOREVER and all(rank.is_ready() for rank in ranks):
                found.ready_s.append(link.now)
                until = link.now + step_s
            elif not link.advance(until):
                break
    found.evictions = sum(rank.evictions for rank in ranks)
    return found


def _request(ranks: Sequence[_Rank], link: _Link, wire: Wire, found: NodeRun) -> None:
    """Have every thread that is free fetch something."""
    for rank in ranks:
        while rank.busy < wire.threads and (taken := rank.take(wire)) is not None:
            blocks, later = taken
            rank.busy, rank.busy_later = rank.busy + 1, rank.busy_later + later
            found.requests[-1] += 1
            found.fetched_bytes[-1] += int(rank.sizes[blocks].sum())
            link.request(rank, blocks, later=later)
