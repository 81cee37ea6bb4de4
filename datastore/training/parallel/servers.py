"""A parameter server: some ranks own the parameters. Gradients are pushed to them, they move what they own, weights are pulled.

The owners are the first `sync.servers` ranks; the largest parameters are dealt out first, each to the one that has least. Only an
owner has the moments of its parameters. Owners read samples like all others, so the order of the data knows nothing of them.

With a `staleness` of k, what is pushed in a step is applied k steps later: it travels while the steps between are computed, and a
rank may be k steps ahead of one that has not pushed yet. It is always k, not at most k: so the run has the same bits every time.
In the first k steps nothing moves. What is under way is part of the checkpoint, of each rank its own; another number of ranks
begins without it.

Source: M. Li et al., "Scaling Distributed Machine Learning with the Parameter Server", OSDI 2014; Q. Ho et al., "More Effective
Distributed ML via a Stale Synchronous Parallel Parameter Server", NIPS 2013.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from datastore.checkpoint.items import PerRank
from datastore.training.optim import named_state
from datastore.training.parallel.elsewhere import shown
from datastore.training.parallel.lesson import Lesson, Piece
from datastore.training.parallel.norm import clip_everywhere
from datastore.training.parallel.sharded import share_weights
from datastore.training.parallel.whole import Whole

__all__ = ["Servers", "deal"]


class Servers(Whole):
    """The model on each rank, its optimizer on the owners."""

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
        owners = deal([one.numel() for one in self._trained.values()], min(self.sync.servers, self.ranks.world))
        self._owner = dict(zip(self._trained, owners, strict=True))
        self._sent_bytes = 0
        shape = (self.sync.staleness, sum(one.numel() for one in self._of(self.ranks.rank)))
        self._late = torch.zeros(shape, device=self.ranks.device)
        """Means that have been pushed to this rank and not been applied, by step modulo `staleness`."""

        self._taken = torch.zeros((), dtype=torch.int64)
        self._under_way: dict[int, list[Any]] = {}
        return model

    def _of(self, rank: int) -> list[nn.Parameter]:
        """Return the parameters that `rank` owns."""
        return [one for name, one in self._trained.items() if self._owner[name] == rank]

    @override
    def owned(self, model: nn.Module) -> list[nn.Parameter]:
        return self._of(self.ranks.rank)

    @override
    def backward(self, pieces: Sequence[Piece], lesson: Lesson) -> Tensor:
        loss = super().backward(pieces, lesson)
        self._push()
        return loss

    def _push(self) -> None:
        """Send each owner its gradients; leave in this rank's own those that are due."""
        delay, step = self.sync.staleness, int(self._taken)
        sums = [torch.cat([_gradient(one) for one in mine]) for mine in map(self._of, self._servers) if mine]
        for one in self._trained.values():
            one.grad = None
        works = [dist.reduce(one, dst=owner, async_op=True) for owner, one in enumerate(sums)] if self._wire else []
        self._sent_bytes += sum(one.nbytes for owner, one in enumerate(sums) if self._wire and owner != self.ranks.rank)
        self._taken += 1
        due: Tensor | None = None
        if delay and step >= delay:
            self._arrived(step % delay)
            due = self._late[step % delay].clone()
        self._under_way[step % delay if delay else 0] = [works, sums]
        if not delay:
            due = self._arrived(0)
        if due is not None:
            mine = self._of(self.ranks.rank)
            for one, grad in zip(mine, torch.split(due, [one.numel() for one in mine]), strict=True):
                one.grad = grad.view_as(one)

    def _arrived(self, slot: int) -> Tensor:
        """Wait for what was pushed into `slot`; return the mean of what this rank owns, which is kept if it is for later."""
        works, sums = self._under_way.pop(slot, ((), ()))
        for work in works:
            work.wait()
        if not sums or self.ranks.rank >= len(sums):
            return self._late.new_zeros(self._late.shape[1])
        mean: Tensor = sums[self.ranks.rank] / self.ranks.world
        if self.sync.staleness:
            self._late[slot].copy_(mean)
        return mean

    @override
    def rest(self) -> None:
        for slot in sorted(self._under_way):
            self._arrived(slot)

    @override
    def clip(self, model: nn.Module, limit: float) -> Tensor:
        return clip_everywhere(model.parameters(), limit, copies=1) if self._wire else super().clip(model, limit)

    @override
    @torch.no_grad()
    def moved(self, model: nn.Module, step: int) -> None:
        """Pull: every owner sends what it owns."""
        if not self._wire:
            return
        for owner in self._servers:
            theirs = self._of(owner)
            if not theirs:
                continue
            flat = torch.cat([one.flatten() for one in theirs])
            dist.broadcast(flat, src=owner)
            if owner == self.ranks.rank:
                self._sent_bytes += flat.nbytes * (self.ranks.world - 1)
            for one, new in zip(theirs, torch.split(flat, [one.numel() for one in theirs]), strict=True):
                one.copy_(new.view_as(one))

    @override
    def items(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        moments = named_state(model, optimizer)
        late = {"sync-late": PerRank({"means": self._late, "taken": self._taken})} if self.sync.staleness else {}
        if self._wire:
            moments = {name: self._shown(name, moments.get(name), optimizer) for name in self._trained}
        return {"model": model, "optim": moments, **late}

    def _shown(self, name: str, here: dict[str, Tensor] | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the moments of a parameter as those of its owner."""
        mesh = DeviceMesh(self.ranks.device.type, torch.tensor([self._owner[name]]), _init_backend=False)
        shape, found = self._trained[name].shape, here or {}
        shapes = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
        wanted = shapes if isinstance(optimizer, torch.optim.AdamW) else {}
        return {key: shown(found.get(key), one, torch.float32, mesh=mesh) for key, one in wanted.items()}

    @override
    def metrics(self) -> dict[str, float]:
        return {"sync_sent_bytes": self._sent_bytes}

    @property
    def _wire(self) -> bool:
        return self.ranks.world > 1

    @property
    def _servers(self) -> range:
        return range(min(self.sync.servers, self.ranks.world))


def deal(sizes: Sequence[int], owners: int) -> list[int]:
    """Return an owner for each of `sizes`: the largest first, each to the one that has least so far."""
    held = [0] * owners
    found = [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        found[place] = min(range(owners), key=lambda owner: (held[owner], owner))
        held[found[place]] += sizes[place]
    return found


def _gradient(parameter: nn.Parameter) -> Tensor:
    return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
