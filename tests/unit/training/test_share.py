import pytest
import torch
from torch import nn

from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook, RunState, leaving
from datastore.training.hooks.ema import Ema, EmaSettings
from datastore.training.hooks.prune import Prune, PruneSettings
from datastore.training.hooks.share import Share, SharedLinear, ShareSettings
from datastore.training.models.gpt import GPT, parameter_count
from datastore.training.settings import ModelSettings

IDS = torch.arange(24).view(2, 12)


def gpt(layers: int = 4) -> GPT:
    model = GPT(ModelSettings(layers=layers, width=32, heads=4, kv_heads=2, mlp_width=48, vocab_size=40))
    model.initialize(torch.Generator().manual_seed(1))
    return model


def test_layers_of_a_group_have_one_matrix_and_train_it_together() -> None:
    model = Share(ShareSettings(group=2, rank=2)).model(gpt())
    first, second, third = (model.get_submodule(f"model.layers.{layer}.mlp.up_proj") for layer in (0, 1, 2))
    assert isinstance(first, SharedLinear)
    assert first.weight is second.weight
    assert first.weight is not third.weight
    assert parameter_count(model) < 0.7 * parameter_count(gpt())
    model(IDS).square().mean().backward()
    assert all(one.grad is not None for one in model.parameters())


def test_with_the_whole_rank_it_begins_as_the_model_that_it_was() -> None:
    whole = gpt()
    with torch.no_grad():
        wanted = whole(IDS)
        shared = Share(ShareSettings(rank=16, parameters=("*.k_proj.weight", "*.v_proj.weight"))).model(gpt())
        torch.testing.assert_close(shared(IDS), wanted, atol=1e-5, rtol=1e-4)


def test_the_first_weights_are_the_nearest_of_their_rank() -> None:
    far = [Share(ShareSettings(rank=rank)).model(gpt()) for rank in (0, 4, 16)]
    weight = gpt().get_parameter("model.layers.1.mlp.up_proj.weight")
    errors = []
    for model in far:
        layer = model.get_submodule("model.layers.1.mlp.up_proj")
        assert isinstance(layer, SharedLinear)
        errors.append(float((layer.folded().weight - weight).square().sum().detach()))
    assert errors[0] > errors[1] > errors[2]


def test_what_leaves_is_an_ordinary_model_with_the_same_answers() -> None:
    hook = Share(ShareSettings(rank=2))
    shared = hook.model(gpt())
    with torch.no_grad():
        wanted = shared(IDS)
        left = hook.export(shared)
        torch.testing.assert_close(left(IDS), wanted, atol=1e-5, rtol=1e-4)
    assert set(left.state_dict()) == set(gpt().state_dict())
    assert not any(isinstance(module, SharedLinear) for module in left.modules())


@pytest.mark.parametrize(
    ("settings", "layers", "text"),
    [
        ({"group": 3}, 4, "divided into groups"),
        ({"parameters": ("none",)}, 4, "no matrix to share"),
        ({"rank": 33}, 4, "cannot be shared"),
    ],
)
def test_what_cannot_be_shared_is_refused(settings: dict[str, object], layers: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Share(ShareSettings(**settings)).model(gpt(layers))  # type: ignore[arg-type]


def test_shared_layers_are_not_pruned_as_folding_fills_the_zeros_in() -> None:
    model = Share(ShareSettings(rank=2)).model(gpt())
    run = RunState(model, torch.optim.SGD(model.parameters()), 0, 9, 0, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match="would be filled in"):
        Prune(PruneSettings()).start(run)


def test_an_average_is_taken_before_layers_are_folded() -> None:
    hooks: dict[str, Hook] = {"0.share": Share(ShareSettings(rank=2)), "1.ema": Ema(EmaSettings(decay=0.0, every=9))}
    model = hooks["0.share"].model(gpt())
    run = RunState(model, torch.optim.SGD(model.parameters()), 0, 9, 0, 1, torch.device("cpu"))
    hooks["1.ema"].start(run)
    with torch.no_grad():
        wanted = model(IDS)
        for one in model.parameters():
            one.mul_(1.5)
        for hook in leaving(hooks):
            model = hook.export(model)
        torch.testing.assert_close(model(IDS), wanted, atol=1e-5, rtol=1e-4)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="divided into groups"):
        Share(ShareSettings()).model(nn.Linear(3, 3))
