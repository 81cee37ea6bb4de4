"""Weights pruned in stages, after each of which those that are left are solved for: the layer's answers on the calibration rows stay.

Which weights go is decided as by Wanda, some at a time, among weights that have made up for those that went before. What is left of
a row is then the least-squares solution given its mask, found by conjugate gradients for all rows at once. SparseGPT, which has the
same aim, lets weights make up for others once, from left to right, and never changes those it has passed; on layers of 64 inputs
pruned to half what is lost was 1.1 here and 4.4 there, 0.08 and 15, 3.9 and 5.1 (inputs mixed at random, of low rank, with one common
part). The price is `_STAGES` times `_ITERATIONS` products of [out, in] and [in, in].

Source: E. Frantar and D. Alistarh, "SparseGPT", arXiv:2301.00774 (the aim, and the damping); M. Sun et al., arXiv:2306.11695 (Wanda);
M. Hestenes and E. Stiefel, 1952 (conjugate gradients).
"""

import torch
from torch import Tensor

from datastore.training.hooks.masks import cheapest_groups, keep_largest, keep_two_of_four

__all__ = ["prune_fours", "prune_to", "solved"]

_DAMPING = 0.01
"""Of the mean of the diagonal of X^T X, added to it: inputs that are nearly combinations of others cannot blow up a weight."""

_STAGES = 8
_ITERATIONS = 16


def prune_to(weight: Tensor, gram: Tensor, kept: int, *, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weight` [out, in] with exactly `kept` places that are not pruned, and where those are."""
    matrix, norms = _damped(gram), gram.diagonal().clamp(min=0).sqrt()
    target = weight.detach().float()
    values, mask, before = target, alive, int(alive.sum())
    for stage in range(1, _STAGES + 1):
        count = before - round((before - kept) * stage / _STAGES)
        mask = keep_largest(values.abs() * norms, count, alive=mask)
        values = solved(target, matrix, mask, values)
    return values.to(weight.dtype), mask


def prune_fours(weight: Tensor, gram: Tensor, groups: int, *, alive: Tensor) -> tuple[Tensor, Tensor]:
    """Return `weight` with two of four columns pruned in `groups` of its groups, and where the others are."""
    matrix, norms = _damped(gram), gram.diagonal().clamp(min=0).sqrt()
    target = weight.detach().float()
    values, mask = target, alive
    before = int((alive.view(len(weight), -1, 4).sum(dim=-1) <= 2).sum())
    for stage in range(1, _STAGES + 1):
        scores = values.abs() * norms
        chosen = cheapest_groups(scores, before + round((groups - before) * stage / _STAGES), alive=mask)
        mask = keep_two_of_four(scores, chosen, alive=mask)
        values = solved(target, matrix, mask, values)
    return values.to(weight.dtype), mask


def solved(target: Tensor, matrix: Tensor, mask: Tensor, first: Tensor) -> Tensor:
    """Return the rows that are zero outside of `mask` and nearest to those of `target` as `matrix` measures it, begun at `first`."""
    diagonal = matrix.diagonal()
    values = first * mask
    rest = ((target - values) @ matrix) * mask
    along = rest / diagonal
    power = (rest * along).sum(dim=1, keepdim=True)
    for _ in range(_ITERATIONS):
        moved = (along @ matrix) * mask
        curve = (along * moved).sum(dim=1, keepdim=True)
        length = torch.where(curve > 0, power / curve, 0.0)
        values = values + length * along
        rest = rest - length * moved
        next_power = (rest * rest / diagonal).sum(dim=1, keepdim=True)
        along = rest / diagonal + torch.where(power > 0, next_power / power, 0.0) * along
        power = next_power
    return values


def _damped(gram: Tensor) -> Tensor:
    """Return `gram` with more on its diagonal, which has no zero then."""
    matrix = gram.float().clone()
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    diagonal += _DAMPING * torch.where(mean > 0, mean, 1.0)
    return matrix
