from typing import get_args

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from datastore.training.hooks.quantizing.budget import chosen_bits, stored_bytes
from datastore.training.hooks.quantizing.calibrated import moved_errors, searched_grid
from datastore.training.hooks.quantizing.grid import Grid, fitted_grid, rounded
from datastore.training.hooks.quantizing.layers import blank_packed, pack, packed_layer, packed_words, unpack
from datastore.training.hooks.quantizing.settings import Bits, Scheme

bits = st.sampled_from(get_args(Bits))
schemes = st.builds(Scheme, bits=bits, group=st.sampled_from([0, 4, 8]), symmetric=st.booleans())
seeds = st.integers(0, 2**31)


def weights_of(seed: int, *, pruned: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(6, 16).normal_(generator=generator)
    weight[torch.rand(6, 16, generator=generator) < pruned] = 0.0
    return weight


def linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    return linear


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 70), seeds)
def test_what_was_packed_is_unpacked(width: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (width - 1)
    whole = torch.randint(-top, top, (rows, columns), generator=generator, dtype=torch.int8)
    packed = pack(whole, width)
    assert packed.shape == (rows, packed_words(columns, width))
    assert torch.equal(unpack(packed, width, columns), whole)


@given(schemes, seeds)
def test_no_weight_moves_by_more_than_half_a_scale(scheme: Scheme, seed: int) -> None:
    weight = weights_of(seed)
    packed = packed_layer(linear_of(weight), scheme)
    # With a zero point, whose own rounding shifts the grid, the ends move by half a scale more.
    limit = packed.weight_scale.repeat_interleave(scheme.group or 16, dim=1) * (0.5 if scheme.symmetric else 1.0)
    assert bool(((packed.weight - weight).abs() <= limit * 1.0001).all())


@given(schemes, seeds)
def test_zeros_stay_zeros_however_they_are_rounded(scheme: Scheme, seed: int) -> None:
    weight = weights_of(seed, pruned=0.5)
    inputs = torch.randn(40, 16, generator=torch.Generator().manual_seed(seed))
    layer = blank_packed(linear_of(weight), scheme)
    for whole, grid in (
        (fitted_grid(weight, scheme).whole(weight), fitted_grid(weight, scheme)),
        moved_errors(weight, inputs.T @ inputs, scheme),
    ):
        layer.take(whole, grid)
        assert bool((layer.weight[weight == 0] == 0).all())


@given(schemes, seeds)
def test_training_computes_with_the_integers_of_the_export(scheme: Scheme, seed: int) -> None:
    weight = weights_of(seed)
    stretch = 0.1 * torch.randn(6, 16 // (scheme.group or 16), generator=torch.Generator().manual_seed(seed))
    packed = packed_layer(linear_of(weight), scheme, stretch)
    torch.testing.assert_close(rounded(weight, scheme, stretch), packed.weight, rtol=1e-6, atol=1e-7)


@given(schemes, seeds, st.sampled_from([0.0, 3.0]))
def test_with_a_searched_grid_the_outputs_lose_no_more_than_to_nearest(
    scheme: Scheme, seed: int, common: float
) -> None:
    """Also where all inputs have a part in common, so that errors of one direction add up."""
    weight, generator = weights_of(seed), torch.Generator().manual_seed(seed)
    inputs = torch.randn(64, 16, generator=generator) * torch.arange(1.0, 17.0) + common * 16

    def lost(grid: Grid) -> torch.Tensor:
        return (inputs @ (grid.real(grid.whole(weight)) - weight).T).square().sum(dim=0)

    plain, searched = lost(fitted_grid(weight, scheme)), lost(searched_grid(weight, scheme, inputs.T @ inputs))
    assert bool((searched <= plain * 1.001 + 1e-3).all())


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=6), st.data())
def test_a_budget_is_kept_and_not_left_unused(sizes: list[tuple[int, int]], data: st.DataObject) -> None:
    scheme = Scheme(bits=8, group=8)
    shapes = {f"layer{number}": (rows, 8 * groups) for number, (rows, groups) in enumerate(sizes)}
    costs = {name: {8: 0.0, 4: data.draw(st.floats(0, 1)), 3: data.draw(st.floats(1, 9))} for name in shapes}

    def size(chosen: dict[str, Scheme]) -> int:
        return sum(stored_bytes(shapes[name], one) for name, one in chosen.items())

    most = size(dict.fromkeys(shapes, scheme))
    least = size(dict.fromkeys(shapes, Scheme(bits=3, group=8)))
    target = data.draw(st.integers(least, most))
    chosen = chosen_bits(costs, shapes, scheme, target=target)
    assert size(chosen) <= target
    assert chosen_bits(costs, shapes, scheme, target=most) == dict.fromkeys(shapes, scheme)


@given(schemes, st.integers(1, 9), st.integers(1, 4))
def test_the_size_of_a_layer_is_known_before(scheme: Scheme, rows: int, groups: int) -> None:
    layer = blank_packed(nn.Linear(8 * groups, rows, bias=False), scheme)
    assert layer.size_bytes == stored_bytes((rows, 8 * groups), scheme)


def test_a_row_of_zeros_stays_zero() -> None:
    for symmetric in (True, False):
        grid = fitted_grid(torch.zeros(2, 8), Scheme(symmetric=symmetric))
        assert torch.equal(grid.real(grid.whole(torch.zeros(2, 8))), torch.zeros(2, 8))
        assert bool(torch.isfinite(grid.scales).all())


def test_packing_is_that_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    for width in range(1, 9):
        top = 2 ** (width - 1)
        whole = torch.randint(-top, top, (7, 37), dtype=torch.int8)
        assert torch.equal(pack(whole, width), pack_to_int32(whole, width))
        assert torch.equal(unpack_from_int32(pack(whole, width), width, whole.shape), whole)
