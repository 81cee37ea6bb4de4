"""The points in the life of a model where other code may act.

One class, one method per point, each doing nothing by default. Hooks run in the order of the configuration, and each owns
what it needs. The loop knows none of them.

    shape       the shape that `model.init` names        say another one
    initial     with the weights that `model.init` names cut them, before the first step only
    moments     after that, with `optim.init`            cut the moments of those weights likewise
    model       built, before parallelism                replace or wrap modules
    start       parallel, optimizer made                 remember parameters, make all state it will ever save
    loss        after the objective                      add a term
    gradients   averaged, before clipping                change gradients
    updated     parameters have moved, run.step counts   mask, average, re-rank
    metrics     when metrics are written                 numbers
    export      leaving training                         fold, merge, quantize
    state_dict, load_state_dict   saved and restored with the step

A hook's state has the same keys from `start` on: a restore reads into tensors that are there, and refuses others. It changes
in `gradients` and `updated` only: before those, a checkpoint of the step before may still be copying it.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from datastore.config import find_class
from datastore.document import Document, convert
from datastore.errors import ConfigError, ResumeError
from datastore.training.hooks.calibration import Calibration
from datastore.training.objectives.base import MicroBatch
from datastore.training.settings import ModelSettings

__all__ = [
    "Hook",
    "HookSet",
    "Moments",
    "RunState",
    "acting",
    "find_hook",
    "leaving",
    "make_hooks",
    "numbers_of",
    "training_hooks",
]

Moments: TypeAlias = Mapping[str, Mapping[str, Tensor]]
"""What an optimizer keeps, as a checkpoint holds it: of each parameter by name tensors of its shape, and counts of steps."""

_OURS = {
    "adapt": "datastore.training.hooks.adapt:Adapt",
    "distill": "datastore.training.hooks.distill:Distill",
    "ema": "datastore.training.hooks.ema:Ema",
    "prune": "datastore.training.hooks.prune:Prune",
    "quantize": "datastore.training.hooks.quantize:Quantize",
    "share": "datastore.training.hooks.share:Share",
    "shrink": "datastore.training.hooks.shrink:Shrink",
}

_CHANGES = ("nothing", "shape", "weights", "bits")
"""In the order in which they make sense."""


@dataclass(slots=True)
class RunState:
    """What a hook sees of a run; owned by the loop, which moves `step`."""

    model: nn.Module
    """The model as the hooks made it, without the wrapper that averages gradients."""

    optimizer: torch.optim.Optimizer
    step: int
    """Steps taken so far: 0 before the first."""

    steps: int
    rank: int
    world: int
    device: torch.device
    calibration: Calibration | None = None
    """Rows of the run's own data, the same on every rank and after every resume; None: a model that leaves training, without data."""

    open_model: Callable[[str], nn.Module] | None = None
    """Return another trained model by its name, a run or a folder, on the CPU; refuses one with another tokenizer. None: likewise."""


class Hook:
    """Does nothing; inherit and override the points you need."""

    Settings: ClassVar[type[Document]] = Document
    """The keys of its `[[hooks]]` table besides `use`; an instance is the one argument of the constructor."""

    trains: ClassVar[bool] = True
    """Whether it has a part in training. One that acts on export only, and has no state, says False: it may be changed, added
    or left out when a run is resumed."""

    changes: ClassVar[Literal["nothing", "shape", "weights", "bits"]] = "nothing"
    """For good, as far as other hooks are concerned: shapes are changed before weights, and weights before they become a few bits.
    A model leaves training through hooks that change weights, then shapes, which may fold what those have changed, then bits."""

    reads_outputs: ClassVar[bool] = True
    """Of a hook with a `loss` of its own: whether that looks at the outputs of the model."""

    takes_parts: ClassVar[bool] = False
    """Whether parameters may be DTensors, of which this rank has a part only: what `layouts` returns unless it is overridden."""

    def __init__(self, settings: Document) -> None:
        self.settings = settings

    @classmethod
    def takes_part(cls, settings: Document) -> bool:  # noqa: ARG003 - most do whatever their settings are
        """Return whether a hook with these settings has a part in training; where that depends on them, override this."""
        return cls.trains

    @classmethod
    def layouts(cls, settings: Document) -> frozenset[str]:  # noqa: ARG003 - so here
        """Return which sizes of `[parallel]` may be above 1 where it trains, besides `data`: "shard", "tensor", "context"."""
        return frozenset({"shard", "tensor"} if cls.takes_parts else ())

    def shape(self, before: ModelSettings) -> ModelSettings:
        """Return the shape that the run's model gets, if the one that `model.init` names has the shape `before`."""
        return before

    def initial(self, model: nn.Module, calibration: Calibration) -> nn.Module:  # noqa: ARG002 - the protocol
        """Return what becomes of the whole model with the weights that a new run begins with; it must have the shape that was said."""
        return model

    def moments(self, before: Moments) -> Moments:
        """Return what becomes of the moments of the weights that `initial` was given.

        Raises:
            ConfigError: the hook cuts weights, and cannot cut these.
        """
        if type(self).initial is not Hook.initial:
            raise ConfigError(
                "a hook cuts the weights to begin with, and not the optimizer's moments",
                hook=type(self).__name__,
                hint="Leave out `optim.init`, or give the hook a method `moments`.",
            )
        return before

    def model(self, model: nn.Module) -> nn.Module:
        """Replace or wrap modules of a model that was just built; return the model to train."""
        return model

    def start(self, run: RunState) -> None:
        """Remember parameters, and make all state that will ever be saved."""

    def loss(self, loss: Tensor, batch: MicroBatch, outputs: Tensor) -> Tensor:  # noqa: ARG002 - the protocol
        """Return the loss to go backward from: a mean over `batch`."""
        return loss

    def gradients(self, run: RunState) -> None:
        """Change the gradients, which are averaged over ranks and not yet clipped."""

    def updated(self, run: RunState) -> None:
        """Act after the parameters have moved; `run.step` counts the step that moved them."""

    def metrics(self) -> dict[str, float]:
        """Return numbers for the record of this step."""
        return {}

    def export(self, model: nn.Module) -> nn.Module:
        """Return the model that leaves training."""
        return model

    def state_dict(self) -> dict[str, Any]:
        """Return what a restore needs: tensors, numbers, strings, lists and maps of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` returned."""
        if state:
            raise ResumeError("this hook has no state", hook=type(self).__name__, keys=sorted(state))


class HookSet:
    """The hooks of a run, in order, as one thing to save and restore."""

    def __init__(self, hooks: Mapping[str, Hook]) -> None:
        self._named = dict(hooks)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each hook under its place and name."""
        return {name: state for name, hook in self._named.items() if (state := hook.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hand each hook its state.

        Raises:
            ResumeError: the hooks are not those that were saved.
        """
        wanted = set(self.state_dict())
        if set(state) != wanted:
            raise ResumeError("saved state is of other hooks", saved=sorted(state), configured=sorted(wanted))
        for name, value in state.items():
            self._named[name].load_state_dict(value)


def make_hooks(tables: Sequence[Mapping[str, Any]], *, where: str) -> dict[str, Hook]:
    """Return a hook for each `[[hooks]]` table, by place and name such as "0.prune".

    Raises:
        ConfigError: an unknown hook, or a setting that it does not know or that is out of range; or an order that cannot work.
        DependencyError: the module of a hook cannot be imported.
    """
    hooks: dict[str, Hook] = {}
    for place, table in enumerate(tables):
        kind = find_hook(table["use"])
        own = {key: value for key, value in table.items() if key != "use"}
        hooks[f"{place}.{table['use']}"] = kind(convert(kind.Settings, own, where=f"{where}, hooks[{place}]"))
    _refuse_disorder(hooks)
    return hooks


def leaving(hooks: Mapping[str, Hook]) -> list[Hook]:
    """Return `hooks` in the order in which a model passes through their `export`."""
    return sorted(hooks.values(), key=lambda hook: {"shape": 1, "bits": 2}.get(hook.changes, 0))


def _refuse_disorder(hooks: Mapping[str, Hook]) -> None:
    """Refuse an order in which a hook would undo what one before it has done, or find nothing to work on."""
    if sum(hook.changes == "bits" for hook in hooks.values()) > 1:
        raise ConfigError(
            "hooks can quantize once: the second one would find no layer to quantize",
            hooks=[*hooks],
            hint="Leave one of them out.",
        )
    last, most = "", 0
    for name, hook in hooks.items():
        change = _CHANGES.index(hook.changes)
        if change and change < most:
            raise ConfigError(
                "hooks are in an order that cannot work",
                first=last,
                then=name,
                hint="First what changes the shape (shrink), then weights (prune), then bits (quantize).",
            )
        if change >= most:
            last, most = name, change


def acting(hooks: Mapping[str, Hook]) -> dict[str, Hook]:
    """Return those of `hooks` that act while a model trains, rather than before its first step or behind its last one only."""
    points = ("model", "start", "loss", "gradients", "updated", "state_dict")
    return {
        name: hook
        for name, hook in hooks.items()
        if hook.takes_part(hook.settings)
        and any(getattr(type(hook), point) is not getattr(Hook, point) for point in points)
    }


def training_hooks(tables: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return the `[[hooks]]` tables that have a part in training, by the place and name that their state is saved under.

    Raises:
        ConfigError, DependencyError: as `make_hooks`.
    """
    hooks = make_hooks(tables, where="settings")
    named = zip(hooks.items(), tables, strict=True)
    return {name: table for (name, hook), table in named if hook.takes_part(hook.settings)}


def find_hook(name: str) -> type[Hook]:
    """Return the hook class called `name`: one of ours, an entry point in the group `datastore.hooks`, or `module:Class`.

    Raises:
        ConfigError, DependencyError: as `make_hooks`.
    """
    return find_class(name, base=Hook, ours=_OURS, group="datastore.hooks")


def numbers_of(hooks: Mapping[str, Hook], *, taken: Collection[str]) -> dict[str, float]:
    """Return the numbers of `hooks` for the record of a step, those in tensors and of NumPy as plain ones.

    Of two with the same name the later one gets its hook's place and name before it: "1.prune.sparsity".

    Raises:
        ConfigError: one of them is no single number, or has a name that is `taken`.
    """
    numbers: dict[str, float] = {}
    for place, hook in hooks.items():
        found = _numbers_of(hook)
        if lost := sorted(key for key in found if key in taken):
            raise ConfigError(
                "a hook calls its numbers what the loop calls its own",
                hook=place,
                names=lost,
                hint="Let its method `metrics` return them under other names.",
            )
        numbers |= {f"{place}.{key}" if key in numbers else key: value for key, value in found.items()}
    return numbers


def _numbers_of(hook: Hook) -> dict[str, float]:
    found = hook.metrics()
    try:
        return {key: value if type(value) in {int, float} else float(value) for key, value in found.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the metrics of a hook are not numbers by name: {error}",
            hook=type(hook).__name__,
            hint="Let its method `metrics` return a dict of texts to numbers, or of tensors with one element.",
        ) from error
