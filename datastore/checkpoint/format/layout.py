"""Which rank holds which box of which tensor: so that who restores reads the documents of those ranks that it needs, not of all.

With 1,024 ranks and 2,000 tensors the documents are 1.2 GB, and a rank that comes back to the same layout needs one of them. The layout
of a step says which. Tensors that are cut alike share a list of boxes, so it takes kilobytes, not a line for each piece.

It is a hint: a step is whole without it, and if it is gone or damaged all documents are read. What it leads to is compared with digests as ever,
and must hold all that a rank needs. Below `INDEXED_RANKS` ranks there is none: so many documents are read at once.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from datastore.checkpoint.format.checks import PlacedBox, Shape
from datastore.checkpoint.format.manifest import PartInfo, StepCommit, StepRef
from datastore.checkpoint.format.tree import specs
from datastore.document import Count, Document, Positive, Sealed
from datastore.errors import CorruptError

__all__ = ["INDEXED_RANKS", "StepLayout", "check_layout", "layout_of", "ranks_holding"]

Placed: TypeAlias = tuple[int, Shape, Shape]
"""A rank, and a box that its document has."""

INDEXED_RANKS = 16
"""From so many ranks on a step has a layout: as many documents are read at once."""


class Cut(Document, frozen=True, kw_only=True):
    """The boxes of a tensor, one after the other, and whose document has each."""

    ranks: tuple[Count, ...]
    offsets: tuple[Count, ...]
    """Where each box starts: as many numbers as the tensor has dimensions, then those of the next box."""

    shapes: tuple[Count, ...]
    """How far each goes."""


class StepLayout(Sealed, frozen=True, kw_only=True):
    """Where the pieces of a step are."""

    compact = True

    step: Count
    save_id: str
    world: Positive
    cuts: tuple[Cut, ...]
    tensors: dict[str, Count]
    """The number of its cut, for each tensor."""


def layout_of(ref: StepRef, parts: Sequence[PartInfo]) -> StepLayout:
    """Return the layout of the save `ref`, which `parts`, the documents of all ranks, make up."""
    boxes: defaultdict[str, list[Placed]] = defaultdict(list)
    for info in parts:
        for entry in info.entries:
            boxes[entry.tensor].append((info.rank, entry.offsets, entry.shape))
    numbers: dict[tuple[Placed, ...], int] = {}
    tensors = {name: numbers.setdefault(tuple(found), len(numbers)) for name, found in boxes.items()}
    cuts = tuple(
        Cut(
            ranks=tuple(rank for rank, _, _ in cut),
            offsets=tuple(at for _, offsets, _ in cut for at in offsets),
            shapes=tuple(length for _, _, shape in cut for length in shape),
        )
        for cut in numbers
    )
    return StepLayout(step=ref.step, save_id=ref.save_id, world=len(parts), cuts=cuts, tensors=tensors)


def check_layout(layout: StepLayout, commit: StepCommit, *, where: str) -> None:
    """Raise `CorruptError` unless `layout` could be that of `commit`: its boxes have as many elements as the tensors."""
    wanted = {name: spec.shape for item, values in commit.items.items() for name, spec in specs(values, name=item)}
    cuts = {(layout.tensors.get(name, -1), shape) for name, shape in wanted.items()}
    same = (layout.step, layout.save_id, layout.world) == (commit.step, commit.save_id, commit.world)
    if not same or not all(_makes_up(layout, number, shape) for number, shape in cuts):
        hint = "It is passed over; all documents are read instead."
        raise CorruptError("the layout is not that of the step", where=where, step=commit.step, hint=hint)


def _makes_up(layout: StepLayout, number: int, shape: Shape) -> bool:
    if not 0 <= number < len(layout.cuts):
        return False
    cut, dimensions = layout.cuts[number], len(shape)
    if (
        not cut.ranks
        or not len(cut.offsets) == len(cut.shapes) == dimensions * len(cut.ranks)
        or max(cut.ranks) >= layout.world
    ):
        return False
    lengths = [cut.shapes[i : i + dimensions] for i in range(0, len(cut.shapes), dimensions or 1)]
    return (sum(map(prod, lengths)) if dimensions else len(cut.ranks)) == prod(shape)


def ranks_holding(layout: StepLayout, boxes: Mapping[str, PlacedBox]) -> set[int]:
    """Return the ranks whose documents have what makes up `boxes`, a region of each tensor."""
    arrays = [_arrays(cut) for cut in layout.cuts]
    asked = {(layout.tensors[name], *box) for name, box in boxes.items()}
    return {rank for number, offsets, shape in asked for rank in _touching(arrays[number], offsets, shape)}


Numbers = NDArray[np.int64]


def _arrays(cut: Cut) -> tuple[Numbers, Numbers, Numbers]:
    """Return the ranks [N], where boxes start [N, D], and where they stop [N, D]."""
    ranks = np.array(cut.ranks, dtype=np.int64)
    starts = np.array(cut.offsets, dtype=np.int64).reshape(len(ranks), -1)
    return ranks, starts, starts + np.array(cut.shapes, dtype=np.int64).reshape(starts.shape)


def _touching(arrays: tuple[Numbers, Numbers, Numbers], offsets: Shape, shape: Shape) -> list[int]:
    ranks, starts, stops = arrays
    begin, end = np.array(offsets, dtype=np.int64), np.array(offsets, dtype=np.int64) + np.array(shape, dtype=np.int64)
    found: list[int] = ranks[((starts < end) & (begin < stops)).all(axis=1)].tolist()
    return found
