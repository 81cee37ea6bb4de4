"""One table of all that can be saved: each kind of number, in each way that it may lie in memory, comes back bit for bit."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.inspect import verify_step
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.steps import CheckpointerSettings
from datastore.checkpoint.tensors import DTYPES
from datastore.errors import ConfigError, ResumeError
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
    rounding: Any

    def __new__(cls, numbers: torch.Tensor, scale: torch.Tensor, *_rounding: Any) -> Self:
        made: Self = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)
        return made

    def __init__(self, numbers: torch.Tensor, scale: torch.Tensor, rounding: Any = "nearest") -> None:
        self.numbers, self.scale, self.rounding = numbers, scale, rounding

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return ["numbers", "scale"], {"rounding": self.rounding, "dtype": self.scale.dtype, "shape": self.numbers.shape}

    @classmethod
    def __tensor_unflatten__(cls, parts: Any, context: Any, shape: torch.Size, stride: tuple[int, ...]) -> Self:
        assert type(context["shape"]) is torch.Size
        assert context["shape"] == shape
        assert stride == (shape[1], 1)
        assert context["dtype"] is parts["scale"].dtype
        return cls(parts["numbers"], parts["scale"], context["rounding"])

    @classmethod
    def __torch_dispatch__(cls, *_: Any, **_more: Any) -> Any:
        raise NotImplementedError


class Other(Rounded):
    """Made of the same, and something else."""


NUMBERS, SCALE = torch.arange(12, dtype=torch.int8).view(3, 4), torch.tensor([0.5, 2.0, -1.0])


def blank(kind: type[Rounded] = Rounded, rounding: Any = "nearest") -> Rounded:
    return kind(torch.zeros_like(NUMBERS), torch.zeros(3), rounding)


def test_a_tensor_made_of_others_is_filled_in_place_or_made_anew(tmp_path: Path) -> None:
    state = {"weight": Rounded(NUMBERS, SCALE), "more": [Rounded(NUMBERS + 1, SCALE * 2, ("up", [1, 2.5, None]))]}
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"model": state}).committed()
        weight = blank()
        into: dict[str, Any] = {"weight": weight, "more": [blank(rounding=("up", [1, 2.5, None]))]}
        ck.restore({"model": into})
        assert into["weight"] is weight
        new: dict[str, Any] = {}
        ck.restore({"model": new})
        for each in (into, new):
            assert each["weight"].numbers.equal(NUMBERS)
            assert each["weight"].scale.equal(SCALE)
            assert type(each["more"][0]) is Rounded
            assert each["more"][0].numbers.equal(NUMBERS + 1)
            assert each["more"][0].rounding == ("up", [1, 2.5, None])
    assert not verify_step(open_storage(tmp_path), 1).bad


@pytest.mark.parametrize(
    ("into", "problem"),
    [
        (blank(Other), r"saved as .*Rounded, expected as .*Other"),
        (blank(rounding="down"), r"saved with rounding 'nearest', expected with 'down'"),
        (blank(rounding=object()), r"saved with rounding 'nearest', expected with object"),
        (torch.zeros(3, 4), r"saved as a dict"),
    ],
)
def test_a_tensor_made_of_others_does_not_go_into_one_of_another_kind(
    tmp_path: Path, into: torch.Tensor, problem: str
) -> None:
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"model": {"weight": Rounded(NUMBERS, SCALE)}}, blocking=True)
        with pytest.raises(ResumeError, match=rf"model/weight: {problem}"):
            ck.restore({"model": {"weight": into}})
    assert not isinstance(into, Rounded) or not into.numbers.any()


def test_a_tensor_made_of_others_needs_its_class_and_a_plain_context_to_be_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"model": {"weight": Rounded(NUMBERS, SCALE)}}, blocking=True)
        ck.save(2, {"model": {"weight": Rounded(NUMBERS, SCALE, object())}}, blocking=True)
        with pytest.raises(
            ResumeError, match=r"weight: cannot be made of its parts: object is no plain value; restore"
        ):
            ck.restore({"model": {}})
        into = {"weight": blank(rounding=object())}
        ck.restore({"model": into})
        assert into["weight"].scale.equal(SCALE)
        monkeypatch.delattr(sys.modules[__name__], "Rounded")
        with pytest.raises(
            ResumeError, match=r"cannot be made of its parts: import \S*test_kinds before, which has Rounded"
        ):
            ck.restore({"model": {}}, step=1)


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"),
        ("Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"),
        ("IntxWeightOnlyConfig", "Int8WeightOnlyConfig"),
        ("Float8WeightOnlyConfig", "Int8WeightOnlyConfig"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_quantized_models_of_torchao_come_back_bit_for_bit(tmp_path: Path, kind: str, other: str) -> None:
    torchao = pytest.importorskip("torchao.quantization", exc_type=ImportError)

    def model(seed: int, kind: str = kind) -> torch.nn.Module:
        torch.manual_seed(seed)
        made = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 32))
        more = {"weight_dtype": vars(torch)["int4"]} if kind == "IntxWeightOnlyConfig" else {}
        torchao.quantize_(made, getattr(torchao, kind)(**more))
        return made

    one, two, inputs = model(0), model(1), torch.linspace(-1, 1, 192).view(3, 64)
    assert not torch.equal(one(inputs), two(inputs))
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"model": one}, blocking=True)
        ck.restore({"model": two})
        with pytest.raises(ResumeError, match=r"model/0\.weight: saved (as|with)"):
            ck.restore({"model": model(2, other)})
    assert torch.equal(one(inputs), two(inputs))


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
@pytest.mark.filterwarnings("ignore")
def test_quantized_states_of_optimizers_of_torchao_go_on_bit_for_bit(
    tmp_path: Path, kind: str, dtype: torch.dtype, taken: int
) -> None:
    optimizers = pytest.importorskip("torchao.optim", exc_type=ImportError)

    def program(seed: int, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 64)).to(dtype)
        made = model, getattr(optimizers, kind)(model.parameters(), lr=0.01)
        train(*made, steps)
        return made

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            inputs = torch.linspace(-1, 1 + step, 1024, dtype=dtype).view(4, 256)
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes many times what this does.
        one, other = program(0, 3), program(1, taken)
        with Checkpointer(tmp_path) as ck:
            ck.save(3, {"model": one[0], "optim": one[1]}, blocking=True)
            ck.restore({"model": other[0], "optim": other[1]})
        for each in (one, other):
            train(*each, 2)
    for first, second in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]), "unbind"),
        (lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)], layout=torch.jagged), "unbind"),
        (lambda: torch.ones(2, dtype=torch.complex128), "view_as_real"),
        (lambda: np.ones(2), "from_numpy"),
        (torch.Generator, "get_state"),
        (lambda: torch.nn.Linear(1, 1), "an item of its own"),
    ],
)
def test_what_cannot_be_stored_is_told_by_its_path_with_a_way_out(
    tmp_path: Path, make: Callable[[], Any], hint: str
) -> None:
    with Checkpointer(tmp_path) as ck, pytest.raises(ConfigError, match=rf"path='state/x'.*{hint}"):
        ck.save(1, {"state": {"x": make()}})


@pytest.mark.parametrize(
    ("items", "hint"),
    [
        (torch.nn.Linear(1, 1), "Name each thing"),
        ({"optim": [torch.nn.Linear(1, 1)]}, "optim_0"),
        ({"rng": torch.Generator()}, "get_state"),
    ],
)
def test_what_is_no_item_is_told_with_a_way_out(tmp_path: Path, items: Any, hint: str) -> None:
    with Checkpointer(tmp_path) as ck:
        for use in (lambda: ck.save(1, items), lambda: ck.restore(items)):
            with pytest.raises(ConfigError, match=hint):
                use()


def test_what_a_call_cannot_mean_is_told_at_once(tmp_path: Path) -> None:
    cases: list[Any] = [3, Keep(last=0), Keep(budget_bytes="2 GiB")]  # type: ignore[arg-type]
    for keep in cases:
        with pytest.raises(ConfigError, match="keep"):
            Checkpointer(tmp_path, keep=keep)
    with Checkpointer(tmp_path) as ck:
        with pytest.raises(ConfigError, match=r"metrics/loss.*item\(\)"):
            ck.save(1, {"state": {}}, metrics={"loss": torch.ones(())})
        unclear: Any = "1"
        for use in (lambda: ck.restore({}, step=unclear), lambda: ck.pin(unclear), lambda: ck.inspect(unclear)):
            with pytest.raises(ConfigError, match="not a step"):
                use()
