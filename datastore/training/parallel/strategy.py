"""The contract between the loop and a way of sharing the work: chosen once, then asked the same things in every step.

The loop hands over this rank's rows in pieces, each with its share in the mean over the global batch. A strategy leaves the
gradient of that mean in the parameters, whatever lies where, and returns this rank's part of the loss: summed over all
ranks the parts are the loss, so a rank that only helps another one returns 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from datastore.training.models.gpt import parameter_count
from datastore.training.objectives.base import HostRows, MicroBatch, blank_rows, micro_batches
from datastore.training.optim import named_state
from datastore.training.parallel.context import slice_of
from datastore.training.parallel.layout import Layout, Place
from datastore.training.parallel.lesson import Lesson, Piece
from datastore.training.parallel.ranks import Ranks
from datastore.training.settings import SyncSettings

__all__ = ["Strategy"]


_PLAIN = SyncSettings()


class Strategy(ABC):
    """One way of sharing the work. Every method is called by all ranks, in the same order."""

    splits = True
    """Whether a rank may have less than the whole of each parameter: then its tensors are DTensors."""

    differs = False
    """Whether ranks have other weights, or other moments, between steps: then no hook can train."""

    in_step = True
    """Whether all ranks must run the same number of forward passes, on as many rows."""

    keeps = False
    """Whether `backward` changes what `items` returns: then no checkpoint may still be copying it."""

    def __init__(self, layout: Layout, ranks: Ranks, sync: SyncSettings = _PLAIN) -> None:
        self.layout = layout
        self.sync = sync
        self.ranks = ranks
        self.place = Place(layout, ranks.rank)
        self.slice = slice_of(layout, self.place) if layout.context > 1 else None
        """This rank's part of each sequence; None: all of it."""

    def enter(self, model: nn.Module) -> None:
        """Let the whole `model` know which tokens of each sequence this rank has.

        Raises:
            ConfigError: it cannot share a sequence.
        """
        if self.slice is not None:
            self.slice.enter(model)

    @abstractmethod
    def distribute(self, model: nn.Module) -> nn.Module:
        """Return this rank's part of `model`, with the weights of rank 0; names of parameters do not change.

        Raises:
            ConfigError: the model cannot be shared like this.
        """

    @abstractmethod
    def backward(self, pieces: Sequence[Piece], lesson: Lesson) -> Tensor:
        """Leave the gradient of the mean over the global batch in the parameters; return this rank's part of the mean."""

    @abstractmethod
    def evaluate(self, rows: MicroBatch, lesson: Lesson, *, size: int) -> Tensor:
        """Return the mean loss on at most `size` rows, without gradients; of use on a rank that speaks only."""

    @abstractmethod
    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Return the norm of all gradients, and scale those of this rank so that it is at most `limit`."""

    def owned(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that this rank's optimizer moves."""
        return [one for one in model.parameters() if one.requires_grad]

    def moved(self, model: nn.Module, step: int) -> None:  # noqa: B027 - most have nothing to do
        """Bring ranks together after `step`, in which each has moved its own parameters."""

    def rest(self) -> None:  # noqa: B027 - so here
        """Wait for messages under way, so that `items` can be saved."""

    def begin_anew(self) -> None:  # noqa: B027 - and here
        """Take up the state of other ranks: the items of each rank's own (`PerRank`) were not restored."""

    def metrics(self) -> dict[str, float]:
        """Return numbers for the record of a step."""
        return {}

    def share(self, global_batch: int) -> int:
        """Return how many rows of a batch a rank reads at most."""
        return -(-global_batch // self.layout.readers)

    def micro_rows(self, global_batch: int, wanted: int) -> int:
        """Return how many rows one forward pass takes; 0 are `wanted` if there is no wish."""
        share = self.share(global_batch)
        return min(wanted or share, share)

    def passes(self, rows: int, micro_rows: int) -> int:
        """Return how many pieces of `micro_rows` each rank needs, if the one with the most has `rows`."""
        return -(-rows // micro_rows)

    def pieces(self, batch: HostRows, *, rows: int, global_batch: int) -> list[Piece]:
        """Return this rank's part of a batch, `rows` for each forward pass, with their shares in the mean over all.

        A piece counts by its rows; where a loss mask or the objective says which targets count, by its own among those of
        all ranks.
        """
        device = self.ranks.device
        whole = self._learned(batch)
        found = []
        for micro in map(self.seen, micro_batches(batch, device, size=rows)):
            counted = micro.learned
            part = len(micro.tokens) / global_batch / self.layout.context
            found.append(Piece(micro, part if whole is None or counted is None else (counted / whole).float()))
        # A rank with fewer rows takes part in every pass all the same, and one with none in one.
        wanted = self.passes(self.share(global_batch), rows) if self.in_step else 1
        if len(found) < wanted:
            nothing = self.seen(next(iter(micro_batches(blank_rows(batch, 1), device, size=1))))
            found += [Piece(nothing, 0.0)] * (wanted - len(found))
        return found

    def seen(self, rows: MicroBatch) -> MicroBatch:
        """Return what this rank sees of `rows`, which all ranks have that share their sequences."""
        return rows if self.slice is None else self.slice.of(rows)

    def joined(self, loss: Tensor, rows: MicroBatch) -> Tensor:
        """Return the mean over whole sequences of `loss`, which is that of `rows` as this rank sees them."""
        return loss if self.slice is None else self.slice.mean(loss, rows)

    def _learned(self, batch: HostRows) -> Tensor | None:
        """Return how many targets of the global batch count, at least 1, as float64; None: all do."""
        mask, counts = batch.loss_mask, batch.counts
        if mask is None and counts is None:
            return None
        own = counts if counts is not None or mask is None else mask[:, 1:]
        counted = int(own.sum()) if own is not None and self.place.speaks else 0
        mine = torch.tensor(counted, dtype=torch.float64, device=self.ranks.device)
        return self.ranks.sum(mine)().clamp(min=1)

    def settle(self, model: nn.Module, lesson: Lesson, rows: MicroBatch) -> None:
        """Take the first passes on `rows` of zeros: compiles, fixes the order of messages, touches memory."""
        self.probe(model, lesson, rows)

    def probe(self, model: nn.Module, lesson: Lesson, rows: MicroBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return a loss and this rank's gradients by parameter; no gradient is left behind."""
        pieces = self.passes(len(rows.tokens), len(rows.tokens))
        loss = self.backward([Piece(rows, 1.0 / pieces / self.layout.learners)] * pieces, lesson)
        found = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
        model.zero_grad(set_to_none=True)
        return loss, found

    def parameters(self, model: nn.Module) -> int:
        """Return the number of trainable values of the whole model, of which `model` is this rank's part."""
        return parameter_count(model)

    def items(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return model and optimizer as a checkpoint holds them, the same keys on every rank; tensors are the live ones."""
        return {"model": model, "optim": named_state(model, optimizer)}
