"""The state of a run before its first step: model, hooks, ranks and optimizer, put together in the one order that works."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook, Moments, RunState, acting, make_hooks
from datastore.training.hooks.calibration import Calibration
from datastore.training.hooks.parts import agreed, overwrite
from datastore.training.models.huggingface import blocks_of
from datastore.training.objectives.base import Objective
from datastore.training.optim import inner_matrices, make_optimizer, named_state
from datastore.training.parallel.layout import Layout
from datastore.training.parallel.strategy import Strategy
from datastore.training.run.architecture import build_model, context_of, recompute
from datastore.training.run.feed import calibration_rows
from datastore.training.run.folder import RunConfig
from datastore.training.run.split import Split

__all__ = [
    "Beginning",
    "build_with_hooks",
    "calibration_of",
    "check_hooks",
    "refuse_blind_hooks",
    "refuse_other_parameters",
]


@dataclass(frozen=True, slots=True)
class Beginning:
    """Other models that a run needs."""

    weights: Mapping[str, Tensor] | None = None
    """What it begins with; None: what its seed gives, or what a checkpoint has."""

    moments: Moments | None = None
    """What its optimizer begins with; None: with nothing."""

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
    check_hooks(hooks, strategy.layout, differs=strategy.differs)
    refuse_blind_hooks(hooks, objective)
    model = _whole_model(config, objective, hooks, beginning=beginning)
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
    if beginning.moments is not None:
        _take_moments(state, beginning.moments)
    for hook in hooks.values():
        hook.start(state)
    return state, hooks


def _whole_model(
    config: RunConfig, objective: Objective, hooks: Mapping[str, Hook], *, beginning: Beginning
) -> nn.Module:
    """Return the model as the hooks made it, on the CPU."""
    model = build_model(config, objective)
    if beginning.weights is not None:
        model.load_state_dict(beginning.weights)
    for hook in hooks.values():
        model = hook.model(model)
    if beginning.moments is not None:
        refuse_other_parameters(beginning.moments, model)
    return model


def check_hooks(hooks: Mapping[str, Hook], layout: Layout, *, differs: bool) -> None:
    """Raise unless all of `hooks` that train can do so where ranks share the work as `layout` says, or `differs`: each has other weights.

    Raises:
        ConfigError: one cannot.
    """
    trained = acting(hooks)
    if differs and trained:
        raise ConfigError(
            "these hooks need the same weights and moments on every rank, and ranks differ",
            hooks=[*trained],
            hint='Use sync.use = "all_reduce", or gradients in fewer bytes.',
        )
    sizes = {name: getattr(layout, name) for name in ("shard", "tensor", "context", "pipeline")}
    for name, hook in trained.items():
        fits = hook.layouts(hook.settings)
        unfit = {f"parallel.{size}": count for size, count in sizes.items() if count > 1 and size not in fits}
        if unfit:
            raise ConfigError(
                "a hook cannot train where ranks share the work like this",
                hook=name,
                **unfit,
                hint=f"Use {' and '.join(f'`parallel.{one}`' for one in ('data', *sizes) if one in fits or one == 'data')} with it.",
            )


def refuse_blind_hooks(hooks: Mapping[str, Hook], objective: Objective) -> None:
    """Refuse hooks that look at outputs where the model keeps them to itself.

    Raises:
        ConfigError: there is one.
    """
    readers = [name for name, hook in hooks.items() if type(hook).loss is not Hook.loss and type(hook).reads_outputs]
    if objective.loss_inside and readers:
        raise ConfigError(
            "hooks look at logits, of which there are only some rows at a time",
            hooks=readers,
            hint="Leave out objective.chunked, or these hooks.",
        )


def refuse_other_parameters(moments: Moments, model: nn.Module) -> None:
    """Refuse `moments` that are not those of what `model` learns.

    Raises:
        ConfigError: they are of other parameters, or of other shapes.
    """
    learned = {name: tuple(one.shape) for name, one in model.named_parameters() if one.requires_grad}
    saved = {name: max((tuple(one.shape) for one in state.values()), key=len) for name, state in moments.items()}
    differ = sorted(name for name in learned.keys() | saved.keys() if learned.get(name) != saved.get(name))
    if differ:
        raise ConfigError(
            "the run learns other parameters than those that `model.init` has moments of",
            parameters=differ[:8],
            hint="Leave out `optim.init`, or hooks that change which parameters learn, here or there (adapt, share).",
        )


def _take_moments(state: RunState, moments: Moments) -> None:
    """Give the optimizer the moments that rank 0 has; each rank keeps those of its own parts."""
    own = named_state(state.model, state.optimizer)
    for name, saved in moments.items():
        for key, tensor in saved.items():
            shared = agreed(tensor.to(state.device))
            if name in own:
                overwrite(own[name][key], shared)
