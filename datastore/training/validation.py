"""The validation loss, equal for any number of ranks: the mean over all targets that count of the same samples each time.

Each rank takes a part of them; sums are added in float64, so the number of ranks does not show in six digits.
"""

import math
from collections.abc import Iterable, Sequence

import msgspec
import torch
from torch import nn

from datastore.document import Document
from datastore.training.objectives.base import HostRows, blank_rows, micro_batches
from datastore.training.parallel.lesson import Lesson
from datastore.training.parallel.strategy import Strategy
from datastore.training.run.split import ValidationSamples

__all__ = ["Evaluation", "loss_over", "mean_of", "parts_of", "validation_loss"]


class Evaluation(Document, frozen=True, kw_only=True):
    """How well a model predicts held-out tokens."""

    loss: float
    """Nats per target, which is a token for most objectives."""

    samples: int
    tokens: int
    """Targets that were predicted, in `unit`."""

    unit: str = "tokens"
    """What they are: "tokens", or texts, pairs, items, records, as the objective has it."""

    step: int | None = None
    """The step of a run that was measured; None: a model in training, or of a folder."""

    sources: dict[str, float] = msgspec.field(default_factory=dict)
    """The loss on what each source of a mixture holds out."""

    passed_over: tuple[str, ...] = ()
    """Newer steps of the run that are damaged, each with its reason."""

    @property
    def perplexity(self) -> float:
        """E to the loss; infinite if that is no float."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def validation_loss(
    model: nn.Module, samples: Sequence[ValidationSamples], *, lesson: Lesson, strategy: Strategy, rows: int
) -> Evaluation:
    """Return the loss of `model` on all of `samples`, `rows` of them at a time, and that on each source; the same on every rank."""
    return mean_of(
        samples,
        [
            loss_over(model, one, parts_of(one, strategy, rows=rows), lesson=lesson, strategy=strategy)
            for one in samples
        ],
    )


def mean_of(samples: Sequence[ValidationSamples], found: Sequence[Evaluation]) -> Evaluation:
    """Return the mean over all targets of what was found for each of `samples`."""
    tokens = sum(one.tokens for one in found)
    return Evaluation(
        unit=found[0].unit,
        loss=sum(one.loss * one.tokens for one in found) / max(1, tokens),
        samples=sum(one.samples for one in found),
        tokens=tokens,
        sources={part.source: one.loss for part, one in zip(samples, found, strict=True) if part.source},
    )


def parts_of(samples: ValidationSamples, strategy: Strategy, *, rows: int) -> list[slice]:
    """Return what this rank has of `samples`, `rows` at a time; as many parts as any rank has, if all must take part in each."""
    end = -(-samples.count // strategy.layout.readers) if strategy.in_step else len(samples.mine)
    if strategy.in_step and samples.count < strategy.layout.readers:
        end = samples.count  # All on the first.
    return [slice(start, start + rows) for start in range(0, end, rows)]


@torch.no_grad()
def loss_over(
    model: nn.Module, samples: ValidationSamples, parts: Iterable[slice], *, lesson: Lesson, strategy: Strategy
) -> Evaluation:
    """Return the loss of `model`, which sees one of `parts` after the other; the same on every rank."""
    was_training, device = model.training, strategy.ranks.device
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for part in parts:
        found = part_of(samples.rows, part)
        count = len(found.tokens)
        (batch,) = micro_batches(found if count else blank_rows(found, 1), device, size=max(1, count))
        loss = strategy.evaluate(batch, lesson, size=part.stop - part.start)
        if count and strategy.place.speaks:
            weight = torch.tensor(float(count)) if batch.learned is None else batch.learned
            sums += torch.stack((loss.double() * weight.to(loss.device), weight.double().to(loss.device)))
    model.train(was_training)
    total, weights = strategy.ranks.sum(sums)().tolist()
    rows = samples.rows
    all_count = rows.loss_mask is None and rows.counts is None
    targets = samples.count * (rows.tokens.shape[1] - 1) if all_count else int(weights)
    return Evaluation(loss=total / max(1.0, weights), samples=samples.count, tokens=targets, unit=lesson.objective.unit)


def part_of(rows: HostRows, part: slice) -> HostRows:
    """Return some of `rows`."""
    return HostRows(
        rows.tokens[part],
        None if rows.loss_mask is None else rows.loss_mask[part],
        None if rows.counts is None else rows.counts[part],
        {name: one[part] for name, one in rows.more.items()},
    )
