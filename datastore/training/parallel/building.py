"""The state of a run before its first step: model, hooks, ranks and optimizer, put together in the one order that works."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from datastore.training.hooks.base import Hook, RunState, make_hooks, refuse_whole
from datastore.training.hooks.calibration import Calibration
from datastore.training.models.huggingface import blocks_of
from datastore.training.objectives.base import Objective
from datastore.training.optim import inner_matrices, make_optimizer
from datastore.training.parallel.strategy import Strategy
from datastore.training.run.architecture import build_model, context_of, recompute
from datastore.training.run.feed import calibration_rows
from datastore.training.run.folder import RunConfig
from datastore.training.run.split import Split

__all__ = ["Beginning", "build_with_hooks", "calibration_of"]


@dataclass(frozen=True, slots=True)
class Beginning:
    """Other models that a run needs."""

    weights: Mapping[str, Tensor] | None = None
    """What it begins with; None: what its seed gives, or what a checkpoint has."""

    open_model: Callable[[str], nn.Module] | None = None
    """What hooks open other models with."""


_ALONE = Beginning()


def calibration_of(config: RunConfig, split: Split, objective: Objective, device: torch.device) -> Calibration:
    """Return the rows of a run with which hooks look at its model; nothing is read yet."""
    settings, context = config.settings, context_of(config)
    rows = cache(lambda count: calibration_rows(split, settings, objective, context, count=count))
    return Calibration(rows, objective, device)


def build_with_hooks(
    config: RunConfig,
    strategy: Strategy,
    objective: Objective,
    calibration: Calibration | None = None,
    *,
    fit: Callable[[nn.Module], None] = lambda _model: None,
    beginning: Beginning = _ALONE,
) -> tuple[RunState, dict[str, Hook]]:
    """Return the state of a run before its first step, its model distributed, and its hooks, started.

    Hooks change the model before it is distributed, and see it again when the optimizer exists. Between both, `fit` says how
    this machine computes with it.

    Raises:
        ConfigError, DependencyError: as `make_hooks`.
    """
    settings, ranks = config.settings, strategy.ranks
    hooks = make_hooks(settings.hooks, where="settings")
    if strategy.splits:
        refuse_whole(hooks, all_of_them=strategy.differs)
    model = build_model(config, objective)
    if beginning.weights is not None:
        model.load_state_dict(beginning.weights)
    for hook in hooks.values():
        model = hook.model(model)
    model.to(ranks.device)
    objective.start(model)
    if settings.train.recompute:
        recompute(model)
    fit(model)
    strategy.enter(model)
    model = strategy.distribute(model)
    state = RunState(
        model=model,
        optimizer=make_optimizer(strategy.owned(model), settings.optim, inner=inner_matrices(blocks_of(model))),
        step=0,
        steps=settings.train.steps,
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
        calibration=calibration,
        open_model=beginning.open_model,
    )
    for hook in hooks.values():
        hook.start(state)
    return state, hooks
