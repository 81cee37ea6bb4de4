"""DiLoCo: every rank learns by itself for some steps, a round; then all take one step together, along what they have learned.

The common weights are those that a round began with. Its end moves them along the mean of what the ranks' weights have changed by, with
Nesterov's momentum, and every rank goes on from there. So weights travel once a round, in `sync.deltas`, encoded as
gradients are: what a message leaves out goes with the next one. Rounds end at multiples of `sync.every`, whenever the run was interrupted.

A checkpoint has the common weights as its model, as of the last end of a round, and of each rank its own weights and moments: the same
number of ranks goes on with the same bits. Another number of ranks, as a worker has left or joined, goes on from the common
weights: what the ranks had learned since the end of the round is forgotten, and the moments begin anew.

Two sums of a few bytes a step stay: they tell of the loss, and of samples consumed.

Source: A. Douillard et al., "DiLoCo", arXiv:2311.08105; deltas of 4 bits: arXiv:2501.18512.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from datastore.checkpoint.items import PerRank
from datastore.training.optim import named_state
from datastore.training.parallel.sharded import share_weights
from datastore.training.parallel.sync.attach import codec
from datastore.training.parallel.sync.feedback import Feedback
from datastore.training.parallel.whole import Whole

__all__ = ["Rounds"]


class Rounds(Whole):
    """The model on each rank, with weights of its own between the ends of rounds."""

    splits = True
    differs = True
    keeps = True

    @override
    def distribute(self, model: nn.Module) -> nn.Module:
        if self.ranks.world > 1:
            share_weights(model)
        self._model = self._called = model
        self._mean = None
        self._trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
        self._common = {name: one.detach().clone() for name, one in self._trained.items()}
        self._momentum = {name: torch.zeros_like(one) for name, one in self._common.items()}
        self._deltas = Feedback(codec(self.sync, self.sync.deltas), self.ranks.world)
        if self.ranks.world > 1:
            with self._deltas.exact():  # Makes the state that a checkpoint will hold.
                self._deltas.mean("deltas", [torch.zeros_like(one) for one in self._common.values()])
        return model

    @override
    def clip(self, model: nn.Module, limit: float) -> Tensor:
        """Return the largest norm of a rank's own gradients: all ranks must agree on whether it is finite."""
        norm = super().clip(model, limit).detach().clone()
        if self.ranks.world > 1:
            norm = norm.nan_to_num(nan=float("inf"))  # Which of NaN and a number is larger depends on the library.
            dist.all_reduce(norm, op=dist.ReduceOp.MAX)
        return norm

    @override
    @torch.no_grad()
    def moved(self, model: nn.Module, step: int) -> None:
        if step % self.sync.every:
            return
        deltas = [self._common[name] - one for name, one in self._trained.items()]
        if self.ranks.world > 1:
            self._deltas.mean("deltas", deltas)
        for (name, one), delta in zip(self._trained.items(), deltas, strict=True):
            momentum = self._momentum[name].mul_(self.sync.outer_momentum).add_(delta)
            self._common[name].sub_(delta + self.sync.outer_momentum * momentum, alpha=self.sync.outer_lr)
            one.copy_(self._common[name])

    @override
    @torch.no_grad()
    def begin_anew(self) -> None:
        for name, one in self._trained.items():
            one.copy_(self._common[name])

    @override
    def items(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        own = {"model": dict(model.state_dict()), "optim": named_state(model, optimizer), "rests": self._deltas.rests}
        common = {name: self._common.get(name, value) for name, value in model.state_dict().items()}
        return {"model": common, "outer": self._momentum, "sync-round": PerRank(own)}

    @override
    def metrics(self) -> dict[str, float]:
        return {"sync_sent_bytes": self._deltas.sent_bytes}
