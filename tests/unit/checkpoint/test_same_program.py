"""The law of a resume: what `save` takes from a program, the same program gets back bit for bit, or `save` refuses it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.errors import ResumeError


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


class Moments(torch.optim.Optimizer):
    """Keeps its own kinds of state: momentum in another dtype than the weights, a mask of 8 bits, blocks, texts."""

    kept: torch.dtype = torch.float32

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002 - torch's signature
        self.state["calls"] = self.state.get("calls", 0) + 1  # type: ignore[index, arg-type]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p, dtype=self.kept)
                    state["signs"] = torch.zeros(p.shape, dtype=torch.uint8)
                    state["scales"] = torch.zeros(-(-p.numel() // 4), dtype=torch.float64)
                    state["mean"] = torch.zeros((), dtype=torch.float64)
                    state["kind"], state["past"] = "blocks", []
                state["momentum"].mul_(0.9).add_(p.grad.to(self.kept))
                state["signs"] += (p.grad > 0).to(torch.uint8)
                state["scales"] += 1 / 3
                state["mean"] += p.grad.double().mean() / 3
                state["past"] = [*state["past"][-1:], p.grad.double().flatten() / 3]
                p.sub_(group["lr"] * state["momentum"].to(p.dtype))


class WideMoments(Moments):
    kept = torch.float64


class NarrowMoments(Moments):
    kept = torch.bfloat16


class Lasting(Moments):
    """Restores its dtype by itself, as optimizers with master copies do."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for i, parameter in enumerate(self.param_groups[0]["params"]):
            self.state[parameter] = dict(state["state"].get(i, {}))


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "Adagrad": torch.optim.Adagrad,
    "Adam": lambda params: torch.optim.Adam(params, amsgrad=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "AdamW, rate in a tensor": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.01), foreach=False),
    "ASGD": torch.optim.ASGD,
    "Adamax": torch.optim.Adamax,
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.1),
    "LBFGS, a vector first": lambda params: torch.optim.LBFGS(params[::-1], lr=0.1),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda params: torch.optim.RMSprop(params, centered=True, momentum=0.9),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "moments": Moments,
    "wide moments": WideMoments,
    "narrow moments": NarrowMoments,
    "lasting moments": Lasting,
}
"""Of torch, all that take dense matrices and vectors; and some that keep what torch would cast as it loads."""


def model_of(dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(6, 4).to(dtype)


def go_on(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for i in range(steps):

        def closure(at: int = i) -> torch.Tensor:
            optimizer.zero_grad()
            inputs = torch.linspace(-1, 1, 12).view(2, 6).to(model.weight.dtype)  # type: ignore[arg-type]
            loss: torch.Tensor = model(inputs + at).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        else:
            closure()
            optimizer.step()


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return {name: (value.dtype, tuple(value.shape), raw)}
    if isinstance(value, dict):
        return {key: leaf for k, inner in value.items() for key, leaf in flat(inner, f"{name}/{k}").items()}
    if isinstance(value, list | tuple):
        return {key: leaf for k, inner in enumerate(value) for key, leaf in flat(inner, f"{name}/{k}").items()}
    return {name: repr(value)}


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 3),
    st.integers(0, 2),
)
def test_an_optimizer_goes_on_bit_for_bit_cold_or_warm_whatever_it_keeps(
    name: str, dtype: torch.dtype, steps: int, warm: int
) -> None:
    if name.startswith("LBFGS") and dtype is torch.bfloat16:
        steps = warm = 0  # torch has no such dot product.
    model, other = model_of(dtype, 0), model_of(dtype, 1)
    optimizer, again = (OPTIMIZERS[name](list(module.parameters())) for module in (model, other))
    go_on(model, optimizer, steps)
    go_on(other, again, warm)
    url = f"memory://same-{name}-{dtype}-{steps}-{warm}"
    with Checkpointer(url) as ck:
        if ck.latest() is None:
            ck.save(1, {"model": model, "optim": optimizer}, blocking=True)
    with Checkpointer(url) as ck:
        ck.restore({"model": other, "optim": again})
    assert flat(again.state_dict()) == flat(optimizer.state_dict())
    if steps or warm:
        go_on(model, optimizer, 2)
        go_on(other, again, 2)
        assert flat(other.state_dict()) == flat(model.state_dict())
        assert flat(again.state_dict()) == flat(optimizer.state_dict())


@pytest.mark.parametrize("name", ["AdamW fused", "moments", "lasting moments"])
@pytest.mark.parametrize(("saved", "wanted"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_an_optimizer_of_weights_of_another_dtype_is_refused_whatever_it_keeps(
    url: str, name: str, saved: torch.dtype, wanted: torch.dtype
) -> None:
    model, other = model_of(saved, 0), model_of(wanted, 0)
    optimizer, again = (OPTIMIZERS[name](list(module.parameters())) for module in (model, other))
    go_on(model, optimizer, 1)
    with Checkpointer(url) as ck:
        ck.save(1, {"optim": optimizer}, blocking=True)
        with pytest.raises(ResumeError, match=r"optim, parameter 0: saved as B?F\d+\[4, 6\], expected as B?F\d+"):
            ck.restore({"optim": again})
    assert not again.state


class Growing(nn.Module):
    """Extra state of a length of its own, beside a buffer that its own code resizes, in a child as well."""

    def __init__(self, length: int, *, child: bool = True) -> None:
        super().__init__()
        self.register_buffer("seen", torch.arange(float(length)))
        self.extra: Any = {"steps": length, "log": torch.arange(length, dtype=torch.int16)}
        if child:
            self.child = Growing(2 * length, child=False)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        self.seen = torch.empty_like(state[f"{prefix}seen"])
        super()._load_from_state_dict(state, prefix, *rest)


class Observed(nn.Module):
    """A layer that is strict beside one that grows."""

    def __init__(self, length: int, width: int = 3) -> None:
        super().__init__()
        self.grows = Growing(length)
        self.linear = nn.Linear(width, width)


@pytest.mark.parametrize("lengths", [(3, 0), (0, 3), (3, 3), (2, 5)])
def test_what_a_module_loads_by_code_of_its_own_may_have_grown_or_shrunk(url: str, lengths: tuple[int, int]) -> None:
    saved, wanted = (Observed(length) for length in lengths)
    with Checkpointer(url) as ck:
        ck.save(1, {"m": saved}, blocking=True)
        ck.restore({"m": wanted})
    assert flat(wanted.state_dict()) == flat(saved.state_dict())


def test_layers_of_torch_beside_one_that_grows_stay_strict(url: str) -> None:
    with Checkpointer(url) as ck:
        ck.save(1, {"m": Observed(3)}, blocking=True)
        with pytest.raises(ResumeError, match=r"m/linear\.weight: saved as F32\[3, 3\], expected as F32\[4, 4\]"):
            ck.restore({"m": Observed(3, width=4)})
        with pytest.raises(ResumeError, match=r"m/grows\.seen: saved as F32\[3\], expected as F64\[3\]"):
            ck.restore({"m": Observed(3).double()})
        other = Observed(3)
        del other.grows.child
        with pytest.raises(ResumeError, match=r"m/grows\.child\.seen: saved, but not expected"):
            ck.restore({"m": other})


class History:
    """An object whose state grows and gets new names while the program runs."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"mean": torch.zeros(2), "losses": torch.zeros(0)}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


def test_an_object_gets_what_it_showed_though_it_has_grown_since_it_was_made(url: str) -> None:
    saved, wanted = History(), History()
    saved.state |= {"losses": torch.arange(5.0), "best": torch.ones(3, dtype=torch.int8)}
    del saved.state["mean"]
    with Checkpointer(url) as ck:
        ck.save(1, {"history": saved}, blocking=True)
        ck.restore({"history": wanted})
        assert flat(wanted.state) == flat(saved.state)
        wanted.state["losses"] = torch.zeros(5, dtype=torch.float64)
        with pytest.raises(ResumeError, match=r"history/losses: saved as F32\[5\], expected as F64\[5\]"):
            ck.restore({"history": wanted})


class Expanded(nn.Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.register_buffer("places", (torch.arange(4) * factor).view(1, 4).expand(3, -1))


def test_an_expanded_buffer_is_filled_where_it_is(url: str) -> None:
    saved, wanted = Expanded(2), Expanded(0)
    place = wanted.places.data_ptr()  # type: ignore[operator, union-attr]
    with Checkpointer(url) as ck:
        ck.save(1, {"m": saved}, blocking=True)
        ck.restore({"m": wanted})
    assert torch.equal(wanted.places, saved.places)  # type: ignore[arg-type]
    assert wanted.places.data_ptr() == place  # type: ignore[operator, union-attr]
    assert wanted.places.stride() == (0, 1)  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2])
def test_scales_and_pairs_of_four_bits_are_read_by_safetensors_as_they_were(url: str, dtype: torch.dtype) -> None:
    raw = torch.arange(24, dtype=torch.uint8).view(4, 6)
    with Checkpointer(url) as ck:
        ck.save(1, {"m": {"t": raw.view(dtype), "turned": raw.view(dtype).t()}}, blocking=True)
    part = next(Path(url).glob("parts/*.safetensors"))
    read = load_file(part)
    assert read["m/t"].dtype == read["m/turned"].dtype == dtype
    assert torch.equal(read["m/t"].view(torch.uint8), raw)
    assert torch.equal(read["m/turned"].view(torch.uint8), raw.t())
