"""A lesson: what a rank learns from some rows: the outputs of the model and their loss, as objective and hooks say, in the precision of the run."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook
from datastore.training.models.float8 import FLOAT8
from datastore.training.objectives.base import MicroBatch, Objective
from datastore.training.run.profile import part

__all__ = ["Lesson", "Piece", "autocast", "filled"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16} | dict.fromkeys(FLOAT8, torch.bfloat16)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which matrices are multiplied in "bf16", "fp16" or "fp32"; with fp8, those that are not in fp8, in bf16."""
    return torch.autocast(device.type, dtype=_DTYPES.get(precision, torch.bfloat16), enabled=precision in _DTYPES)


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of this rank's share of a batch."""

    rows: MicroBatch
    share: Tensor | float
    """How much their mean loss counts in that of the global batch; 0 for rows that only keep the ranks in step."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """Objective, hooks and precision; the hooks' terms are part of the loss."""

    objective: Objective
    hooks: Mapping[str, Hook]
    device: torch.device
    precision: str
    scale: float = 1.0
    """By what the loss is multiplied before it goes backward."""

    def outputs(self, model: nn.Module, rows: MicroBatch) -> Tensor:
        """Return what the objective makes of `rows`."""
        with part("forward"), autocast(self.device, self.precision):
            return self.objective.outputs(model, rows)

    def loss(self, outputs: Tensor, rows: MicroBatch) -> Tensor:
        """Return the mean loss over the targets of `rows` that count.

        Raises:
            ConfigError: what the objective or a hook returns is no tensor of one number.
        """
        with part("forward"), autocast(self.device, self.precision):
            loss = _one_number(self.objective.loss(outputs, rows), self.objective)
            for hook in self.hooks.values():
                loss = _one_number(hook.loss(loss, rows, outputs), hook)
        return loss

    def of(self, model: nn.Module, rows: MicroBatch) -> Tensor:
        """Return the loss of `model` on `rows`."""
        return self.loss(self.outputs(model, rows), rows)


def _one_number(loss: object, source: object) -> Tensor:
    """Return the loss that `source` made; refuse what a class of the user's own may return instead."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    raise ConfigError(
        "a loss must be a tensor with one number",
        of=type(source).__name__,
        found=f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__,
        hint="Let its method `loss` return the mean over the targets that count, as a tensor that leads back to the model.",
    )


def filled(rows: MicroBatch, count: int) -> MicroBatch:
    """Return `rows` and as many more that count nothing as make `count`."""
    more = count - len(rows.tokens)
    if more <= 0:
        return rows
    mask = torch.ones_like(rows.tokens, dtype=torch.bool) if rows.loss_mask is None else rows.loss_mask
    shape = (more, rows.tokens.shape[1])
    return MicroBatch(torch.cat((rows.tokens, rows.tokens.new_zeros(shape))), torch.cat((mask, mask.new_zeros(shape))))
