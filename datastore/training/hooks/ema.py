"""A moving average of the weights, which is exported in their place.

After step t the average is d x average + (1 - d) x weights, where d is `decay`, or (1 + t) / (10 + t) while that is less: the first
weights are soon forgotten. Where a weight is exactly zero its average is, too: so what is pruned by a hook before this one is
pruned in the average, and the exact count holds.

Source: B. Polyak and A. Juditsky, 1992 (averaging); M. Abadi et al., TensorFlow, `ExponentialMovingAverage` (the first steps).
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn
from typing_extensions import override

from datastore.document import Document, Positive, SettingsDocument
from datastore.errors import ResumeError
from datastore.training.hooks.base import Hook, RunState
from datastore.training.hooks.parts import local

__all__ = ["Ema", "EmaSettings"]


class EmaSettings(SettingsDocument, frozen=True, kw_only=True):
    """How slowly the average forgets."""

    decay: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.999
    """What is left of it after a step."""

    every: Positive = 1
    """Steps between two times that weights are taken in; `decay` is for each."""


class Ema(Hook):
    """Keeps the average of each trainable parameter, laid out as it is; tied ones once."""

    Settings: ClassVar[type[Document]] = EmaSettings
    changes: ClassVar[Any] = "weights"

    def __init__(self, settings: EmaSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._means: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}

    @classmethod
    @override
    def layouts(cls, settings: Document) -> frozenset[str]:
        return frozenset({"shard", "tensor", "context"})

    @override
    def start(self, run: RunState) -> None:
        self._parameters = {name: one for name, one in run.model.named_parameters() if one.requires_grad}
        self._means = {name: one.detach().clone() for name, one in self._parameters.items()}

    @override
    @torch.no_grad()
    def updated(self, run: RunState) -> None:
        if run.step % self._settings.every:
            return
        taken = run.step // self._settings.every
        decay = min(self._settings.decay, (1 + taken) / (10 + taken))
        means = [local(one) for one in self._means.values()]
        weights = [local(one) for one in self._parameters.values()]
        torch._foreach_lerp_(means, weights, 1 - decay)

    @override
    @torch.no_grad()
    def export(self, model: nn.Module) -> nn.Module:
        for name, parameter in self._parameters.items():
            mean, weight = local(self._means[name]), local(parameter)
            weight.copy_(torch.where(weight == 0, 0.0, mean))
        return model

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._means)

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != set(self._means):
            raise ResumeError(
                "averages are of other parameters",
                differ=sorted(set(state) ^ set(self._means))[:8],
                hint="Resume with the same model and hooks.",
            )
        for name, value in state.items():
            self._means[name].copy_(value)
