"""Meshes of several dimensions: the pieces are boxes that make up the whole, also where rows do not divide, and each is written once."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.planner_helpers import _create_write_item_for_tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from datastore.checkpoint.exchange.dcp import _captured
from datastore.checkpoint.tensors import box_at, local_piece
from datastore.errors import ConfigError


@pytest.mark.parametrize("rows", [0, 1, 5, 6, 7, 8, 12, 13])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 2), (3, 2), (2, 3), (4, 2)])
def test_a_piece_is_what_tensor_parallelism_and_then_fsdp_leave(sizes: tuple[int, int], rows: int) -> None:
    placements = [_StridedShard(0, split_factor=sizes[1]), Shard(0)]
    numbers = torch.arange(rows * 3).view(rows, 3)
    seen = []
    for data, tensor in product(*map(range, sizes)):
        box = box_at((data, tensor), (rows, 3), placements, sizes)
        assert box is not None
        piece = numbers[box.starts[0] : box.starts[0] + box.shape[0]]
        assert torch.equal(piece, nth(nth(numbers, sizes[1], tensor), sizes[0], data))
        seen += piece.flatten().tolist()
    assert sorted(seen) == list(range(rows * 3))


def nth(rows: torch.Tensor, count: int, number: int) -> torch.Tensor:
    """Return one of the pieces that torch cuts: there may be fewer than `count`."""
    pieces = rows.chunk(count)
    return pieces[number] if number < len(pieces) else rows[:0]


def test_copies_of_the_mesh_have_the_same_piece() -> None:
    placements = [Replicate(), _StridedShard(1, split_factor=2), Shard(1)]
    boxes = {box_at((copy, 1, 0), (3, 9), placements, (2, 2, 2)) for copy in range(2)}
    assert [(box.starts, box.shape) for box in boxes if box] == [((0, 3), (3, 2))]


@pytest.mark.parametrize(
    "placements",
    [
        [_StridedShard(0, split_factor=4), Shard(0)],
        [_StridedShard(0, split_factor=2), Shard(1)],
        [Shard(0), _StridedShard(0, split_factor=2)],
    ],
)
def test_what_is_strided_in_another_way_is_no_box(placements: list[Shard]) -> None:
    assert box_at((0, 0), (8, 4), placements, (2, 2)) is None


@pytest.mark.parametrize("rows", [0, 1, 5, 7, 12])
def test_plain_shards_cut_what_those_before_them_have_left(rows: int) -> None:
    numbers = torch.arange(rows * 4).view(rows, 4)
    for first, second, third in product(range(3), range(2), range(2)):
        box = box_at((first, second, third), (rows, 4), [Shard(0), Shard(1), Shard(0)], (3, 2, 2))
        assert box is not None
        piece = numbers[box.starts[0] :, box.starts[1] :][: box.shape[0], : box.shape[1]]
        assert torch.equal(piece, nth(nth(numbers, 3, first), 2, third)[:, 2 * second : 2 * second + 2])


def test_a_piece_of_dcp_that_is_not_what_it_planned_is_refused_when_it_is_saved() -> None:
    item = _create_write_item_for_tensor("w", torch.zeros(1, 4))
    assert _captured(item, torch.zeros(1, 4), ("w",)).size_bytes == 16
    with pytest.raises(ConfigError, match="not what it plans"):
        _captured(item, torch.zeros(0, 4), ("w",))


@pytest.mark.parametrize(
    ("names", "placements"),
    [
        (("data",), [Shard(0)]),
        (("tensor",), [Shard(1)]),
        (("data",), [Replicate()]),
        (("copies", "data"), [Replicate(), Shard(0)]),
        (("copies", "data", "tensor"), [Replicate(), Shard(0), Shard(1)]),
    ],
)
def test_what_lies_on_slices_of_a_mesh_is_written_by_the_first_of_them(
    names: tuple[str, ...], placements: list[Shard | Replicate]
) -> None:
    numbers = torch.arange(7 * 4).view(7, 4)
    written = []
    for rank in range(8):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=8)
        try:
            mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("copies", "data", "tensor"))
            piece = local_piece(distribute_tensor(numbers, mesh[names], placements, src_data_rank=None), "w")
        finally:
            dist.destroy_process_group()
        if piece.first:
            written += piece.tensor.flatten().tolist()
    assert sorted(written) == list(range(7 * 4))
