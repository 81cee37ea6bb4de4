"""Who writes which tensor and where pieces of tensors meet: pure arithmetic that every rank does alike.

No rank asks another: the owner of a tensor that all ranks hold follows from the sizes alone, and a shard's place in
the whole follows from its layout. The price is that ranks must hold the same state; the commit checks that they did.
"""

import heapq
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from datastore.checkpoint.format.manifest import Entry
from datastore.checkpoint.format.tree import TensorSpec
from datastore.errors import ConflictError

__all__ = ["Box", "check_coverage", "overlap", "owners", "row_span"]


def owners(sizes: Mapping[str, int], *, world: int) -> dict[str, int]:
    """Return the rank that writes each tensor: largest first, each to the rank with the fewest bytes so far.

    Equal on every rank that has the same `sizes`. The most loaded rank has at most 4/3 of the best possible share.

    Source: R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", 1969 (longest processing time first).
    """
    loads = [(0, rank) for rank in range(world)]
    owner: dict[str, int] = {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, rank = loads[0]
        owner[name] = rank
        heapq.heapreplace(loads, (load + size, rank))
    return owner


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region of a tensor: where it starts and how far it goes, in elements of each dimension."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has; 1 for a scalar."""
        return prod(self.shape)

    def within(self, offsets: tuple[int, ...]) -> "Box":
        """Return the same region, counted from `offsets` instead of from the start of the whole."""
        return Box(tuple(start - offset for start, offset in zip(self.starts, offsets, strict=True)), self.shape)


def overlap(one: Box, other: Box) -> Box | None:
    """Return the region that two boxes of the same whole share, or None if there is not one element in it."""
    starts = tuple(max(a, b) for a, b in zip(one.starts, other.starts, strict=True))
    stops = tuple(
        min(a + c, b + d) for a, b, c, d in zip(one.starts, other.starts, one.shape, other.shape, strict=True)
    )
    shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return Box(starts, shape) if all(length > 0 for length in shape) else None


def row_span(box: Box, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the range [first, last + 1) of element numbers that `box` touches in a row-major array of `shape`."""
    first = last = 0
    for start, length, size in zip(box.starts, box.shape, shape, strict=True):
        first = first * size + start
        last = last * size + start + length - 1
    return first, last + 1


def check_coverage(specs: Mapping[str, TensorSpec], entries: Iterable[Entry]) -> None:
    """Raise unless the pieces of each tensor in `specs` add up to the whole, and there is nothing else.

    Raises:
        ConflictError: elements are missing or written twice, which is what happens when ranks hold different state.
    """
    pieces: defaultdict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = defaultdict(set)
    for entry in entries:
        if specs.get(entry.tensor) != TensorSpec(entry.dtype, entry.global_shape):
            raise _disagree("a rank wrote a tensor that rank 0 does not have, or not like this", entry.tensor)
        box = (entry.offsets, entry.shape)
        if box in pieces[entry.tensor]:
            raise _disagree("two ranks wrote the same piece of a tensor", entry.tensor)
        pieces[entry.tensor].add(box)
    for name, spec in specs.items():
        found = sum(prod(shape) for _, shape in pieces[name])
        if found != prod(spec.shape) or not pieces[name]:
            raise _disagree("the ranks did not write the whole of a tensor", name)


def _disagree(fact: str, tensor: str) -> ConflictError:
    return ConflictError(fact, tensor=tensor, hint="Save the same state on every rank, with the same rank and world.")
