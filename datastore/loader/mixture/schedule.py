"""Which source of a mixture each position draws from, and its how-many-th draw: a pure function, for any position at once.

The sources are the leaves of a binary tree, and each node deals its draws out to its two children as evenly as whole numbers
allow: of the first n draws of a node, floor(n p + 1/2) go to the child with the share p. That is half a sample off at most; what the
node itself is off is passed on by the child's share. In Huffman's tree no inner node has more than two thirds of its parent's
weight, so an inner node is off by at most 1/2 + 2/3 (1/2 + ...) = 3/2 samples, and a source by at most 1/2 + 3/2 = 2,
at every position, for any number of sources and any weights. Independent draws are off by the root of the position.

Complexity: a period of 65,536 positions is dealt out at once, some 80 ns a position for 100 sources, wherever it lies.
Shares are kept to one part in 2^31, which comes to a quarter of a sample in 10^9.

Source: D. A. Huffman, "A method for the construction of minimum-redundancy codes", 1952. For the whole numbers, J. E. Bresenham,
"Algorithm for computer control of a digital plotter", 1965.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from datastore.errors import ConfigError

__all__ = ["PERIOD", "U16", "Phase", "Run", "Tree", "huffman_tree", "phases_of"]

U16 = npt.NDArray[np.uint16]

PERIOD = 65_536
"""Positions that are dealt out at once."""

_BITS = 31
_ONE = 1 << _BITS
_HALF = 1 << (_BITS - 1)


class Run(NamedTuple):
    """The draws of one source in a period: one after the other, from `first` on."""

    source: int
    slots: U16
    """Which positions of the period they take, in order."""

    first: int


@dataclass(frozen=True, slots=True)
class Tree:
    """A source, or two trees that draws are dealt out to."""

    weight: float
    source: int = -1
    """The source, if it is a leaf."""

    left: "Tree | None" = None
    right: "Tree | None" = None
    share: int = 0
    """The left one's share, in parts of 2^31."""


def huffman_tree(weights: Sequence[float]) -> Tree:
    """Return the tree of the sources with a weight above zero; of equal weights the first source goes first.

    Raises:
        ConfigError: a weight is too small beside another.
    """
    heap = [(weight, source, Tree(weight, source)) for source, weight in enumerate(weights) if weight > 0]
    heapq.heapify(heap)
    made = len(weights)
    while len(heap) > 1:
        (_, _, small), (_, _, large) = heapq.heappop(heap), heapq.heappop(heap)
        total = small.weight + large.weight
        share = round(small.weight / total * _ONE)
        if share == 0:
            raise ConfigError(
                "a weight of the mixture is too small beside the others",
                weight=small.weight,
                hint="Give it 0, or more than one part in 2^31.",
            )
        heapq.heappush(heap, (total, made, Tree(total, -1, small, large, share)))
        made += 1
    return heap[0][2]


@dataclass(frozen=True)
class Phase:
    """A stretch of positions with one tree, from `start` on."""

    start: int
    tree: Tree
    before: tuple[int, ...]
    """How many draws each source had before it."""

    def period(self, number: int) -> "list[Run]":
        """Return what each source gets of the positions [number * PERIOD, (number + 1) * PERIOD) within it."""
        found: list[Run] = []
        _deal(self.tree, _SLOTS, number * PERIOD, found)
        return [Run(run.source, run.slots, run.first + self.before[run.source]) for run in found]

    def drawn(self, within: int) -> tuple[int, ...]:
        """Return how many draws each source had when the position `within` it comes up, those before it too."""
        drawn = list(self.before)
        _count(self.tree, within, drawn)
        return tuple(drawn)

    def rates(self, sources: int) -> list[float]:
        """Return the draws of each source per position."""
        found = [0.0] * sources
        _share(self.tree, 1.0, found)
        return found

    def when(self, source: int, draws: int) -> int:
        """Return the position just after that at which `source` has its last of `draws` draws, counted from the very first."""
        found = _after(self.tree, source, draws - self.before[source])
        assert found is not None
        return self.start + found


_NUMBERS = np.arange(PERIOD + 1)
_SLOTS = np.arange(PERIOD).astype(np.uint16)


def _deal(tree: Tree, slots: U16, first: int, into: list[Run]) -> None:
    """Deal `slots`, the draws of `tree` from its draw `first` on, out to its sources."""
    if tree.left is None or tree.right is None:
        into.append(Run(tree.source, slots, first))
        return
    # floor((first + i) p + 1/2), with what `first` adds taken out, so that no number is larger than 2^47.
    given, rest = divmod(first * tree.share + _HALF, _ONE)
    dealt = (_NUMBERS[: len(slots) + 1] * tree.share + rest) >> _BITS
    goes_left = dealt[1:] != dealt[:-1]
    _deal(tree.left, slots[goes_left], given, into)
    _deal(tree.right, slots[~goes_left], first - given, into)


def _count(tree: Tree, draws: int, into: list[int]) -> None:
    if tree.left is None or tree.right is None:
        into[tree.source] += draws
        return
    first = (draws * tree.share + _HALF) >> _BITS
    _count(tree.left, first, into)
    _count(tree.right, draws - first, into)


def _share(tree: Tree, share: float, into: list[float]) -> None:
    if tree.left is None or tree.right is None:
        into[tree.source] += share
        return
    _share(tree.left, share * tree.share / _ONE, into)
    _share(tree.right, share * (_ONE - tree.share) / _ONE, into)


def _after(tree: Tree, source: int, draws: int) -> int | None:
    """Return how many draws of `tree` it takes until `source` has had `draws`; None if it is not in there."""
    if tree.left is None or tree.right is None:
        return draws if tree.source == source else None
    inner = _after(tree.left, source, draws)
    if inner is not None:  # The least n with floor(n p + 1/2) >= inner.
        return -(-(inner * _ONE - _HALF) // tree.share) if inner else 0
    inner = _after(tree.right, source, draws)
    if inner is not None:  # The least n with n - floor(n p + 1/2) >= inner.
        return (inner * _ONE - _HALF) // (_ONE - tree.share) + 1 if inner else 0
    return None


def phases_of(
    stages: Sequence[tuple[int, Sequence[float]]], *, most: Mapping[int, int], before: tuple[int, ...]
) -> tuple[list[Phase], int | None]:
    """Return the phases of a mixture, and where it ends; None: never.

    A stage says from which position on which weights hold; `before`, how many draws each source had before the first one. `most` says of some sources how many draws they have at most: after
    the last of them a source's weight is 0, and the others share what it had. When no source is left, the mixture ends.

    Raises:
        ConfigError: a weight is too small.
    """
    phases: list[Phase] = []
    for index, (start, weights) in enumerate(stages):
        end = stages[index + 1][0] if index + 1 < len(stages) else None
        at = start
        while end is None or at < end:
            left = [0.0 if before[d] >= most.get(d, before[d] + 1) else float(w) for d, w in enumerate(weights)]
            if not any(left):
                return phases, at
            phase = Phase(at, huffman_tree(left), before)
            phases.append(phase)
            over = [phase.when(d, most[d]) for d in most if left[d]]
            stop = min([*over, *([] if end is None else [end])], default=None)
            if stop is None:
                return phases, None
            before, at = phase.drawn(stop - at), stop
    return phases, None
