"""Masks: which weights are kept, as a function of their scores.

Every count is exact: of equal scores at the border the first are taken. With a threshold alone they would all stay or all go.
A weight that is gone has no chance to come back: its score counts as less than any other.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["cheapest_groups", "keep_everywhere", "keep_largest", "keep_mask", "keep_two_of_four", "kept_of", "swapped"]


def kept_of(size: int, ratio: float) -> int:
    """Return how many of `size` weights are kept at a compression ratio."""
    return round(size / ratio)


def keep_mask(weights: Tensor, ratio: float) -> Tensor:
    """Return where to keep `weights`: exactly round(N / ratio) of N places are True, those of the largest magnitude."""
    return keep_largest(weights.detach().abs(), kept_of(weights.numel(), ratio))


def keep_largest(scores: Tensor, kept: int, *, alive: Tensor | None = None) -> Tensor:
    """Return a mask in which the places of the `kept` largest scores are True, of those that are `alive`.

    Among equal scores the first in memory order are kept. O(N) on a CPU: what is needed of the order is one value.
    """
    if kept == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = (scores if alive is None else scores.masked_fill(~alive, -math.inf)).flatten()
    last = _ascending(flat, len(flat) - kept)
    above, equal = flat > last, flat == last
    return (above | (equal & (equal.cumsum(dim=0) <= kept - above.sum()))).view(scores.shape)


def _ascending(values: Tensor, place: int) -> Tensor:
    """Return the value that stands at `place` if `values` are sorted; on a GPU `kthvalue` is not deterministic."""
    if values.device.type == "cpu":
        return values.kthvalue(place + 1).values
    return values.sort().values[place]


def keep_everywhere(scores: Mapping[str, Tensor], kept: int, *, alive: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks in which the places of the `kept` largest scores of all tensors together are True."""
    flat = torch.cat([one.flatten() for one in scores.values()])
    living = torch.cat([alive[name].flatten() for name in scores])
    mask = keep_largest(flat, kept, alive=living)
    parts = torch.split(mask, [one.numel() for one in scores.values()])
    return {name: part.view(one.shape) for (name, one), part in zip(scores.items(), parts, strict=True)}


def cheapest_groups(scores: Tensor, groups: int, *, alive: Tensor) -> Tensor:
    """Return which groups of four columns lose least if two of each are dropped: `groups` of [out, in / 4] are True."""
    fours = _fours(scores.masked_fill(~alive, -math.inf))
    loss = fours.topk(2, dim=-1, largest=False).values.sum(dim=-1)
    return keep_largest(-loss, groups)


def keep_two_of_four(scores: Tensor, chosen: Tensor, *, alive: Tensor) -> Tensor:
    """Return a mask [out, in]: of each of the `chosen` groups of four columns the two largest scores stay, of others what is alive.

    Among equal scores the first columns stay.
    """
    fours = _fours(scores.masked_fill(~alive, -math.inf))
    order = torch.argsort(fours, dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, order[..., :2], value=True)
    return (_fours(alive) & (kept | ~chosen.unsqueeze(-1))).view(scores.shape)


def _fours(matrix: Tensor) -> Tensor:
    return matrix.reshape(len(matrix), -1, 4)


def swapped(mask: Tensor, *, scores: Tensor, wanted: Tensor, fraction: float) -> Tensor:
    """Return `mask` with a fraction of its places moved: from the smallest scores to where `wanted` is largest.

    As many places are True as before. A place that was just given up may be taken again.
    """
    kept = int(mask.sum())
    count = min(round(kept * fraction), mask.numel() - kept)
    stay = keep_largest(scores, kept - count, alive=mask)
    return stay | keep_largest(wanted.abs(), count, alive=~stay)
