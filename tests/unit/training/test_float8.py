"""Linear layers of blocks multiply in fp8, and nothing else of a model changes."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from datastore.errors import ConfigError
from datastore.training.hooks.adapt import Adapt, AdaptSettings
from datastore.training.machine import peak_flops
from datastore.training.models.float8 import check_float8, use_float8
from datastore.training.models.gpt import GPT
from datastore.training.settings import ModelSettings


def gpt(*, width: int = 32, mlp_width: int = 0) -> GPT:
    model = GPT(ModelSettings(layers=1, width=width, heads=2, mlp_width=mlp_width, vocab_size=64, tied=False))
    model.initialize(torch.Generator().manual_seed(1))
    return model


def in_fp8(model: nn.Module) -> set[str]:
    return {name for name, one in model.named_modules() if type(one).__name__ == "Float8Linear"}


def test_linear_layers_of_blocks_are_changed_and_no_name_is() -> None:
    model, before = gpt(mlp_width=40), gpt(mlp_width=40).state_dict()
    use_float8(model, precision="fp8_emulated", recipe="tensorwise")
    assert in_fp8(model) == {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}, "40 is no multiple of 16"
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], one) and one.dtype == torch.float32 for name, one in after.items())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_products_are_those_of_rounded_numbers(recipe: str) -> None:
    """Three bits behind the point: each number is off by a sixteenth at most, and errors of many add up to less than their sum."""
    exact, model = gpt(), gpt()
    use_float8(model, precision="fp8_emulated", recipe=recipe)
    ids = torch.arange(48).view(3, 16) % 64
    loss, rounded = (functional.cross_entropy(one(ids).flatten(0, 1), ids.flatten()) for one in (exact, model))
    assert 0 < abs(loss.item() - rounded.item()) < 0.01
    loss.backward()  # type: ignore[no-untyped-call]
    rounded.backward()  # type: ignore[no-untyped-call]
    for name, one in exact.named_parameters():
        other = model.get_parameter(name)
        assert other.grad is not None
        assert one.grad is not None
        assert (other.grad - one.grad).norm() < 0.2 * one.grad.norm(), name


def test_a_number_far_from_the_others_takes_bits_from_its_own_row_only_if_scales_are_by_row() -> None:
    errors = {}
    for recipe in ("tensorwise", "rowwise"):
        model = gpt()
        layer = model.get_submodule("model.layers.0.self_attn.q_proj")
        assert isinstance(layer, nn.Linear)
        with torch.no_grad():
            layer.weight[0, 0] = 1e4
        use_float8(model, precision="fp8_emulated", recipe=recipe)
        x = torch.ones(16, 32)
        found = model.get_submodule("model.layers.0.self_attn.q_proj")(x)
        errors[recipe] = (found - functional.linear(x, layer.weight))[:, 1:].abs().max().item()
    assert errors["rowwise"] < errors["tensorwise"] / 10


def test_adapters_stay_and_what_they_adapt_multiplies_in_fp8() -> None:
    model = Adapt(AdaptSettings(rank=16)).model(gpt())
    use_float8(model, precision="fp8_emulated", recipe="tensorwise")
    assert in_fp8(model)
    assert all(name.endswith("base_layer") for name in in_fp8(model))


def test_a_model_without_a_layer_that_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer of this model can multiply in fp8"):
        use_float8(gpt(width=24, mlp_width=24), precision="fp8_emulated", recipe="tensorwise")


def test_a_device_without_such_products_is_refused() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="does not multiply in fp8") as caught:
        check_float8("fp8", cpu)
    assert "fp8_emulated" in str(caught.value.hint)
    check_float8("fp8_emulated", cpu)
    check_float8("bf16", cpu)


def test_a_gpu_is_taken_to_be_twice_as_fast_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda")
    assert (peak_flops(gpu, "bf16"), peak_flops(gpu, "fp8")) == (989e12, 1978e12)
    assert peak_flops(gpu, "fp8_emulated") == 989e12
