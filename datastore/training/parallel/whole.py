"""Every rank has the whole model: one process, or several whose gradients DistributedDataParallel averages.

DistributedDataParallel reorders its buckets once, after the first step, and with more than two ranks another order can change
the last bit of a sum. `settle` therefore takes that first step on zeros, so that a resumed run and an undisturbed one
use the same buckets from their first real step on.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from datastore.training.launcher import Launch
from datastore.training.objectives.base import MicroBatch
from datastore.training.parallel.layout import Layout
from datastore.training.parallel.lesson import Lesson, Piece
from datastore.training.parallel.ranks import Ranks
from datastore.training.parallel.strategy import Strategy
from datastore.training.parallel.sync.attach import averager, hook_copies, rests_item
from datastore.training.run.profile import part

__all__ = ["Whole", "alone"]


class Whole(Strategy):
    """The model on each rank."""

    splits = False
    in_step = False

    @override
    def distribute(self, model: nn.Module) -> nn.Module:
        self._model = model
        self._called: nn.Module = model
        self._mean = averager(self.sync, self.ranks.world)
        if self.ranks.world > 1:
            ids = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
            copies = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
            if self._mean is not None:
                self.keeps = True
                hook_copies(copies, self._mean)
            self._called = copies
        return model

    @override
    def backward(self, pieces: Sequence[Piece], lesson: Lesson) -> Tensor:
        total = torch.zeros((), device=self.ranks.device)
        for number, piece in enumerate(pieces, start=1):
            with self._accumulating(last=number == len(pieces)):
                loss = lesson.of(self._called, piece.rows)
                with part("backward"):
                    (loss * (piece.share * self.layout.learners * lesson.scale)).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() * piece.share
        return total

    def _accumulating(self, *, last: bool) -> Any:
        """Return the context of one pass forward and backward: gradients are averaged in the `last` of a step only."""
        return (
            self._called.no_sync() if isinstance(self._called, DistributedDataParallel) and not last else nullcontext()
        )

    @override
    def evaluate(self, rows: MicroBatch, lesson: Lesson, *, size: int) -> Tensor:
        rows = self.seen(rows)
        loss = lesson.of(self._model, rows)
        return self.joined(loss, rows)

    @override
    def clip(self, model: nn.Module, limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)

    @override
    def settle(self, model: nn.Module, lesson: Lesson, rows: MicroBatch) -> None:
        for _ in range(2):  # DistributedDataParallel orders its buckets when it sees the second forward pass.
            if self._mean is not None:
                self._mean.rests.clear()  # What came to be for other buckets.
            with self._mean.exact() if self._mean is not None else nullcontext():
                (lesson.of(self._called, rows) * 0.0).backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    @override
    def probe(self, model: nn.Module, lesson: Lesson, rows: MicroBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return the same on this rank alone: a parameter without gradient would make the others wait."""
        loss = lesson.of(model, rows)
        trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        if not loss.requires_grad:
            return loss, dict.fromkeys(trained)
        found = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return loss, dict(zip(trained, found, strict=True))

    @override
    def items(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return super().items(model, optimizer) | rests_item("copies", self._mean)

    @override
    def metrics(self) -> dict[str, float]:
        return {} if self._mean is None else {"sync_sent_bytes": self._mean.sent_bytes}


def alone() -> Whole:
    """Return the strategy of one process on the CPU."""
    return Whole(Layout(), Ranks(Launch(), torch.device("cpu"), None))
