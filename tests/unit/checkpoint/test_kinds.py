"""One table of all that can be saved: each kind of number, in each way that it may lie in memory, comes back bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.inspect import verify_step
from datastore.checkpoint.steps import CheckpointerSettings
from datastore.checkpoint.tensors import DTYPES
from datastore.errors import ConfigError
from datastore.storage.resolve import open_storage


def numbers(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Return every bit pattern of a small kind, and random ones of a large: NaN, infinities and both zeros among them."""
    generator = torch.Generator().manual_seed(7)
    size = torch.empty(0, dtype=dtype).element_size()
    high = 2 if dtype is torch.bool else 256
    return torch.randint(0, high, (count * size,), generator=generator).to(torch.uint8).view(dtype)


WAYS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda whole: whole[:24].view(4, 6),
    "scalar": lambda whole: whole[3],
    "empty": lambda whole: whole[:0].view(0, 5),
    "transposed": lambda whole: whole[:24].view(4, 6).t(),
    "every second": lambda whole: whole[:48].view(6, 8)[:, ::2],
    "from an offset": lambda whole: whole[5:29].view(2, 3, 4),
    "expanded": lambda whole: whole[:6].view(1, 6).expand(4, 6),
    "channels last": lambda whole: whole[:48].view(2, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "one of many dimensions": lambda whole: whole[:24].view(1, 2, 1, 3, 4, 1)[:, :1],
}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the values in their order."""
    plain = tensor.resolve_conj().resolve_neg()
    flat = torch.empty(plain.shape, dtype=plain.dtype)
    flat.copy_(plain)
    return flat.reshape(-1).view(torch.uint8)


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Return zeros, also of kinds that torch cannot fill."""
    return torch.zeros(tensor.numel() * tensor.element_size(), dtype=torch.uint8).view(tensor.dtype).view(tensor.shape)


def fits(dtype: torch.dtype, way: str) -> bool:
    """Return whether torch makes such a view of such numbers at all, and safetensors holds it."""
    return not (way == "scalar" and dtype is torch.float4_e2m1fn_x2)


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_kind_in_every_way_comes_back_bit_for_bit(tmp_path: Path, name: str, codec: Any) -> None:
    dtype = DTYPES[name]
    whole = numbers(dtype, 64)
    state = {way: make(whole.clone()) for way, make in WAYS.items() if fits(dtype, way)}
    if dtype.is_complex:
        state |= {"conjugate": whole[:24].view(4, 6).conj(), "imaginary": whole[:24].clone().conj().imag}
    with Checkpointer(tmp_path, options=CheckpointerSettings(codec=codec)) as ck:
        ck.save(1, {"state": state}).committed()
        blank = {way: zeros_like(tensor) for way, tensor in state.items()}
        ck.restore({"state": blank})
        for way, tensor in state.items():
            assert torch.equal(bits(blank[way]), bits(tensor)), way
            before = bits(tensor)
            part = tensor[:1] if way == "expanded" else tensor
            part.copy_(zeros_like(part))
            assert before.any() == (bits(tensor) != before).any(), way
        ck.restore({"state": state})  # Into what lies in memory as it did.
        assert all(torch.equal(bits(state[way]), bits(blank[way])) for way in state)
    assert not verify_step(open_storage(tmp_path), 1).bad


@pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:torch.quantize")
def test_every_dtype_of_torch_is_stored_or_refused_by_name(tmp_path: Path) -> None:
    kinds = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    refused = set()
    with Checkpointer(tmp_path) as ck:
        for step, dtype in enumerate(sorted(kinds, key=str)):
            if dtype in DTYPES.values():
                continue
            try:
                tensor = torch.empty(4, dtype=dtype)
            except (RuntimeError, TypeError, NotImplementedError):
                refused.add(dtype)  # torch has the name, and makes no such tensor.
                continue
            with pytest.raises(ConfigError, match="cannot be stored"):
                ck.save(step, {"state": {"t": tensor}}, blocking=True)
            refused.add(dtype)
        assert refused == kinds - set(DTYPES.values())
        assert ck.steps() == []


def test_a_model_made_on_the_meta_device_is_told_what_to_do_and_then_restored(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 4)
    with torch.device("meta"):
        other = torch.nn.Linear(3, 4)
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"model": model}, blocking=True)
        with pytest.raises(ConfigError, match=r"to_empty"):
            ck.restore({"model": other})
        ck.restore({"model": other.to_empty(device="cpu")})
    assert torch.equal(other.weight, model.weight)
