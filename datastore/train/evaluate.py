"""The validation loss: the mean over all targets of the same samples each time, whoever computes it.

Each rank takes a part of them; sums are added in float64, so the number of ranks does not show in six digits.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from datastore.document import Document
from datastore.train.objectives import Causal, MicroBatch
from datastore.train.parallel import Ranks

__all__ = ["Evaluation", "ValidationSamples", "autocast", "validation_loss"]


class Evaluation(Document, frozen=True, kw_only=True):
    """How well a model predicts held-out tokens."""

    loss: float
    """Nats per token."""

    samples: int
    tokens: int
    """Targets that were predicted."""

    @property
    def perplexity(self) -> float:
        """E to the loss."""
        return math.exp(self.loss)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which matrices are multiplied in "bf16" or "fp32"."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@dataclass(frozen=True, slots=True)
class ValidationSamples:
    """What is validated on, and this rank's part of it."""

    mine: npt.NDArray[Any]
    """[E, seq_len + 1]; a rank may have none."""

    count: int
    """Samples of all ranks."""


@torch.no_grad()
def validation_loss(
    model: nn.Module, samples: ValidationSamples, *, ranks: Ranks, precision: str, rows: int
) -> Evaluation:
    """Return the loss of `model`, which sees `rows` samples at a time; the same on every rank."""
    objective = Causal()
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    for start in range(0, len(samples.mine), rows):
        batch = MicroBatch(torch.from_numpy(samples.mine[start : start + rows]).to(ranks.device).long())
        with autocast(ranks.device, precision):
            loss = objective.loss(objective.outputs(model, batch), batch)
        total += loss.double() * len(batch.tokens)
    model.train(was_training)
    summed = float(ranks.sum(total)())
    return Evaluation(
        loss=summed / samples.count, samples=samples.count, tokens=samples.count * (samples.mine.shape[1] - 1)
    )
