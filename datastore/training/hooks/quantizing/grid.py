"""Real weights to integers and back: the grid of each group is a scale and, if it is not symmetric, a zero point.

    real = scale * (whole - zero)

Zero is always on the grid, so what pruning has made zero stays zero. A symmetric grid of b bits uses all 2^b integers: its scale is the
largest magnitude divided by 2^(b-1) - 1/2, so that both ends are off by half a scale at most.

Sources: M. Nagel et al., arXiv:2106.08295 (the grids); Y. Bengio et al., arXiv:1308.3432 (straight through); S. Esser et al.,
arXiv:1902.08153 (the gradient of a scale), W. Shao et al., arXiv:2308.13137 (scales as learned parts of the range).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from datastore.training.hooks.quantizing.settings import Scheme, check_group

__all__ = ["Grid", "fitted_grid", "in_groups", "round_inputs", "rounded"]

_HALF = 0.5001
"""Of a scale, and a little for what dividing by it has rounded."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales and zero points of the groups of a matrix, both [out, groups]."""

    scales: Tensor
    """float32, above zero."""

    zeros: Tensor | None
    """Integers as float32; None: the grid is symmetric."""

    bits: int

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest integer."""
        top = (1 << (self.bits - 1)) - 1
        return -top - 1, top

    def whole(self, weight: Tensor) -> Tensor:
        """Return the nearest integers of `weight` [out, columns], as int8."""
        least, most = self.limits
        parts = torch.round(in_groups(weight.detach().float(), self.scales) / self.scales.unsqueeze(-1))
        if self.zeros is not None:
            parts = parts + self.zeros.unsqueeze(-1)
        return parts.clamp(least, most).to(torch.int8).view(weight.shape)

    def real(self, whole: Tensor) -> Tensor:
        """Return what the integers stand for, float32 [out, columns]."""
        parts = in_groups(whole.float(), self.scales)
        if self.zeros is not None:
            parts = parts - self.zeros.unsqueeze(-1)
        return (parts * self.scales.unsqueeze(-1)).view(whole.shape)


def in_groups(matrix: Tensor, scales: Tensor) -> Tensor:
    """Return a view [out, groups, size] of `matrix` [out, columns]."""
    return matrix.reshape(len(matrix), scales.shape[1], -1)


def fitted_grid(weight: Tensor, scheme: Scheme, stretch: Tensor | None = None) -> Grid:
    """Return the grid that just holds each group of `weight` [out, columns], its scales times exp(`stretch`) [out, groups].

    Raises:
        ConfigError: the columns cannot be divided into groups.
    """
    out, columns = weight.shape
    check_group(columns, scheme.group)
    size = scheme.group or columns
    parts = weight.detach().float().reshape(out, columns // size, size)
    top = (1 << (scheme.bits - 1)) - 1
    if scheme.symmetric:
        scales, least = parts.abs().amax(dim=-1) / (top + 0.5), None
    else:
        least = parts.amin(dim=-1).clamp(max=0.0)
        scales = (parts.amax(dim=-1).clamp(min=0.0) - least) / (2 * top + 1)
    scales = torch.where(scales == 0, 1.0, scales)
    if stretch is not None:
        scales = scales * stretch.exp()
    zeros = None
    if least is not None:
        zeros = (-top - 1 - torch.round(least / scales.detach())).clamp(-top - 1, top)
    return Grid(scales, zeros, scheme.bits)


def rounded(weight: Tensor, scheme: Scheme, stretch: Tensor | None = None) -> Tensor:
    """Return the real values of the integers of `weight`, for a forward pass.

    Backward, rounding is the identity where it moves a weight by half a scale at most, and constant beyond the ends of the grid; what
    scales get is what follows from that.
    """
    grid = fitted_grid(weight, scheme, stretch)
    least, most = grid.limits
    scales = grid.scales.unsqueeze(-1)
    zeros = 0.0 if grid.zeros is None else grid.zeros.unsqueeze(-1)
    parts = in_groups(weight.float(), grid.scales) / scales
    whole = (torch.round(parts) + zeros).clamp(least, most) - zeros
    within = (parts + zeros >= least - _HALF) & (parts + zeros <= most + _HALF)
    near = torch.where(within, parts + (whole - parts).detach(), whole.detach())
    return (near * scales).view(weight.shape)


def round_inputs(x: Tensor) -> Tensor:
    """Return `x` [..., channels] as 8 bits with one scale for each token would have it; backward it is the identity."""
    scales = x.detach().float().abs().amax(dim=-1, keepdim=True) / 127.5
    scales = torch.where(scales == 0, 1.0, scales)
    near = (torch.round(x.detach().float() / scales).clamp(-128, 127) * scales).to(x.dtype)
    return x + (near - x).detach()
