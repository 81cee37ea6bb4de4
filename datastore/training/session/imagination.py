"""A model with its objective and hooks, made and taken through a step on tensors that have shapes and no numbers.

What could not begin is refused as if it had begun: a pattern that matches nothing, a group that does not divide, a teacher with other
tokens. Only a teacher is read in earnest, for a moment.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from datastore.dataset.snapshot import Dataset
from datastore.training.export.initial import teacher
from datastore.training.hooks.base import Hook, RunState, make_hooks
from datastore.training.models.gpt import parameter_count
from datastore.training.models.huggingface import blocks_of
from datastore.training.objectives.base import Objective, micro_batches
from datastore.training.objectives.catalog import make_objective
from datastore.training.optim import inner_matrices
from datastore.training.parallel.building import calibration_of, refuse_blind_hooks
from datastore.training.parallel.layout import Layout
from datastore.training.parallel.lesson import Lesson
from datastore.training.parallel.passes import Ledger, bytes_of, gathered_bytes, imagined, peak_of
from datastore.training.run.architecture import build_model, context_of, recompute
from datastore.training.run.folder import RunConfig
from datastore.training.run.split import Split
from datastore.training.settings import Settings

__all__ = ["Imagined", "imagine"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Imagined:
    """A model that was imagined; bytes are those of the whole of it."""

    parameters: int
    weights_bytes: int
    trained_bytes: int
    gathered_bytes: int
    moments: Sequence[Tensor]
    """One for each tensor that the optimizer keeps."""

    hook_state: Sequence[Tensor]
    """What hooks keep and save: as the parameters, on ranks that share those."""

    hook_bytes: int
    """Of what they keep besides, whole on each rank."""

    untried: Sequence[str]
    """Notes on hooks that cannot do without numbers: what they keep is not counted."""

    peak_bytes: int
    """Of the passes of a step, beyond weights; with gradients, where the rank keeps them whole."""

    others_bytes: int
    """Keys and values of tokens of other ranks, where those share sequences."""

    passes: int
    weights: Sequence[Tensor]
    trained: Sequence[Tensor]


def imagine(config: RunConfig, split: Split, layout: Layout, *, precision: str) -> Imagined:
    """Return the model of a run on one rank's rows.

    Raises:
        ConfigError: it, its objective or a hook cannot begin.
        MissingError, CorruptError: a teacher is not there, or damaged.
    """
    settings = config.settings
    objective, cpu = make_objective(settings.objective), torch.device("cpu")
    share = -(-settings.data.global_batch // layout.readers)
    rows = min(settings.train.micro_batch or -(-share // layout.pipeline), share)
    passes = -(-share // rows)
    hooks = make_hooks(settings.hooks, where="settings")
    refuse_blind_hooks(hooks, objective)
    with imagined():
        model = build_model(config, objective)
        starts = _Starts(config, split, objective, layout)
        for name, hook in hooks.items():
            model = starts.tried(partial(hook.model, model), name) or model
        objective.start(model)
        if settings.train.recompute:
            recompute(model)
        reference = [] if objective.frozen is None else list(objective.frozen.parameters())
        weights = [*model.parameters(), *model.buffers(), *reference]
        ledger = Ledger(weights)
        with ledger:
            started = starts.start(hooks, model)
        kept_bytes = ledger.now_bytes
        blank = objective.blank(rows, context_of(config))

        def peak(hooks: Mapping[str, Hook]) -> int:
            lesson = Lesson(objective, hooks, cpu, precision)

            def learn() -> Tensor:
                return lesson.of(model, next(micro_batches(blank, cpu, size=rows)))

            return peak_of(model, learn, passes=passes, kept=layout.shard == 1, ledger=ledger)

        most = starts.tried(lambda: peak(started), "hooks") if started else None
        peak_bytes = peak({}) if most is None else most
    state = [tensor for hook in started.values() for tensor in _saved_by(hook)]
    trained = [one for one in model.parameters() if one.requires_grad]
    return Imagined(
        parameters=parameter_count(model),
        weights_bytes=bytes_of(weights),
        trained_bytes=bytes_of(trained),
        gathered_bytes=gathered_bytes(model),
        moments=_moments(model, settings),
        hook_state=state,
        hook_bytes=max(0, kept_bytes - bytes_of(state)),
        untried=starts.untried,
        peak_bytes=peak_bytes,
        others_bytes=_others_bytes(settings, layout, rows=rows, precision=precision),
        passes=passes,
        weights=weights,
        trained=trained,
    )


class _Starts:
    """Starts hooks as a run does, and notes which need numbers."""

    def __init__(self, config: RunConfig, split: Split, objective: Objective, layout: Layout) -> None:
        self._steps, self._world = config.settings.train.steps, layout.world
        self._datasets: Sequence[Dataset] = split.datasets
        self._calibration = calibration_of(config, split, objective, torch.device("cpu"))
        self.untried: list[str] = []

    def start(self, hooks: Mapping[str, Hook], model: nn.Module) -> dict[str, Hook]:
        """Return those that could start on `model`."""
        state = RunState(
            model=model,
            optimizer=torch.optim.SGD(model.parameters()),
            step=self._steps - 1,  # The last one, in which all that a schedule brings is there.
            steps=self._steps,
            rank=0,
            world=self._world,
            device=torch.device("cpu"),
            calibration=self._calibration,
            open_model=self._teacher,
        )
        return {name: hook for name, hook in hooks.items() if self.tried(partial(_started, hook, state), name)}

    def tried(self, work: Callable[[], T], name: str) -> T | None:
        """Return what `work` returns; None, and a note, if it needs numbers."""
        try:
            return work()
        except RuntimeError as error:  # As torch calls what it cannot do without numbers.
            self.untried.append(f"what {name} keeps is not counted, as it looks at numbers ({type(error).__name__})")
            return None

    def _teacher(self, name: str) -> nn.Module:
        with unset_fake_temporarily():
            found = teacher(name, datasets=self._datasets)
        return deepcopy(found)  # A copy that is made here has no numbers; those that were read are let go.


def _started(hook: Hook, state: RunState) -> Literal[True]:
    hook.start(state)
    return True


def _saved_by(hook: Hook) -> list[Tensor]:
    try:
        state = hook.state_dict()
    except RuntimeError:  # It saves what it makes of numbers, such as a digest, which is small.
        return []
    return [one for one in tree_leaves(state) if isinstance(one, Tensor)]


def _others_bytes(settings: Settings, layout: Layout, *, rows: int, precision: str) -> int:
    """Return the bytes of keys and values of `rows` that a rank has from others, in all layers at once, or in the one that is computed again."""
    shape, tokens = settings.model, settings.data.seq_len - settings.data.seq_len // layout.context
    layers = 1 if settings.train.recompute else shape.layers
    return 2 * rows * tokens * shape.heads * shape.head_size * layers * (4 if precision == "fp32" else 2)


def _moments(model: nn.Module, settings: Settings) -> list[Tensor]:
    """Return the shapes that the optimizer keeps: two for each parameter, one where Muon moves it."""
    if settings.optim.use == "sgd":
        return []
    once = {id(one) for one in inner_matrices(blocks_of(model))} if settings.optim.use == "muon" else set()
    trained = [one for one in model.parameters() if one.requires_grad]
    return [one for one in trained for _ in range(1 if id(one) in once else 2)]
