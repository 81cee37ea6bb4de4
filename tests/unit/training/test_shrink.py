import copy

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from datastore.errors import ConfigError
from datastore.training.hooks.calibration import Calibration
from datastore.training.hooks.cuts import fewer_channels, fewer_heads, fewer_layers, narrower
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


@torch.no_grad()
def test_a_layer_that_adds_nothing_is_the_one_that_goes(model: GPT) -> None:
    model.get_parameter("model.layers.1.self_attn.o_proj.weight").zero_()
    model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
    faithful = Calibration(rows_of, Faithful(model), torch.device("cpu"))
    smaller = fewer_layers(model, 2, faithful, samples=8)
    assert smaller.settings.layers == 2
    same(smaller, model)


@torch.no_grad()
def test_channels_that_add_nothing_are_those_that_go(model: GPT) -> None:
    for layer in range(3):
        model.get_parameter(f"model.layers.{layer}.mlp.down_proj.weight")[:, layer % 2 :: 2] *= 1e-6
    smaller = fewer_channels(model, 12, CALIBRATION, samples=8)
    assert smaller.settings.inner_width == 12
    same(smaller, model)


@torch.no_grad()
def test_groups_of_heads_that_add_nothing_are_those_that_go(model: GPT) -> None:
    columns = torch.arange(32).view(4, 8)  # A group has two queries of four numbers.
    for layer in range(3):
        model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")[:, columns[layer]] *= 1e-6
        model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")[:, columns[layer + 1]] *= 1e-6
    smaller = fewer_heads(model, 4, 2, CALIBRATION, samples=8)
    assert (smaller.settings.heads, smaller.settings.key_heads, smaller.settings.head_size) == (4, 2, 4)
    same(smaller, model)


@torch.no_grad()
def test_queries_that_add_nothing_go_and_their_groups_stay(model: GPT) -> None:
    queries = torch.arange(32).view(8, 4)
    for layer in range(3):
        for group in range(4):
            weight = model.get_parameter(f"model.layers.{layer}.self_attn.o_proj.weight")
            weight[:, queries[2 * group + (layer + group) % 2]] *= 1e-6
    smaller = fewer_heads(model, 4, 4, CALIBRATION, samples=8)
    assert (smaller.settings.heads, smaller.settings.key_heads) == (4, 4)
    same(smaller, model)


@torch.no_grad()
def test_channels_of_the_stream_that_nothing_writes_to_go_and_norms_are_rescaled(model: GPT) -> None:
    gone = torch.arange(0, 32, 2)
    model.get_parameter("model.embed_tokens.weight")[:, gone] = 0
    for layer in range(3):
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.{layer}.{name}.weight")[gone] = 0
    smaller = narrower(model, 16, CALIBRATION, samples=8)
    assert (smaller.settings.width, smaller.settings.head_size, smaller.settings.inner_width) == (16, 4, 24)
    same(smaller, model)


@torch.no_grad()
def test_what_reads_fewer_channels_makes_up_for_those_that_are_gone(model: GPT) -> None:
    smaller = fewer_channels(model, 12, CALIBRATION, samples=32)
    plain = fewer_channels(model, 12, CALIBRATION, samples=32)
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


@pytest.mark.parametrize(
    "wrong", [{"layers": 4}, {"mlp_width": 25}, {"heads": 6, "kv_heads": 4}, {"heads": 8, "kv_heads": 2}]
)
def test_a_shape_that_is_no_part_of_the_model_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="cannot be shrunk to this shape"):
        Shrink(ShrinkSettings(**wrong)).shape(SHAPE)
