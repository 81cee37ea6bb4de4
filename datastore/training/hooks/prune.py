"""Pruning: the weights that matter least become zero and stay zero.

The fraction of zeros grows along a cubic from `start` to `stop` and then stands still while the rest recovers, or all of it
comes at once; or some weights are swapped for others from time to time. A resume may change the number of steps, and with it
`stop`: the zeros that are there stay, and what the new `stop` is behind with is made up for at once.

Masks are tensors of this hook, with the placement of their parameters. They lie over gradients in every step, and over weights and
moments of the optimizer when they change: what has no gradient and no moment does not move. No parametrization, so names,
checkpoints and `torch.compile` do not change. The count that is kept is exact.

    magnitude   |w|                          wanda         |w| x |inputs|
    movement    - sum of w x gradient        reconstruct   as wanda, in stages; what is left makes up for what goes: `surgeon.py`

Source: M. Zhu and S. Gupta, arXiv:1710.01878 (the cubic); M. Sun et al., arXiv:2306.11695 (Wanda); V. Sanh et al.,
arXiv:2005.07683 (movement); U. Evci et al., arXiv:1911.11134 (RigL, `regrow`).
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import torch
from torch import Tensor, nn
from typing_extensions import override

from datastore.document import Document, Positive, SettingsDocument
from datastore.errors import ConfigError, ResumeError
from datastore.training.hooks.base import Hook, RunState
from datastore.training.hooks.calibration import grams, square_sums
from datastore.training.hooks.masks import (
    cheapest_groups,
    keep_everywhere,
    keep_largest,
    keep_two_of_four,
    kept_of,
    swapped,
)
from datastore.training.hooks.parts import agreed, local, matrices_of, moments_of, overwrite, whole
from datastore.training.hooks.surgeon import prune_fours, prune_to

__all__ = ["Prune", "PruneSettings", "ratio_at"]

_MOVEMENT = ".movement"
"""Behind the name of a matrix: the scores of its weights in the state."""


class PruneSettings(SettingsDocument, frozen=True, kw_only=True):
    """How much is pruned, when, and where."""

    ratio: Annotated[float, msgspec.Meta(ge=1)] = 2.0
    """Compression ratio F at the end: of N weights, N / F are kept."""

    start: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Step from which on weights are pruned."""

    stop: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Step at which the final ratio is reached, the last one at the latest; 0: after 3/4 of all steps."""

    every: Positive = 10
    """Steps between new masks."""

    parameters: tuple[str, ...] = ("*_proj.weight",)
    """Patterns of the names of the matrices to prune."""

    method: Literal["magnitude", "wanda", "reconstruct", "movement"] = "magnitude"
    """By what weights are chosen: their size; size times that of their inputs; the same in stages, after each of which the rest of the
    layer makes up for what is gone (the aim of SparseGPT); or whether training moves them away from zero."""

    pattern: Literal["unstructured", "2:4"] = "unstructured"
    """Where zeros may be: anywhere, or two in each group of four columns, which some GPUs multiply faster; then `ratio` is 2."""

    scope: Literal["layer", "global"] = "layer"
    """Whether each matrix keeps N / F of its own weights, or all of them together."""

    schedule: Literal["cubic", "once", "regrow"] = "cubic"
    """cubic: step by step from `start` to `stop`. once: in the step after `start`. regrow: the same, and every `every` steps until `stop`
    some weights are swapped for those with the largest gradients."""

    swap: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.3
    """Of regrow: the part of the weights that is swapped at first; it falls to nothing along half a cosine."""

    samples: Positive = 128
    """Of wanda and reconstruct: samples of the training data on which inputs are measured, anew for every mask."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern == "2:4" and (self.ratio != 2 or self.scope == "global" or self.schedule == "regrow"):
            raise ValueError(
                'pattern "2:4" keeps half of each layer: ratio 2, scope "layer", schedule "cubic" or "once"'
            )
        if self.method == "reconstruct" and (self.scope == "global" or self.schedule == "regrow"):
            raise ValueError('method "reconstruct" works layer by layer: scope "layer", schedule "cubic" or "once"')
        if self.method == "movement" and (self.schedule == "regrow" or (self.schedule == "once" and not self.start)):
            raise ValueError(
                'method "movement" needs steps to see weights move: schedule "cubic", or "once" with a start'
            )


def ratio_at(step: int, *, start: int, stop: int, ratio: float) -> float:
    """Return the compression ratio after `step` steps: 1 until `start`, `ratio` from `stop` on, a cubic in sparsity between."""
    if step >= stop:
        return ratio
    left = min(1.0, (stop - step) / (stop - start))
    return 1.0 / (1.0 - (1.0 - 1.0 / ratio) * (1.0 - left**3))


class Prune(Hook):
    """Keeps a mask for each matrix. Invariant: after `updated`, weights and moments are zero where the mask is False."""

    Settings: ClassVar[type[Document]] = PruneSettings
    changes: ClassVar[Any] = "weights"

    def __init__(self, settings: PruneSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._masks: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._movement: dict[str, Tensor] = {}
        self._linears: dict[str, nn.Linear] = {}
        self._grown: dict[str, Tensor] = {}
        self._stop = settings.stop
        self._kept: dict[str, int] = {}

    @classmethod
    @override
    def layouts(cls, settings: Document) -> frozenset[str]:
        assert isinstance(settings, PruneSettings)
        measures = settings.method in {"wanda", "reconstruct"}  # What layers read of whole sequences.
        return frozenset({"shard", "tensor"} if measures else {"shard", "tensor", "context"})

    @override
    def start(self, run: RunState) -> None:
        settings = self._settings
        self._parameters = matrices_of(run.model, settings.parameters)
        self._masks = {name: torch.ones_like(one, dtype=torch.bool) for name, one in self._parameters.items()}
        if settings.method == "movement":
            self._movement = {name: torch.zeros_like(one) for name, one in self._parameters.items()}
        # The last step at the latest, and a step after `start` at the least, if there is one.
        planned = settings.stop or max(run.steps * 3 // 4, settings.start + 1)
        self._stop = min(planned, run.steps)
        self._kept = {name: mask.numel() for name, mask in self._masks.items()}
        if not self._parameters:
            raise ConfigError("no matrix to prune", parameters=list(settings.parameters), hint="Correct the patterns.")
        self._refuse_folded(run.model)
        if settings.start >= self._stop:
            raise ConfigError("pruning stops before it starts", start=settings.start, stop=self._stop)
        if settings.pattern == "2:4":
            self._require_fours(run.model)
        if settings.method in {"wanda", "reconstruct"}:
            self._linears = self._layers(run.model)
            if run.calibration is not None:
                run.calibration.require(settings.samples)

    def _require_fours(self, model: nn.Module) -> None:
        chosen = {id(one): name for name, one in self._parameters.items()}
        turned = [
            chosen[id(one.weight)]
            for one in model.modules()
            if type(one).__name__ == "Conv1D" and id(one.weight) in chosen  # Of transformers: [in, out].
        ]
        if turned:
            raise ConfigError(
                "2:4 keeps two of four inputs, and the columns of these layers are outputs",
                layers=turned[:8],
                hint='Leave them out of `parameters`, or use pattern = "unstructured".',
            )
        odd = {name: one.shape[1] for name, one in self._parameters.items() if one.shape[1] % 4}
        if odd:
            raise ConfigError(
                "the columns of a matrix are no multiple of 4", columns=odd, hint="Leave it out of `parameters`."
            )

    def _refuse_folded(self, model: nn.Module) -> None:
        """Refuse matrices to which something is added when the model leaves training: their zeros would be filled in again."""
        chosen = {id(one) for one in self._parameters.values()}
        folded = [
            name
            for name, module in model.named_modules()
            if hasattr(module, "folded") and any(id(one) in chosen for one in module.parameters(recurse=False))
        ]
        if folded:
            raise ConfigError(
                "zeros in these layers would be filled in when the model is exported",
                layers=folded[:8],
                hint="Leave them out of `parameters`, or leave out the hook that adds to them, such as `share`.",
            )

    def _layers(self, model: nn.Module) -> dict[str, nn.Linear]:
        """Return the linear layer of each matrix, whose inputs can be measured."""
        found = {id(one.weight): one for one in model.modules() if isinstance(one, nn.Linear)}
        without = [name for name, one in self._parameters.items() if id(one) not in found]
        if without:
            raise ConfigError(
                "these matrices are no linear layers, so they have no inputs to measure",
                parameters=without[:8],
                method=self._settings.method,
                hint='Correct `parameters`, or use method = "magnitude".',
            )
        return {name: found[id(one)] for name, one in self._parameters.items()}

    @override
    @torch.no_grad()
    def gradients(self, run: RunState) -> None:
        swapping = self._settings.schedule == "regrow" and self._swaps(run.step + 1)
        grads, masks = [], []
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                continue
            grad = local(parameter.grad)
            if name in self._movement:
                moved = torch.nan_to_num(local(parameter) * grad, nan=0.0, posinf=0.0, neginf=0.0)
                local(self._movement[name]).sub_(moved)
            if swapping:
                self._grown[name] = torch.nan_to_num(whole(parameter.grad).clone())
            grads.append(grad)
            masks.append(local(self._masks[name]))
        if grads:
            torch._foreach_mul_(grads, masks)

    @override
    @torch.no_grad()
    def updated(self, run: RunState) -> None:
        if self._swaps(run.step) and self._grown:
            fraction = self._settings.swap * 0.5 * (1 + math.cos(math.pi * self._progress(run.step)))
            measured = self._measured(run)
            for name, wanted in self._grown.items():
                mask, score = whole(self._masks[name]), self._score(name, measured)
                self._mask(run, name, swapped(mask, scores=score, wanted=wanted, fraction=fraction))
            self._grown = {}
        ratio = self._ratio(run.step)
        if self._due(run.step) and any(self._goal(name, ratio) < kept for name, kept in self._kept.items()):
            self._prune(run, ratio)

    def _progress(self, step: int) -> float:
        return (step - self._settings.start) / (self._stop - self._settings.start)

    def _swaps(self, step: int) -> bool:
        """Whether weights are swapped after `step` steps."""
        start, stop = self._settings.start, self._stop
        regrow = self._settings.schedule == "regrow"
        return regrow and start + 1 < step < stop and (step - start) % self._settings.every == 0

    def _ratio(self, step: int) -> float:
        start = self._settings.start
        stop = self._stop if self._settings.schedule == "cubic" else start + 1
        return ratio_at(step, start=start, stop=stop, ratio=self._settings.ratio)

    def _due(self, step: int) -> bool:
        """Whether masks may change after `step` steps: at those that are planned, and afterwards if something is behind."""
        start = self._settings.start
        if self._settings.schedule != "cubic" or step >= self._stop:
            return step > start
        return step > start and (step - start) % self._settings.every == 0

    def _goal(self, name: str, ratio: float) -> int:
        """Return how many weights of a matrix, or of all if `scope` is global, may be left; never more than are."""
        size = self._parameters[name].numel()
        if self._settings.scope == "global":
            sizes, kept = sum(one.numel() for one in self._parameters.values()), sum(self._kept.values())
            return self._kept[name] - max(0, kept - kept_of(sizes, ratio))
        if self._settings.pattern == "2:4":
            return size - 2 * _groups(size, ratio)
        return kept_of(size, ratio)

    def _prune(self, run: RunState, ratio: float) -> None:
        """Give every matrix the mask of a compression ratio; what is gone stays gone. One matrix at a time is whole, unless `scope` is global."""
        settings = self._settings
        measured = self._measured(run)
        if settings.scope == "global":
            scores = {name: self._score(name, measured) for name in self._masks}
            alive = {name: whole(mask) for name, mask in self._masks.items()}
            kept = min(sum(self._kept.values()), kept_of(sum(one.numel() for one in scores.values()), ratio))
            for name, mask in keep_everywhere(scores, kept, alive=alive).items():
                self._mask(run, name, mask)
            return
        for name, parameter in self._parameters.items():
            living = whole(self._masks[name])
            if settings.method == "reconstruct":
                weight, mask = self._operated(whole(parameter), measured[name], ratio, living)
                overwrite(parameter, agreed(weight))
            else:
                mask = self._chosen(self._score(name, measured), ratio, living)
            self._mask(run, name, mask)

    def _chosen(self, scores: Tensor, ratio: float, alive: Tensor) -> Tensor:
        if self._settings.pattern == "2:4":
            chosen = cheapest_groups(scores, _groups(scores.numel(), ratio), alive=alive)
            return keep_two_of_four(scores, chosen, alive=alive)
        return keep_largest(scores, min(int(alive.sum()), kept_of(scores.numel(), ratio)), alive=alive)

    def _operated(self, weight: Tensor, product: Tensor, ratio: float, alive: Tensor) -> tuple[Tensor, Tensor]:
        if self._settings.pattern == "2:4":
            return prune_fours(weight, product, _groups(weight.numel(), ratio), alive=alive)
        kept = min(int(alive.sum()), kept_of(weight.numel(), ratio))
        return prune_to(weight, product, kept, alive=alive)

    def _measured(self, run: RunState) -> dict[str, Tensor]:
        """Return what the method needs to know of the inputs of each matrix; nothing if it looks at weights only."""
        if not self._linears:
            return {}
        assert run.calibration is not None
        measure = grams if self._settings.method == "reconstruct" else square_sums
        return measure(run.model, self._linears, run.calibration, count=self._settings.samples)

    def _score(self, name: str, measured: Mapping[str, Tensor]) -> Tensor:
        """Return how much each weight of a matrix matters, all of them on every rank."""
        if self._settings.method == "movement":
            return whole(self._movement[name])
        size = whole(self._parameters[name].detach()).abs()
        return size * measured[name].sqrt() if name in measured else size

    def _mask(self, run: RunState, name: str, mask: Tensor) -> None:
        """Make `mask`, as rank 0 has it, that of a matrix, its weights and its moments."""
        mask = agreed(mask)
        self._kept[name] = int(mask.sum())
        parameter = self._parameters[name]
        overwrite(self._masks[name], mask)
        mine = local(self._masks[name])
        for tensor in (parameter, *moments_of(run.optimizer, parameter)):
            local(tensor).mul_(mine)

    @override
    def metrics(self) -> dict[str, float]:
        return {"sparsity": 1.0 - sum(self._kept.values()) / sum(mask.numel() for mask in self._masks.values())}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**self._masks, **{f"{name}{_MOVEMENT}": one for name, one in self._movement.items()}}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        own = self.state_dict()
        if set(state) != set(own):
            raise ResumeError(
                "masks are of other matrices",
                differ=sorted(set(state) ^ set(own)),
                hint="Resume with the same model and hooks.",
            )
        for name, tensor in state.items():
            own[name].copy_(tensor)
        self._kept = {name: int(whole(mask).sum()) for name, mask in self._masks.items()}


def _groups(size: int, ratio: float) -> int:
    """Return how many groups of four lose two weights, so that `size` weights are compressed by `ratio`."""
    return round(size / 4 * 2 * (1 - 1 / ratio))
