"""Magnitude pruning: the smallest weights become zero and stay zero.

The fraction of zeros grows along a cubic from `start` to `stop` and then stands still while the rest recovers. A resume may
change the number of steps, and with it `stop`: the zeros that are there stay, and what the new `stop` is behind with is made
up for at once. Masks are
tensors of this hook, laid over the weights and both moments of the optimizer after each step: no parametrization, so names,
checkpoints and `torch.compile` do not change. The count that is kept is exact: with a threshold, equal weights would all
stay or all go.

Source: M. Zhu and S. Gupta, "To prune, or not to prune", arXiv:1710.01878 (the cubic schedule).
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor
from typing_extensions import override

from datastore.document import Document, SettingsDocument
from datastore.errors import ConfigError, ResumeError
from datastore.training.hooks.base import Hook, RunState

__all__ = ["Prune", "PruneSettings", "keep_mask", "ratio_at"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class PruneSettings(SettingsDocument, frozen=True, kw_only=True):
    """How much is pruned, when, and where."""

    ratio: Annotated[float, msgspec.Meta(ge=1)] = 2.0
    """Compression ratio F at the end: of N weights, N / F are kept."""

    start: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Step from which on weights are pruned."""

    stop: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Step at which the final ratio is reached, the last one at the latest; 0: after 3/4 of all steps."""

    every: Annotated[int, msgspec.Meta(gt=0)] = 10
    """Steps between new masks."""

    parameters: tuple[str, ...] = ("*_proj.weight",)
    """Patterns of the names of the matrices to prune."""


def keep_mask(weights: Tensor, ratio: float) -> Tensor:
    """Return where to keep `weights`: exactly round(N / ratio) of N places are True, those of the largest magnitude.

    Among equal magnitudes the first in memory order are kept. O(N log N).
    """
    kept = round(weights.numel() / ratio)
    order = torch.argsort(weights.detach().abs().flatten(), descending=True, stable=True)
    mask = torch.zeros(weights.numel(), dtype=torch.bool, device=weights.device)
    mask[order[:kept]] = True
    return mask.view(weights.shape)


def ratio_at(step: int, *, start: int, stop: int, ratio: float) -> float:
    """Return the compression ratio after `step` steps: 1 until `start`, `ratio` from `stop` on, a cubic in sparsity between."""
    if step >= stop:
        return ratio
    left = min(1.0, (stop - step) / (stop - start))
    return 1.0 / (1.0 - (1.0 - 1.0 / ratio) * (1.0 - left**3))


class Prune(Hook):
    """Keeps a mask for each matrix. Invariant: after `updated`, weights and moments are zero where the mask is False."""

    Settings: ClassVar[type[Document]] = PruneSettings

    def __init__(self, settings: PruneSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._masks: dict[str, Tensor] = {}
        self._parameters: dict[str, torch.nn.Parameter] = {}
        self._stop = settings.stop
        self._kept: dict[str, int] = {}
        self._sparsity = 0.0

    @override
    def start(self, run: RunState) -> None:
        patterns = self._settings.parameters
        for name, parameter in run.model.named_parameters():
            if parameter.dim() == 2 and any(fnmatchcase(name, pattern) for pattern in patterns):
                self._parameters[name] = parameter
                self._masks[name] = torch.ones_like(parameter, dtype=torch.bool)
        # The last step at the latest, and a step after `start` at the least, if there is one.
        planned = self._settings.stop or max(run.steps * 3 // 4, self._settings.start + 1)
        self._stop = min(planned, run.steps)
        self._kept = {name: mask.numel() for name, mask in self._masks.items()}
        if not self._parameters:
            raise ConfigError("no matrix to prune", parameters=list(patterns), hint="Correct the patterns.")
        if self._settings.start >= self._stop:
            raise ConfigError("pruning stops before it starts", start=self._settings.start, stop=self._stop)

    @override
    def gradients(self, run: RunState) -> None:
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                parameter.grad.mul_(self._masks[name])

    @override
    @torch.no_grad()
    def updated(self, run: RunState) -> None:
        start, stop = self._settings.start, self._stop
        ratio = ratio_at(run.step, start=start, stop=stop, ratio=self._settings.ratio)
        planned = start < run.step <= stop and ((run.step - start) % self._settings.every == 0 or run.step == stop)
        if planned or (run.step > stop and self._behind(ratio)):
            for name, parameter in self._parameters.items():
                reached = parameter.numel() / max(1, self._kept[name])
                self._masks[name].copy_(keep_mask(parameter, max(ratio, reached)))
            self._count()
        for name, parameter in self._parameters.items():
            parameter.mul_(self._masks[name])
            moments = run.optimizer.state.get(parameter, {})
            for key in _MOMENTS:
                if moments.get(key) is not None:
                    moments[key].mul_(self._masks[name])

    @override
    def metrics(self) -> dict[str, float]:
        return {"sparsity": self._sparsity}

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._masks)

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self._masks):
            differ = sorted(set(state) ^ set(self._masks))
            raise ResumeError(
                "masks are of other matrices", differ=differ, hint="Resume with the same model and hooks."
            )
        for name, mask in state.items():
            self._masks[name].copy_(mask)
        self._count()

    def _count(self) -> None:
        self._kept = {name: int(mask.sum()) for name, mask in self._masks.items()}
        self._sparsity = 1.0 - sum(self._kept.values()) / sum(mask.numel() for mask in self._masks.values())

    def _behind(self, ratio: float) -> bool:
        """Whether some matrix keeps more than `ratio` leaves it."""
        return any(kept > round(self._masks[name].numel() / ratio) for name, kept in self._kept.items())
