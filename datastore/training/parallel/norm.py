"""The norm of gradients that lie on several ranks, in one small sum over all of them.

Each rank adds up the squares it holds, in float64, and counts a gradient that other ranks hold as well by its part: 1 over
their number. So the norm is the same for every layout, whatever lies on which mesh; torch's own refuses gradients of
different meshes in one call, and knows nothing of the stages of a pipeline.
"""

from collections.abc import Iterable, Iterator
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

__all__ = ["all_finite", "clip_everywhere", "local_part", "settle_partial", "tensors_of"]

_TINY = 1e-6
"""What torch's `clip_grad_norm_` adds to the norm before it divides."""


def settle_partial(parameters: Iterable[Tensor]) -> None:
    """Add up gradients of which ranks hold a summand each, so that they lie as their parameters do."""
    for one in parameters:
        grad = one.grad
        if isinstance(grad, DTensor) and isinstance(one, DTensor) and grad.placements != one.placements:
            one.grad = grad.redistribute(placements=one.placements)


@torch.no_grad()
def clip_everywhere(
    parameters: Iterable[Tensor], limit: float, *, copies: int, counted: Tensor | None = None
) -> Tensor:
    """Return the norm over all ranks, and scale the gradients here so that it is at most `limit`.

    `copies` is how many ranks hold a parameter that is on no mesh, or replicated on all of it; `counted` is one here that
    other ranks count.
    """
    squares = torch.zeros((), dtype=torch.float64)
    held = [(one, one.grad) for one in parameters if one.grad is not None]
    grads = [grad for _, grad in held]
    for grad in (grad for one, grad in held if one is not counted):
        local = local_part(grad)
        squares = squares.to(local.device) + local.double().square().sum() * (_pieces(grad) / copies)
    dist.all_reduce(squares)
    norm = squares.sqrt()
    scale = (limit / (norm + _TINY)).clamp(max=1.0)
    for grad in grads:
        local = local_part(grad)
        local.mul_(scale.to(local.dtype))
    return norm.float()


def local_part(tensor: Tensor) -> Tensor:
    """Return what is in this process of `tensor`."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _pieces(grad: Tensor) -> int:
    """Return in how many different pieces `grad` lies."""
    if not isinstance(grad, DTensor):
        return 1
    return prod(size for size, place in zip(grad.device_mesh.shape, grad.placements, strict=True) if place.is_shard())


def tensors_of(model: nn.Module, optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield what this rank has of the parameters and of the state of the optimizer."""
    yield from map(local_part, model.parameters())
    for kept in optimizer.state.values():
        yield from (local_part(value) for value in kept.values() if isinstance(value, Tensor))


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no element is NaN or infinite: one pass, and one wait for a device."""
    ends = [torch.stack(tensor.aminmax()) for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return not ends or bool(torch.stack([end.isfinite().all() for end in ends]).all())
