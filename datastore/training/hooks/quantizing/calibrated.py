"""Rounding that looks at what the layers read.

GPTQ moves the error of a column into those not rounded yet; AWQ makes channels with large inputs larger before rounding, and what
comes before the layer smaller.

In the end AWQ searches for the range of each group: a scale somewhat smaller than what just holds it cuts its largest weights and brings
the others nearer. What is cut off is the same way for many weights, and inputs have parts in common, so an error counts together with
those of the whole row: with each weight's error for itself AWQ was worse than rounding to nearest (4 bits in groups of 32: +0.0038 nats, now
+0.0015; to nearest +0.0020). GPTQ does not search, and moves errors instead. The inputs are those of the real model. What is zero stays zero: pruned weights take part in neither.

GPTQ costs O(in^3 + out * in^2) for each layer, AWQ O(out * in^2) for each of its 11 tries of channels, and once more for the ranges.

Sources: E. Frantar et al., "GPTQ", arXiv:2210.17323; J. Lin et al., "AWQ", arXiv:2306.00978.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from datastore.training.hooks.quantizing.grid import Grid, fitted_grid, in_groups
from datastore.training.hooks.quantizing.settings import Scheme
from datastore.training.models.gpt import Block

__all__ = ["balance_channels", "moved_errors", "searched_grid"]

_DAMPING = 0.01
"""Of the mean of the diagonal, added to it: the inputs may not span all channels."""

_TOGETHER = 128
"""Columns whose errors reach those behind them at once."""

_RANGES = [1.0 - 0.04 * number for number in range(11)]
"""Parts of a group's range that are tried."""

_POWERS = [number / 10 for number in range(11)]
"""Of a channel's inputs, by which its weights are made larger."""


def searched_grid(weight: Tensor, scheme: Scheme, gram: Tensor) -> Grid:
    """Return the grid with which the outputs of `weight` [out, in] lose least, of those whose groups have a part of their range.

    What a row loses is e `gram` e^T, e its errors and `gram` [in, in] X^T X of the inputs X. Groups are gone through in order, each beside
    the errors that the others have by then: no row loses more than with the grid that just holds its groups.
    """
    real = weight.detach().float()
    plain = fitted_grid(real, scheme)
    errors = plain.real(plain.whole(real)) - real
    stretch = torch.zeros_like(plain.scales)
    size = real.shape[1] // stretch.shape[1]
    for group in range(stretch.shape[1]):
        own = slice(group * size, (group + 1) * size)
        part, square = real[:, own], gram[own, own]
        others = errors @ gram[:, own] - errors[:, own] @ square
        least = torch.full_like(stretch[:, 0], float("inf"))
        for share in _RANGES:
            tried = torch.full_like(stretch[:, :1], share).log()
            grid = fitted_grid(part, scheme, tried)
            moved = grid.real(grid.whole(part)) - part
            lost = ((moved @ square + 2 * others) * moved).sum(dim=1)
            better = lost < least
            least = torch.where(better, lost, least)
            stretch[:, group] = torch.where(better, tried[:, 0], stretch[:, group])
            errors[:, own] = torch.where(better.unsqueeze(1), moved, errors[:, own])
    return fitted_grid(real, scheme, stretch)


def moved_errors(weight: Tensor, gram: Tensor, scheme: Scheme) -> tuple[Tensor, Grid]:
    """Return the integers of `weight` [out, in], int8, and their grid; `gram` [in, in] is X^T X of the inputs X.

    Columns are rounded from the one with the largest inputs on. Their grid is fixed before, so the order is not to be seen in what
    is stored.
    """
    diagonal = gram.diagonal()
    grid = fitted_grid(weight, scheme)
    order = torch.argsort(diagonal, descending=True, stable=True)
    factors = _error_factors(gram[order][:, order])
    real = weight.detach().float()[:, order].clone()
    pruned = real == 0
    ones = torch.ones_like(weight, dtype=torch.float32)
    scales = (in_groups(ones, grid.scales) * grid.scales.unsqueeze(-1)).view(weight.shape)[:, order]
    zeros = torch.zeros_like(scales)
    if grid.zeros is not None:
        zeros = (in_groups(ones, grid.scales) * grid.zeros.unsqueeze(-1)).view(weight.shape)[:, order]
    least, most = grid.limits
    whole = torch.empty_like(real)
    for start in range(0, real.shape[1], _TOGETHER):
        stop = min(start + _TOGETHER, real.shape[1])
        errors = torch.zeros(len(real), stop - start)
        for column in range(start, stop):
            near = (torch.round(real[:, column] / scales[:, column]) + zeros[:, column]).clamp(least, most)
            whole[:, column] = torch.where(pruned[:, column], zeros[:, column], near)
            stands_for = (whole[:, column] - zeros[:, column]) * scales[:, column]
            wanted = torch.where(pruned[:, column], 0.0, real[:, column])
            error = (wanted - stands_for) / factors[column, column]
            real[:, column + 1 : stop] -= error.unsqueeze(1) * factors[column, column + 1 : stop]
            errors[:, column - start] = error
        real[:, stop:] -= errors @ factors[start:stop, stop:]
    back = torch.empty_like(whole)
    back[:, order] = whole
    return back.to(torch.int8), grid


def _error_factors(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of `gram`, damped until it has one."""
    wide = gram.double()
    mean = wide.diagonal().mean().clamp(min=1e-30)
    damped = wide + torch.eye(len(wide), dtype=wide.dtype) * (_DAMPING * mean)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        lower = torch.linalg.cholesky(damped + torch.eye(len(wide), dtype=wide.dtype) * mean)
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper.float()


@torch.no_grad()
def balance_channels(model: nn.Module, grams: Mapping[str, Tensor], schemes: Mapping[str, Scheme]) -> None:
    """Make channels that layers read with large values smaller, and their weights larger, so that rounding loses less of them.

    The function of the model stays the same. It is done where something comes right before that can be divided: a norm, the
    other half of the feed-forward part, or the values, if each head has its own.
    """
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        attention, mlp = block.self_attn, block.mlp
        pairs: list[tuple[list[str], nn.Parameter | Tensor]] = [
            (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], block.input_layernorm.weight),
            (["mlp.gate_proj", "mlp.up_proj"], block.post_attention_layernorm.weight),
            (["mlp.down_proj"], mlp.up_proj.weight),
        ]
        if attention.heads == attention.key_heads:
            pairs.append((["self_attn.o_proj"], attention.v_proj.weight))
        for readers, before in pairs:
            names = [f"{name}.{reader}" for reader in readers]
            if all(one in schemes and one in grams for one in names):
                weights = [block.get_parameter(f"{reader}.weight") for reader in readers]
                factors = _best_factors(weights, grams[names[0]], schemes[names[0]])
                before.div_(factors if before.dim() == 1 else factors.unsqueeze(1))
                for weight in weights:
                    weight.mul_(factors)


def _best_factors(weights: Sequence[Tensor], gram: Tensor, scheme: Scheme) -> Tensor:
    """Return by how much each channel is made larger so that the outputs of all `weights` lose least."""
    inputs = gram.diagonal().clamp(min=1e-12).sqrt()
    best, found = float("inf"), torch.ones_like(inputs)
    for power in _POWERS:
        factors = inputs**power
        factors = (factors / (factors.max() * factors.min()).sqrt()).clamp(1e-3, 1e3)
        lost = 0.0
        for weight in weights:
            larger = weight.float() * factors
            grid = fitted_grid(larger, scheme)
            error = grid.real(grid.whole(larger)) / factors - weight.float()
            lost += float(((error @ gram) * error).sum())
        if lost < best:
            best, found = lost, factors
    return found
