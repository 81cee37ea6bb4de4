import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from datastore.training.hooks.quantize import PackedLinear, QuantizeSettings, pack, quantize_rows, unpack

bits = st.sampled_from([4, 8])


@given(bits, st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_what_was_packed_is_unpacked(width: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (width - 1)
    whole = torch.randint(-top, top, (rows, columns), generator=generator, dtype=torch.int8)
    packed = pack(whole, width)
    assert packed.shape == (rows, -(-columns * width // 32))
    assert torch.equal(unpack(packed, width, columns), whole)


@given(bits, st.sampled_from([0, 4, 8]), st.integers(0, 2**31))
def test_no_weight_moves_by_more_than_half_a_scale(width: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(16, 6, bias=False)
    nn.init.normal_(linear.weight, generator=generator)
    packed = PackedLinear.of(linear, QuantizeSettings(bits=width, group=group))  # type: ignore[arg-type]
    limit = packed.weight_scale.repeat_interleave(group or 16, dim=1) / 2
    assert bool(((packed.weight - linear.weight).abs() <= limit * 1.0001).all())


def test_a_row_of_zeros_stays_zero() -> None:
    whole, scales = quantize_rows(torch.zeros(2, 8), bits=8, group=0)
    assert torch.equal(whole, torch.zeros(2, 8, dtype=torch.int8))
    assert bool(torch.isfinite(scales).all())


def test_packing_is_that_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    for width in (4, 8):
        top = 2 ** (width - 1)
        whole = torch.randint(-top, top, (7, 37), dtype=torch.int8)
        assert torch.equal(pack(whole, width), pack_to_int32(whole, width))
