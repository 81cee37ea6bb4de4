"""Who writes what, and where boxes of tensors meet: the arithmetic behind saving on one layout and restoring on another."""

from itertools import pairwise, product
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.checkpoint.format.manifest import Entry
from datastore.checkpoint.format.tree import TensorSpec
from datastore.checkpoint.tensors import Box, check_coverage, overlap, owners, row_span
from datastore.errors import ConflictError

SIZES = st.dictionaries(st.text(max_size=4), st.integers(0, 1000), max_size=30)


@given(SIZES, st.integers(1, 8))
def test_every_tensor_has_exactly_one_owner_and_loads_are_within_four_thirds(sizes: dict[str, int], world: int) -> None:
    owner = owners(sizes, world=world)
    assert owner.keys() == sizes.keys()
    assert set(owner.values()) <= set(range(world))
    loads = [sum(sizes[name] for name in sizes if owner[name] == rank) for rank in range(world)]
    largest = max(sizes.values(), default=0)
    assert max(loads) <= 4 / 3 * max(sum(sizes.values()) / world, largest) + largest


@given(SIZES, st.integers(1, 8), st.randoms(use_true_random=False))
def test_owners_do_not_depend_on_the_order_in_which_tensors_are_seen(
    sizes: dict[str, int], world: int, random: Any
) -> None:
    items = list(sizes.items())
    random.shuffle(items)
    assert owners(dict(items), world=world) == owners(sizes, world=world)


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Box]:
    """A partition of `shape` into boxes, as any mesh of ranks would cut it, uneven ones included."""
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape]
    spans = [list(pairwise(edges)) for edges in cuts]
    return [
        Box(tuple(start for start, _ in cell), tuple(stop - start for start, stop in cell)) for cell in product(*spans)
    ]


@given(st.lists(st.integers(1, 6), max_size=3).map(tuple), st.data())
def test_any_layout_is_rebuilt_from_any_other(shape: tuple[int, ...], data: st.DataObject) -> None:
    whole = np.arange(prod(shape)).reshape(shape)
    saved = data.draw(grids(shape), label="saved as")
    for target in data.draw(grids(shape), label="read as"):
        found = np.full(target.shape, -1)
        for box in saved:
            shared = overlap(target, box)
            if shared is not None:
                found[slices(shared.within(target.starts))] = whole[slices(box)][slices(shared.within(box.starts))]
        assert (found == whole[slices(target)]).all()


@given(st.lists(st.integers(1, 6), max_size=3).map(tuple), st.data())
def test_a_row_span_is_the_shortest_range_that_holds_the_box(shape: tuple[int, ...], data: st.DataObject) -> None:
    numbers = np.arange(prod(shape)).reshape(shape)
    for box in data.draw(grids(shape)):
        inside = numbers[slices(box)]
        assert row_span(box, shape) == (inside.min(), inside.max() + 1)


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, start + length) for start, length in zip(box.starts, box.shape, strict=True))


def entry(tensor: str, shape: tuple[int, ...], box: Box) -> Entry:
    return Entry(
        tensor=tensor,
        dtype="F32",
        global_shape=shape,
        shape=box.shape,
        offsets=box.starts,
        part="parts/x",
        start=0,
        stop=4 * box.elements,
        digests="",
    )


@given(st.lists(st.integers(1, 5), max_size=3).map(tuple), st.data())
def test_a_step_is_not_committed_if_a_piece_of_a_tensor_is_missing_doubled_or_unknown(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    boxes = data.draw(grids(shape))
    entries = [entry("w", shape, box) for box in boxes]
    specs = {"w": TensorSpec("F32", shape)}
    check_coverage(specs, entries)
    index = data.draw(st.integers(0, len(boxes) - 1))
    for wrong in (
        entries[:index] + entries[index + 1 :],
        [*entries, entries[index]],
        [*entries, entry("v", shape, boxes[0])],
        [*entries[:-1], entry("w", (*shape, 1), Box((*boxes[-1].starts, 0), (*boxes[-1].shape, 1)))],
    ):
        with pytest.raises(ConflictError, match="tensor="):
            check_coverage(specs, wrong)
