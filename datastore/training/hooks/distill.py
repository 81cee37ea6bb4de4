"""Distillation: the student learns what a trained model expects, beside what the text says.

    loss = (1 - alpha) x loss of the objective + alpha x temperature^2 x KL(teacher || student) + hidden x distance of final states

The teacher is a run or a folder, whole on every rank, or what `datastore teach` has written beside the tokens: the likeliest tokens, and
one probability for all others together. It has no part in checkpoints: they hold the digest of its weights, and a resume with another
teacher is refused. Tokens that do not count for the objective do not count here.

Source: G. Hinton et al., arXiv:1503.02531 (logits and temperature); V. Sanh et al., "DistilBERT", arXiv:1910.01108 (final states).
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.digest import digest_hex
from datastore.document import Document, SettingsDocument
from datastore.errors import ConfigError, ResumeError
from datastore.training.hooks.base import Hook, RunState
from datastore.training.hooks.parts import whole
from datastore.training.models.huggingface import logits_of
from datastore.training.objectives.base import MicroBatch
from datastore.training.objectives.language import Causal

__all__ = ["Distill", "DistillSettings", "divergence", "divergence_of_likeliest"]

COLUMNS = ("teacher_tokens", "teacher_logprobs")
"""What `datastore teach` writes."""

_LEAST = 1e-6
"""Probability of all other tokens together, at the least."""


class DistillSettings(SettingsDocument, frozen=True, kw_only=True):
    """Who teaches, and how much that counts."""

    teacher: str = ""
    """A run (`RUN`, `RUN@STEP`) or a Hugging Face folder with the same tokenizer. Empty: the columns that `datastore teach` wrote, which
    `loader.columns` must name."""

    alpha: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5
    """Share of the teacher in the loss."""

    temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Logits of both are divided by it: above 1 unlikely tokens count more. With columns: 1."""

    hidden: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Weight of the squared distance between the final states of both, relative to the size of the teacher's; their widths must agree."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.teacher and (self.temperature != 1 or self.hidden):
            raise ValueError(
                "columns hold probabilities of some tokens: they need temperature 1, and have no hidden states"
            )


def divergence(student_BTV: Tensor, teacher_BTV: Tensor, *, temperature: float) -> Tensor:
    """Return KL(teacher || student) of each token, [B, T], times the square of the temperature."""
    expected = functional.log_softmax(teacher_BTV.float() / temperature, dim=-1)
    found = functional.log_softmax(student_BTV.float() / temperature, dim=-1)
    return (expected.exp() * (expected - found)).sum(dim=-1) * temperature**2


def divergence_of_likeliest(student_BTV: Tensor, tokens_BTK: Tensor, logprobs_BTK: Tensor) -> Tensor:
    """Return KL(teacher || student) of each token, [B, T], where the teacher names some tokens, and all others are one event."""
    found = functional.log_softmax(student_BTV.float(), dim=-1).gather(-1, tokens_BTK.long())
    named = logprobs_BTK.float()
    rest = (1.0 - named.exp().sum(dim=-1)).clamp(min=_LEAST)
    found_rest = (1.0 - found.exp().sum(dim=-1)).clamp(min=_LEAST)
    return (named.exp() * (named - found)).sum(dim=-1) + rest * (rest.log() - found_rest.log())


class Distill(Hook):
    """Holds a frozen teacher, or none if it is in the data."""

    Settings: ClassVar[type[Document]] = DistillSettings
    takes_parts: ClassVar[bool] = True  # Not slices: a teacher reads whole sequences.

    def __init__(self, settings: DistillSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._teacher: nn.Module | None = None
        self._states: dict[str, Tensor] = {}
        self._last: dict[str, float | Tensor] = {}

    @override
    def start(self, run: RunState) -> None:
        if run.calibration is None:
            return  # A model that leaves training needs no teacher.
        objective = run.calibration.objective
        if not isinstance(objective, Causal):
            raise ConfigError(
                "only a model that predicts the next token can be taught",
                objective=type(objective).__name__,
                hint='Use the objective "causal" or "chat".',
            )
        if not self._settings.teacher:
            if not set(COLUMNS) <= set(run.calibration.read(1).more):
                raise ConfigError(
                    "there is no teacher",
                    hint=f"Set `teacher` of the hook, or loader.columns = {list(COLUMNS)} if the data have been taught.",
                )
            return
        assert run.open_model is not None
        self._teacher = run.open_model(self._settings.teacher).eval().requires_grad_(requires_grad=False).to(run.device)
        if self._settings.hidden:
            self._watch("student", run.model)
            self._watch("teacher", self._teacher)

    def _watch(self, who: str, model: nn.Module) -> None:
        """Keep the final state of each token whenever `model` reads something."""
        norm = dict(model.named_modules()).get("model.norm")
        if norm is None:
            raise ConfigError(
                "the final states of this model are not known",
                model=type(model).__name__,
                hint="Set hidden = 0: only Llama and our GPT have them at model.norm.",
            )

        def keep(_module: nn.Module, _inputs: object, state: Tensor) -> None:
            self._states[who] = whole(state)

        norm.register_forward_hook(keep)

    @override
    def loss(self, loss: Tensor, batch: MicroBatch, outputs: Tensor) -> Tensor:
        learned = None if batch.loss_mask is None else batch.loss_mask[:, 1:]
        if self._teacher is not None:
            with torch.no_grad():
                expected = logits_of(self._teacher, batch.inputs)
            if expected.shape != outputs.shape:
                raise ConfigError(
                    "the teacher has another vocabulary",
                    teacher=expected.shape[-1],
                    student=outputs.shape[-1],
                    hint="Name a model that was trained on the same tokens.",
                )
            each = divergence(outputs, expected, temperature=self._settings.temperature)
        elif COLUMNS[0] in batch.more:
            tokens, logprobs = (batch.more[name][:, :-1] for name in COLUMNS)
            each = divergence_of_likeliest(outputs, tokens, logprobs)
        else:
            return loss  # Rows of zeros, with which the loop tries the model.
        taught = _mean(each, learned)
        total = (1 - self._settings.alpha) * loss + self._settings.alpha * taught
        self._last = {"distill_kl": taught.detach()}
        if self._settings.hidden:
            total = total + self._settings.hidden * self._distance(learned)
        return total

    def _distance(self, learned: Tensor | None) -> Tensor:
        student, teacher = self._states["student"].float(), self._states["teacher"].float()
        if student.shape != teacher.shape:
            raise ConfigError(
                "the final states of teacher and student have other widths",
                teacher=teacher.shape[-1],
                student=student.shape[-1],
                hint="Set hidden = 0.",
            )
        return _mean((student - teacher).square().mean(dim=-1) / teacher.square().mean(), learned)

    @cached_property
    def _digest(self) -> str:
        return _digest_of(self._teacher)

    @override
    def metrics(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._last.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self._digest} if self._settings.teacher else {}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._teacher is not None and state["teacher"] != self._digest:
            raise ResumeError(
                "the teacher is another one than when this step was saved",
                teacher=self._settings.teacher,
                hint="Put it back. Of a run that goes on name a step from the start: RUN@STEP.",
            )


def _digest_of(model: nn.Module | None) -> str:
    """Return the digest of the weights; "" if there is no model."""
    if model is None:
        return ""
    tensors = [one.detach().cpu().contiguous().view(-1) for _, one in sorted(model.state_dict().items())]
    return digest_hex(*(one.view(torch.uint8).numpy().data for one in tensors))


def _mean(each_BT: Tensor, learned_BT: Tensor | None) -> Tensor:
    if learned_BT is None:
        return each_BT.mean()
    return (each_BT * learned_BT).sum() / learned_BT.sum().clamp(min=1)
