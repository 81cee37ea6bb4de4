"""One table of all that can be saved: each kind of number, in each way that it may lie in memory, comes back bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

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


class Rounded(torch.Tensor):
    """A tensor made of two others, as quantized ones of torchao are: eight bits for each number, and a scale for each row."""

    numbers: torch.Tensor
    scale: torch.Tensor

    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)
        return made

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor) -> None:
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **_more: Any) -> Any:
        raise NotImplementedError


def parts_of(state: dict[str, Any]) -> dict[str, Any]:
    """As on the page of checkpoints."""
    made = {name: each.__tensor_flatten__()[0] for name, each in state.items() if hasattr(each, "__tensor_flatten__")}
    return state | {name: {part: getattr(state[name], part) for part in parts} for name, parts in made.items()}


def test_a_tensor_made_of_others_is_refused_before_anything_is_written_and_its_parts_come_back_in_place(
    tmp_path: Path,
) -> None:
    numbers, scale = torch.arange(12, dtype=torch.int8).view(3, 4), torch.tensor([0.5, 2.0, -1.0])
    state = {"weight": Rounded(numbers, scale), "bias": torch.ones(3)}
    with Checkpointer(tmp_path / "run") as ck:
        with pytest.raises(ConfigError, match=r"class is not known.*model/weight.*Rounded.*tensors that it is made of"):
            ck.save(1, {"model": state}, blocking=True)
        assert not (tmp_path / "run").exists()
        ck.save(1, {"model": parts_of(state)}, blocking=True)
        weight = Rounded(torch.zeros_like(numbers), torch.zeros(3))
        into = {"weight": weight, "bias": torch.zeros(3)}
        with pytest.raises(ConfigError, match="class is not known"):
            ck.restore({"model": into})
        ck.restore({"model": parts_of(into)})
    assert weight.numbers.equal(numbers)
    assert weight.scale.equal(scale)


@pytest.mark.parametrize(
    "kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "IntxWeightOnlyConfig"]
)
@pytest.mark.filterwarnings("ignore")
def test_parts_of_quantized_models_come_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)
    more = {"weight_dtype": vars(torch)["int4"]} if kind == "IntxWeightOnlyConfig" else {}

    def model(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        made = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 32))
        torchao.quantize_(made, getattr(torchao, kind)(**more))
        return made

    one, other, inputs = model(0), model(1), torch.linspace(-1, 1, 192).view(3, 64)
    assert not torch.equal(one(inputs), other(inputs))
    with Checkpointer(tmp_path) as ck:
        with pytest.raises(ConfigError, match="class is not known"):
            ck.save(1, {"model": one}, blocking=True)
        ck.save(1, {"model": parts_of(one.state_dict())}, blocking=True)
        ck.restore({"model": parts_of(other.state_dict())})
    assert torch.equal(one(inputs), other(inputs))
