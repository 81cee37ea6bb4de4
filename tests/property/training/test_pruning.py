import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from datastore.training.hooks.base import RunState
from datastore.training.hooks.prune import Prune, PruneSettings, keep_mask, ratio_at

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


def run_of(model: nn.Module, *, steps: int) -> RunState:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return RunState(model=model, optimizer=optimizer, step=0, steps=steps, rank=0, world=1, device=torch.device("cpu"))


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


def test_a_restored_hook_goes_on_as_if_nothing_had_happened() -> None:
    runs = []
    for stop in (17, 40):
        torch.manual_seed(0)
        run = run_of(nn.Sequential(nn.Linear(20, 50)), steps=40)
        hook = Prune(PruneSettings(ratio=4, parameters=("*.weight",), every=5))
        hook.start(run)
        take_steps(run, hook, stop)
        if stop < 40:
            state = {name: mask.clone() for name, mask in hook.state_dict().items()}
            hook = Prune(PruneSettings(ratio=4, parameters=("*.weight",), every=5))
            hook.start(run)
            hook.load_state_dict(state)
            take_steps(run, hook, 40 - stop)
        runs.append(run.model.get_parameter("0.weight"))
    assert torch.equal(*runs)
