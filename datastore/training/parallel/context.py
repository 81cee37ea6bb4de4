"""Every rank has some of the tokens of each sequence; keys and values of those before it come from other ranks.

Ranks take equal runs of tokens, in order, and have the same weights; in each layer they gather keys and values, and each token
looks back from its own place on. All else that is computed for a token is computed by its rank alone.

The price: the rank with the last tokens looks back farthest, and the others wait for it. And each layer has keys and values of
all tokens on every rank, until its backward pass.

Source: A. Grattafiori et al., "The Llama 3 Herd of Models", arXiv:2407.21783, 3.3.2 (keys and values gathered before attention).
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_gather_single_autograd

from datastore.errors import ConfigError
from datastore.training.models.gpt import GPT, Attention
from datastore.training.objectives.base import MicroBatch
from datastore.training.parallel.layout import Layout, Place

__all__ = ["Slice", "slice_of"]


@dataclass(frozen=True, slots=True)
class Slice:
    """Which of `count` equal runs of tokens a rank has, and the `group` of ranks that have the others."""

    place: int
    count: int
    group: Any

    def of(self, rows: MicroBatch) -> MicroBatch:
        """Return this rank's tokens of `rows`, and the one that follows them."""
        size = rows.inputs.shape[1] // self.count
        mine = slice(self.place * size, (self.place + 1) * size + 1)
        mask = rows.loss_mask
        return replace(rows, tokens=rows.tokens[:, mine], loss_mask=None if mask is None else mask[:, mine])

    def gather(self, keys_BKTD: Tensor, values_BKTD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys and values of this rank's tokens and all before them, and which of them each token sees; None: up to its own."""
        tokens = keys_BKTD.shape[2]
        here = torch.stack((keys_BKTD, values_BKTD))
        whole: Tensor = all_gather_single_autograd(here, 3, self.group)
        keys, values = whole[:, :, :, : (self.place + 1) * tokens].unbind()
        if self.place == 0:
            return keys, values, None
        seen = torch.ones(tokens, keys.shape[2], dtype=torch.bool, device=keys.device)
        return keys, values, seen.tril(self.place * tokens)

    def mean(self, loss: Tensor, rows: MicroBatch) -> Tensor:
        """Return the mean over whole sequences of a `loss`, which is that of this rank's `rows`."""
        counted = rows.learned if rows.learned is not None else torch.tensor(rows.targets.numel())
        weight = counted.double().to(loss.device)
        sums = torch.stack((loss.double() * weight, weight))
        dist.all_reduce(sums, group=self.group)
        return (sums[0] / sums[1].clamp(min=1)).to(loss.dtype)

    def enter(self, model: nn.Module) -> None:
        """Let `model` know that it sees this rank's tokens.

        Raises:
            ConfigError: it is not our GPT.
        """
        if not isinstance(model, GPT):
            raise ConfigError(
                "this model cannot share a sequence between ranks",
                model=type(model).__name__,
                hint="Leave parallel.context at 1, or use our GPT.",
            )
        model.shared = self
        for one in model.modules():
            if isinstance(one, Attention):
                one.shared = self


def slice_of(layout: Layout, place: Place) -> Slice:
    """Return the slice of the rank at `place`; every rank must call it at the same time."""
    peers: dict[tuple[int, int, int], list[int]] = {}
    for one in (Place(layout, rank) for rank in range(layout.world)):
        peers.setdefault((one.stage, one.reader, one.tensor), []).append(one.rank)
    group, _ = dist.new_subgroups_by_enumeration(list(peers.values()))  # type: ignore[no-untyped-call]
    return Slice(place.slice, layout.context, group)
