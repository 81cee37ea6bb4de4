"""Hooks of tests, named in their settings as `training_hooks:Kill`."""

import json
import math
import os
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from datastore.document import Document
from datastore.training.hooks.base import Hook, RunState
from datastore.training.objectives.base import MicroBatch
from datastore.training.objectives.language import Causal
from datastore.training.session.trackers import Tracker


class KillSettings(Document, frozen=True, kw_only=True):
    file: str
    """Steps at which to die, as JSON; each is taken out of the file before."""


class Kill(Hook):
    """Dies in the middle of a step: gradients are there, parameters have not moved yet."""

    Settings: ClassVar[type[Document]] = KillSettings
    takes_parts = True

    def __init__(self, settings: KillSettings) -> None:
        super().__init__(settings)
        self._file = Path(settings.file)

    @override
    def gradients(self, run: RunState) -> None:
        if run.rank or not self._file.exists():
            return
        steps = json.loads(self._file.read_text())
        if run.step in steps:
            self._file.write_text(json.dumps([step for step in steps if step != run.step]))
            os.kill(os.getpid(), signal.SIGKILL)


class DeadlySettings(Document, frozen=True, kw_only=True):
    step: int


class Deadly(Tracker):
    """Kills rank 0 while the others take the step after this one: for runs that take no hooks."""

    Settings: ClassVar[type[Document]] = DeadlySettings

    @override
    def log(self, step: int, record: Mapping[str, Any]) -> None:
        assert isinstance(self.settings, DeadlySettings)
        if step >= self.settings.step:
            os.kill(os.getpid(), signal.SIGKILL)


class HangSettings(Document, frozen=True, kw_only=True):
    step: int


class Hang(Hook):
    """Never comes back from a step."""

    Settings: ClassVar[type[Document]] = HangSettings

    @override
    def gradients(self, run: RunState) -> None:
        assert isinstance(self.settings, HangSettings)
        while run.step >= self.settings.step:
            threading.Event().wait(60)


class Average(Hook):
    """Exports the mean of the weights after all steps rather than the last ones."""

    @override
    def start(self, run: RunState) -> None:
        self.sum = {name: torch.zeros_like(weight) for name, weight in run.model.named_parameters()}
        self.steps = torch.zeros(())

    @override
    @torch.no_grad()
    def updated(self, run: RunState) -> None:
        self.steps += 1
        for name, weight in run.model.named_parameters():
            self.sum[name] += weight

    @override
    @torch.no_grad()
    def export(self, model: nn.Module) -> nn.Module:
        for name, weight in model.named_parameters():
            weight.copy_(self.sum[name] / self.steps)
        return model

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "steps": self.steps}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps.copy_(state["steps"])
        for name, value in state["sum"].items():
            self.sum[name].copy_(value)


class SpareSettings(Document, frozen=True, kw_only=True):
    used: bool = False


class Spare(Hook):
    """Adds a parameter that no layer uses; its own loss does if told so."""

    Settings: ClassVar[type[Document]] = SpareSettings

    @override
    def model(self, model: nn.Module) -> nn.Module:
        self.spare = model.spare = nn.Parameter(torch.ones(3))
        return model

    @override
    def loss(self, loss: Tensor, batch: MicroBatch, outputs: Tensor) -> Tensor:
        assert isinstance(self.settings, SpareSettings)
        return loss + self.spare.square().mean() if self.settings.used else loss


class TameSettings(Document, frozen=True, kw_only=True):
    until: int


class Tame(Hook):
    """Makes the first steps of a huge learning rate harmless."""

    Settings: ClassVar[type[Document]] = TameSettings

    @override
    def gradients(self, run: RunState) -> None:
        assert isinstance(self.settings, TameSettings)
        if run.step < self.settings.until:
            for parameter in run.model.parameters():
                assert parameter.grad is not None
                parameter.grad.mul_(1e-38)


class BlindInValidation(Causal):
    """Has no loss where nothing is trained."""

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        found = super().loss(outputs, batch)
        return found if torch.is_grad_enabled() else found * math.nan


class Noise(Hook):
    """Draws random numbers in every step, as dropout does."""

    @override
    def loss(self, loss: Tensor, batch: MicroBatch, outputs: Tensor) -> Tensor:
        return loss * (1 + 0.1 * torch.rand(()))


class ScaledSettings(Document, frozen=True, kw_only=True):
    by: float


class Scaled(Causal):
    """The causal loss times a number: an objective of one's own."""

    Settings: ClassVar[type[Document]] = ScaledSettings

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        assert isinstance(self.settings, ScaledSettings)
        return self.settings.by * super().loss(outputs, batch)


class BreakSettings(Document, frozen=True, kw_only=True):
    step: int
    value: str
    momentum: bool = False
    """Break the state of the optimizer rather than a weight."""


class Break(Hook):
    """Sets one number to `value` in the update of one step, whose own loss is fine."""

    Settings: ClassVar[type[Document]] = BreakSettings

    @override
    @torch.no_grad()
    def updated(self, run: RunState) -> None:
        assert isinstance(self.settings, BreakSettings)
        if run.step == self.settings.step:
            weight = next(run.model.parameters())
            broken = run.optimizer.state[weight]["exp_avg"] if self.settings.momentum else weight
            broken.view(-1)[0] = float(self.settings.value)


class PoisonSettings(Document, frozen=True, kw_only=True):
    steps: list[int]
    by: str = "nan"


class Poison(Hook):
    """Multiplies the gradient of some steps."""

    Settings: ClassVar[type[Document]] = PoisonSettings
    takes_parts = True

    @override
    def gradients(self, run: RunState) -> None:
        assert isinstance(self.settings, PoisonSettings)
        if run.step + 1 in self.settings.steps:
            for parameter in run.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(float(self.settings.by))


class TellMomentsSettings(Document, frozen=True, kw_only=True):
    file: str


class TellMoments(Hook):
    """Writes what the optimizer begins with to a file, by parameter."""

    Settings: ClassVar[type[Document]] = TellMomentsSettings
    takes_parts = True

    @override
    def start(self, run: RunState) -> None:
        assert isinstance(self.settings, TellMomentsSettings)
        found = {name: dict(run.optimizer.state[one]) for name, one in run.model.named_parameters()}
        torch.save(found, self.settings.file)


class Largest(Hook):
    """Remembers how large the first weights are: it looks at numbers when it starts."""

    @override
    def start(self, run: RunState) -> None:
        self.largest = max(float(one.abs().max()) for one in run.model.parameters())
