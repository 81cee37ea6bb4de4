import copy
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from datastore.errors import ConfigError
from datastore.training.hooks.calibration import Calibration
from datastore.training.hooks.cuts import Cut, fewer_channels, fewer_heads, fewer_layers, narrower
from datastore.training.hooks.shrink import Shrink, ShrinkSettings
from datastore.training.models.gpt import GPT
from datastore.training.objectives.base import HostRows, MicroBatch
from datastore.training.objectives.language import Causal
from datastore.training.settings import ModelSettings

SHAPE = ModelSettings(layers=3, width=32, heads=8, kv_heads=4, mlp_width=24, vocab_size=40, norm_eps=1e-9)
IDS = torch.from_numpy(np.random.Generator(np.random.PCG64(5)).integers(0, 40, size=(4, 12)))


def rows_of(count: int) -> HostRows:
    return HostRows(np.random.Generator(np.random.PCG64(3)).integers(0, 40, size=(count, 13)))


CALIBRATION = Calibration(rows_of, Causal(), torch.device("cpu"))


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> GPT:
    made = GPT(msgspec.structs.replace(SHAPE, tied=request.param))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in made.parameters():
            one.copy_(torch.randn(one.shape, generator=generator) * (0.2 if one.dim() == 2 else 1.0))
    return made


class Faithful(Causal):
    """The loss is how far the outputs are from those that the model had."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self._model = copy.deepcopy(model)

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        return (outputs - self._model(batch.inputs)).square().mean()


def same(one: GPT, other: GPT) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(IDS), other(IDS), atol=2e-4, rtol=1e-3)


def without_a_layer(model: GPT) -> Cut:
    """Return the cut after a layer was made idle."""
    model.get_parameter("model.layers.1.self_attn.o_proj.weight").zero_()
    model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
    return fewer_layers(model, 2, Calibration(rows_of, Faithful(model), torch.device("cpu")), samples=8)


def without_channels(model: GPT) -> Cut:
    for layer in range(3):
        model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")[:, layer % 2 :: 2] *= 1e-6
    return fewer_channels(model, 12, CALIBRATION, samples=8)


def without_groups(model: GPT) -> Cut:
    columns = torch.arange(32).view(4, 8)  # A group has two queries of four numbers.
    for layer in range(3):
        model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")[:, columns[layer]] *= 1e-6
        model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")[:, columns[layer + 1]] *= 1e-6
    return fewer_heads(model, 4, 2, CALIBRATION, samples=8)


def without_queries(model: GPT) -> Cut:
    queries = torch.arange(32).view(8, 4)
    for layer in range(3):
        for group in range(4):
            weight = model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")
            weight[:, queries[2 * group + (layer + group) % 2]] *= 1e-6
    return fewer_heads(model, 4, 4, CALIBRATION, samples=8)


def without_channels_of_the_stream(model: GPT) -> Cut:
    gone = torch.arange(0, 32, 2)
    model.get_parameter("model.embed_tokens.weight")[:, gone] = 0
    for layer in range(3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.{layer}.{name}.weight")[gone] = 0
    return narrower(model, 16, CALIBRATION, samples=8)


CUTS = {
    without_a_layer: ModelSettings(layers=2, width=32, heads=8, kv_heads=4, mlp_width=24),
    without_channels: ModelSettings(layers=3, width=32, heads=8, kv_heads=4, mlp_width=12),
    without_groups: ModelSettings(layers=3, width=32, heads=4, kv_heads=2, head_width=4, mlp_width=24),
    without_queries: ModelSettings(layers=3, width=32, heads=4, kv_heads=4, head_width=4, mlp_width=24),
    without_channels_of_the_stream: ModelSettings(layers=3, width=16, heads=8, kv_heads=4, head_width=4, mlp_width=24),
}


@pytest.mark.parametrize(("cut", "shape"), CUTS.items())
def test_what_adds_nothing_is_what_goes_and_norms_are_rescaled(
    cut: Callable[[GPT], Cut], shape: ModelSettings, model: GPT
) -> None:
    with torch.no_grad():
        smaller = cut(model).model
    known = {"vocab_size": 40, "norm_eps": 1e-9, "tied": model.settings.tied}
    assert smaller.settings == msgspec.structs.replace(shape, **known)
    same(smaller, model)


def moments_of(model: GPT) -> dict[str, dict[str, Tensor]]:
    """Return the moments that one gradient gives, and a count of steps."""
    loss = functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return {
        name: {"step": torch.tensor(7.0), "exp_avg": one, "exp_avg_sq": one.square(), "momentum_buffer": 2 * one}
        for name, one in zip(names, gradients, strict=True)
    }


@pytest.mark.parametrize("cut", CUTS)
def test_moments_that_are_cut_are_those_of_the_gradients_of_the_smaller_model(
    cut: Callable[[GPT], Cut], model: GPT
) -> None:
    """Where what goes adds nothing; of norms that are rescaled, too."""
    with torch.no_grad():
        done = cut(model)
    found, wanted = done.moments(moments_of(model)), moments_of(done.model)
    assert found.keys() == wanted.keys()
    for name, moments in wanted.items():
        for key, one in moments.items():
            scale = float(one.abs().max())
            torch.testing.assert_close(found[name][key], one, atol=2e-3 * scale, rtol=2e-3, msg=f"{name} {key}")


@torch.no_grad()
def test_what_reads_fewer_channels_makes_up_for_those_that_are_gone(model: GPT) -> None:
    smaller = fewer_channels(model, 12, CALIBRATION, samples=32).model
    plain = fewer_channels(model, 12, CALIBRATION, samples=32).model
    up = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    kept = [int((up == row).all(dim=1).nonzero()) for row in plain.get_parameter("model.layers.0.mlp.up_proj.weight")]
    read: list[Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _m, x: read.append(x[0].flatten(0, 1)))  # type: ignore[union-attr]
    CALIBRATION.show(model, 32)
    x, down = torch.cat(read), model.get_parameter("model.layers.0.mlp.down_proj.weight")
    wanted = x @ down.T
    made = x[:, kept] @ smaller.get_parameter("model.layers.0.mlp.down_proj.weight").T
    dropped = x[:, kept] @ down[:, kept].T
    assert (made - wanted).square().sum() < 0.9 * (dropped - wanted).square().sum()


def test_all_cuts_together_give_the_shape_that_was_said(model: GPT) -> None:
    hook = Shrink(ShrinkSettings(layers=2, width=16, heads=4, mlp_width=10, samples=8))
    wanted = hook.shape(model.settings)
    made = hook.initial(model, CALIBRATION)
    assert isinstance(made, GPT)
    assert made.settings == wanted
    assert (wanted.heads, wanted.key_heads, wanted.head_size) == (4, 2, 4)
    again = hook.initial(model, CALIBRATION).state_dict()
    assert all(torch.equal(one, again[name]) for name, one in made.state_dict().items())
    moments = hook.moments(moments_of(model))
    shapes = {name: one.shape for name, one in made.named_parameters()}
    assert {name: one["exp_avg_sq"].shape for name, one in moments.items()} == shapes


@pytest.mark.parametrize(
    "wrong", [{"layers": 4}, {"mlp_width": 25}, {"heads": 6, "kv_heads": 4}, {"heads": 8, "kv_heads": 2}]
)
def test_a_shape_that_is_no_part_of_the_model_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="cannot be shrunk to this shape"):
        Shrink(ShrinkSettings(**wrong)).shape(SHAPE)
