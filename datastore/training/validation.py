"""The validation loss, equal for any number of ranks: the mean over all targets that count of the same samples each time.

Each rank takes a part of them; sums are added in float64, so the number of ranks does not show in six digits.
"""

import math
from collections.abc import Iterable, Sequence

import msgspec
import torch
from torch import nn

from datastore.document import Document
from datastore.training.distributed import Ranks
from datastore.training.machine import autocast
from datastore.training.objectives import MicroBatch, Objective
from datastore.training.run.split import ValidationSamples

__all__ = ["Evaluation", "loss_over", "mean_of", "parts_of", "validation_loss"]


class Evaluation(Document, frozen=True, kw_only=True):
    """How well a model predicts held-out tokens."""

    loss: float
    """Nats per token."""

    samples: int
    tokens: int
    """Targets that were predicted."""

    step: int | None = None
    """The step of a run that was measured; None: a model in training, or of a folder."""

    sources: dict[str, float] = msgspec.field(default_factory=dict)
    """The loss on what each source of a mixture holds out."""

    passed_over: tuple[str, ...] = ()
    """Newer steps of the run that are damaged, each with its reason."""

    @property
    def perplexity(self) -> float:
        """E to the loss."""
        return math.exp(self.loss)


def validation_loss(
    model: nn.Module,
    samples: Sequence[ValidationSamples],
    *,
    objective: Objective,
    ranks: Ranks,
    precision: str,
    rows: int,
) -> Evaluation:
    """Return the loss of `model` on all of `samples`, `rows` of them at a time, and that on each source; the same on every rank."""
    return mean_of(
        samples,
        [
            loss_over(model, one, parts_of(one, rows=rows), objective=objective, ranks=ranks, precision=precision)
            for one in samples
        ],
    )


def mean_of(samples: Sequence[ValidationSamples], found: Sequence[Evaluation]) -> Evaluation:
    """Return the mean over all targets of what was found for each of `samples`."""
    tokens = sum(one.tokens for one in found)
    return Evaluation(
        loss=sum(one.loss * one.tokens for one in found) / max(1, tokens),
        samples=sum(one.samples for one in found),
        tokens=tokens,
        sources={part.source: one.loss for part, one in zip(samples, found, strict=True) if part.source},
    )


def parts_of(samples: ValidationSamples, *, rows: int) -> list[slice]:
    """Return what this rank has of `samples`, `rows` at a time."""
    return [slice(start, start + rows) for start in range(0, len(samples.mine), rows)]


@torch.no_grad()
def loss_over(
    model: nn.Module,
    samples: ValidationSamples,
    parts: Iterable[slice],
    *,
    objective: Objective,
    ranks: Ranks,
    precision: str,
) -> Evaluation:
    """Return the loss of `model`, which sees one of `parts` after the other; the same on every rank."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for part in parts:
        mask = None if samples.loss_mask is None else torch.from_numpy(samples.loss_mask[part]).to(ranks.device)
        batch = MicroBatch(torch.from_numpy(samples.mine[part]).to(ranks.device).long(), mask)
        with autocast(ranks.device, precision):
            loss = objective.loss(objective.outputs(model, batch), batch)
        weight = torch.tensor(float(len(batch.tokens))) if batch.learned is None else batch.learned
        sums += torch.stack((loss.double() * weight.to(loss.device), weight.double().to(loss.device)))
    model.train(was_training)
    total, weights = ranks.sum(sums)().tolist()
    targets = samples.count * (samples.mine.shape[1] - 1) if samples.loss_mask is None else int(weights)
    return Evaluation(loss=total / max(1.0, weights), samples=samples.count, tokens=targets)
