from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from typing_extensions import override

from datastore.errors import ConfigError
from datastore.training.hooks.base import RunState
from datastore.training.hooks.calibration import Calibration
from datastore.training.hooks.masks import cheapest_groups, keep_largest, keep_mask, keep_two_of_four, swapped
from datastore.training.hooks.prune import Prune, PruneSettings, ratio_at
from datastore.training.hooks.surgeon import prune_fours, prune_to
from datastore.training.objectives.base import HostRows, MicroBatch, Objective

weights = st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=200).map(torch.tensor)


def test_of_a_thousand_equal_weights_a_tenth_is_kept() -> None:
    equal = torch.full((1000,), 0.7)
    kept = torch.where(keep_mask(equal, 10), equal, torch.zeros(()))
    assert int((kept == 0.7).sum()) == 100
    assert int((kept == 0).sum()) == 900


@given(weights, st.floats(1, 50))
def test_exactly_the_planned_count_is_kept_and_nothing_larger_is_dropped(values: torch.Tensor, ratio: float) -> None:
    mask = keep_mask(values, ratio)
    assert int(mask.sum()) == round(len(values) / ratio)
    dropped, kept = values[~mask].abs(), values[mask].abs()
    assert not len(dropped) or not len(kept) or dropped.max() <= kept.min()


@given(st.integers(0, 20), st.integers(1, 50), st.floats(1.5, 20))
def test_sparsity_only_grows_from_nothing_to_the_ratio(start: int, length: int, ratio: float) -> None:
    stop = start + length
    ratios = [ratio_at(step, start=start, stop=stop, ratio=ratio) for step in range(stop + 10)]
    assert all(value == 1 for value in ratios[: start + 1])
    assert ratios == sorted(ratios)
    assert all(value == ratio for value in ratios[stop:])


class Fixed(Objective):
    """Reads rows of 20 numbers as they are."""

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        return model(batch.tokens.float())  # type: ignore[no-any-return]

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        return outputs.square().sum()


def rows_of(count: int) -> HostRows:
    return HostRows(np.random.Generator(np.random.PCG64(3)).integers(-9, 9, size=(count, 20)))


def run_of(model: nn.Module, *, steps: int) -> RunState:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    cpu = torch.device("cpu")
    return RunState(model, optimizer, 0, steps, 0, 1, cpu, Calibration(rows_of, Fixed(), cpu))


def take_steps(run: RunState, hook: Prune, count: int) -> None:
    for _ in range(count):
        run.model(torch.ones(1, 20)).square().sum().backward()
        hook.gradients(run)
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.step += 1
        hook.updated(run)


def test_pruned_weights_and_their_moments_stay_zero() -> None:
    torch.manual_seed(0)
    run = run_of(nn.Sequential(nn.Linear(20, 50)), steps=40)
    hook = Prune(PruneSettings(ratio=10, parameters=("*.weight",), every=5))
    hook.start(run)
    take_steps(run, hook, 40)
    weight = run.model.get_parameter("0.weight")
    assert int((weight != 0).sum()) == 100
    assert hook.metrics() == {"sparsity": 0.9}
    for moment in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(run.optimizer.state[weight][moment][weight == 0], torch.zeros(900))


@given(
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 6),
    st.sampled_from([0, 3, 25]),
)
def test_the_ratio_is_reached_and_no_weight_comes_back_whatever_the_number_of_steps_becomes(
    steps: int, planned: int, later: int, start: int, stop: int
) -> None:
    settings = PruneSettings(ratio=4, parameters=("*.weight",), every=5, start=start, stop=stop)
    first, second = max(planned, start + 1), max(later, start + 1)
    assume(not stop or stop > start)
    run = run_of(nn.Sequential(nn.Linear(20, 50)), steps=first)
    hook = Prune(settings)
    hook.start(run)
    take_steps(run, hook, min(steps, first))
    assume(second > run.step)
    state = {name: mask.clone() for name, mask in hook.state_dict().items()}
    run.steps = second
    hook = Prune(settings)
    hook.start(run)
    hook.load_state_dict(state)
    before = hook.metrics()["sparsity"]
    while run.step < second:
        take_steps(run, hook, 1)
        assert hook.metrics()["sparsity"] >= before
        before = hook.metrics()["sparsity"]
    assert before == 0.75


VARIANTS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "magnitude once": {"schedule": "once", "start": 5},
    "magnitude global": {"scope": "global"},
    "magnitude 2:4": {"pattern": "2:4", "ratio": 2.0},
    "magnitude regrow": {"schedule": "regrow"},
    "wanda": {"method": "wanda"},
    "wanda global once": {"method": "wanda", "scope": "global", "schedule": "once"},
    "wanda 2:4": {"method": "wanda", "pattern": "2:4", "ratio": 2.0},
    "wanda regrow": {"method": "wanda", "schedule": "regrow"},
    "reconstruct": {"method": "reconstruct"},
    "reconstruct 2:4": {"method": "reconstruct", "pattern": "2:4", "ratio": 2.0},
    "movement": {"method": "movement", "start": 2},
    "movement once": {"method": "movement", "schedule": "once", "start": 5},
    "movement global": {"method": "movement", "scope": "global"},
    "movement 2:4": {"method": "movement", "pattern": "2:4", "ratio": 2.0},
}


def settings_of(name: str) -> PruneSettings:
    return PruneSettings(**{"ratio": 4.0, "parameters": ("*.weight",), "every": 5, "samples": 16, **VARIANTS[name]})


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 48), nn.SiLU(), nn.Linear(48, 8), nn.Linear(8, 3))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_keeps_the_exact_count_and_moments_of_what_is_gone_are_zero(name: str) -> None:
    run, hook = run_of(net(), steps=40), Prune(settings_of(name))
    hook.start(run)
    take_steps(run, hook, 40)
    weights = {key: one for key, one in run.model.named_parameters() if one.dim() == 2}
    masks = hook.state_dict()
    ratio = settings_of(name).ratio
    if "global" in name:
        assert sum(int(masks[key].sum()) for key in weights) == round(
            sum(one.numel() for one in weights.values()) / ratio
        )
    else:
        assert {key: int(masks[key].sum()) for key in weights} == {
            key: round(one.numel() / ratio) for key, one in weights.items()
        }
    for key, one in weights.items():
        gone = ~masks[key]
        for tensor in (one, *(run.optimizer.state[one][moment] for moment in ("exp_avg", "exp_avg_sq"))):
            assert not tensor[gone].any()
        if "2:4" in name:
            assert (masks[key].view(len(one), -1, 4).sum(dim=-1) == 2).all()


@pytest.mark.parametrize("name", [name for name in VARIANTS if "regrow" not in name])
def test_what_is_gone_stays_gone(name: str) -> None:
    run, hook = run_of(net(), steps=40), Prune(settings_of(name))
    hook.start(run)
    gone = {key: torch.zeros_like(mask) for key, mask in hook.state_dict().items() if mask.dtype == torch.bool}
    for _ in range(40):
        take_steps(run, hook, 1)
        for key, before in gone.items():
            now = ~hook.state_dict()[key]
            assert not (before & ~now).any()
            before.copy_(now)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("stop", [4, 13, 22])
def test_a_restored_hook_goes_on_as_if_nothing_had_happened(name: str, stop: int) -> None:
    runs = []
    for interrupted in (False, True):
        run, hook = run_of(net(), steps=30), Prune(settings_of(name))
        hook.start(run)
        take_steps(run, hook, stop)
        if interrupted:
            state = {key: one.clone() for key, one in hook.state_dict().items()}
            hook = Prune(settings_of(name))
            hook.start(run)
            hook.load_state_dict(state)
        take_steps(run, hook, 30 - stop)
        runs.append(run.model.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])


def test_regrowing_moves_places_and_keeps_their_number() -> None:
    run, hook = run_of(net(), steps=40), Prune(settings_of("magnitude regrow"))
    hook.start(run)
    take_steps(run, hook, 1)
    first = {key: mask.clone() for key, mask in hook.state_dict().items()}
    while run.step < 40:
        take_steps(run, hook, 1)
        assert {key: int(mask.sum()) for key, mask in hook.state_dict().items()} == {
            key: int(mask.sum()) for key, mask in first.items()
        }
    assert any(not torch.equal(first[key], mask) for key, mask in hook.state_dict().items())


scores_and_masks = st.integers(1, 12).flatmap(
    lambda rows: st.tuples(
        st.lists(st.integers(0, 5), min_size=8 * rows, max_size=8 * rows),
        st.lists(st.booleans(), min_size=8 * rows, max_size=8 * rows),
    ).map(lambda both: (torch.tensor(both[0]).float().view(rows, 8), torch.tensor(both[1]).view(rows, 8)))
)


@given(scores_and_masks, st.floats(0, 1))
def test_of_those_alive_the_largest_are_kept_exactly_and_of_equal_ones_the_first(
    both: tuple[Tensor, Tensor], part: float
) -> None:
    scores, alive = both
    kept = round(int(alive.sum()) * part)
    mask = keep_largest(scores, kept, alive=alive)
    first = torch.argsort(scores.masked_fill(~alive, -1.0).flatten(), descending=True, stable=True)[:kept]
    assert torch.equal(mask.flatten().nonzero().flatten(), first.sort().values)
    dropped = alive & ~mask
    if kept and dropped.any():
        assert scores[dropped].max() <= scores[mask].min()


@given(scores_and_masks, st.floats(0, 1))
def test_two_of_four_are_left_in_exactly_the_chosen_groups(both: tuple[Tensor, Tensor], part: float) -> None:
    scores, _ = both
    whole = torch.ones_like(scores, dtype=torch.bool)
    groups = round(scores.numel() // 4 * part)
    chosen = cheapest_groups(scores, groups, alive=whole)
    assert int(chosen.sum()) == groups
    left = keep_two_of_four(scores, chosen, alive=whole).view(len(scores), -1, 4).sum(dim=-1)
    assert torch.equal(left, torch.where(chosen, 2, 4))


@given(scores_and_masks, st.floats(0.01, 0.99))
def test_a_swap_leaves_as_many_places(both: tuple[Tensor, Tensor], fraction: float) -> None:
    scores, mask = both
    after = swapped(mask, scores=scores, wanted=scores.flip(0), fraction=fraction)
    assert int(after.sum()) == int(mask.sum())


@given(st.integers(1, 6), st.integers(1, 300), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_the_surgeon_keeps_the_exact_count_whatever_is_gone_already(
    out: int, columns: int, first: float, second: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, columns, generator=generator)
    x = torch.randn(30, columns, generator=generator)
    alive = torch.rand(out, columns, generator=generator) < first
    kept = round(int(alive.sum()) * second)
    pruned, mask = prune_to(weight * alive, x.T @ x, kept, alive=alive)
    assert int(mask.sum()) == kept
    assert not (mask & ~alive).any()
    assert not pruned[~mask].any()


def test_the_surgeon_loses_less_than_dropping_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(64, 64, generator=generator) / 8
    x = torch.randn(500, 64, generator=generator) @ mix
    weight = torch.randn(32, 64, generator=generator)
    whole = torch.ones_like(weight, dtype=torch.bool)

    def lost(other: Tensor) -> float:
        return float((x @ (weight - other).T).square().mean())

    sized = weight.abs() * x.square().sum(dim=0).sqrt()
    assert lost(prune_to(weight, x.T @ x, 1024, alive=whole)[0]) < 0.4 * lost(weight * keep_largest(sized, 1024))
    fours, _ = prune_fours(weight, x.T @ x, 512, alive=whole)
    chosen = torch.ones(32, 16, dtype=torch.bool)
    assert lost(fours) < 0.5 * lost(weight * keep_two_of_four(sized, chosen, alive=whole))


def test_tied_weights_are_pruned_once_under_any_of_their_names() -> None:
    model = nn.Sequential(nn.Linear(20, 20, bias=False), nn.Linear(20, 20, bias=False))
    model[1].weight = model[0].weight
    run, hook = run_of(model, steps=10), Prune(PruneSettings(parameters=("1.weight",), ratio=4))
    hook.start(run)
    take_steps(run, hook, 10)
    assert list(hook.state_dict()) == ["1.weight"]
    assert int((model[0].weight != 0).sum()) == 100


@pytest.mark.parametrize(
    ("given_settings", "text"),
    [
        ({"parameters": ("nothing",)}, "no matrix to prune"),
        ({"method": "wanda", "parameters": ("embed.weight",)}, "no inputs to measure"),
        ({"pattern": "2:4", "parameters": ("odd.weight",)}, "no multiple of 4"),
    ],
)
def test_what_cannot_be_pruned_is_refused_at_the_start(given_settings: dict[str, Any], text: str) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "odd": nn.Linear(6, 4)})
    with pytest.raises(ConfigError, match=text):
        Prune(PruneSettings(**given_settings)).start(run_of(model, steps=10))


@pytest.mark.parametrize(
    "wrong",
    [
        {"pattern": "2:4", "ratio": 4.0},
        {"pattern": "2:4", "scope": "global"},
        {"method": "reconstruct", "scope": "global"},
        {"method": "reconstruct", "schedule": "regrow"},
        {"method": "movement", "schedule": "once"},
        {"method": "movement", "schedule": "regrow"},
    ],
)
def test_settings_that_contradict_each_other_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"pattern|method"):
        PruneSettings(**wrong)
