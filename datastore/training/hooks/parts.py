"""Tensors of which a rank may have a part: looked at whole, and laid out again as a parameter lies.

Hooks that rank weights see them whole: every rank gathers the same tensor, and rank 0's answer is what all take, so ranks whose
processors round differently cannot come to differ. It happens at the steps that change a mask, not in every step.
"""

from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["agreed", "laid", "local", "matrices_of", "moments_of", "overwrite", "whole"]

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def whole(tensor: Tensor) -> Tensor:
    """Return all of `tensor`; every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return what is in this process of `tensor`: the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def agreed(tensor: Tensor) -> Tensor:
    """Return what rank 0 has in `tensor`, which every rank has whole; every rank must call this."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensor
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=0)
    return tensor


def laid(tensor: Tensor, *, like: Tensor) -> Tensor:
    """Return this rank's part of `tensor`, which it has whole, as it has one of `like`."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def overwrite(target: Tensor, tensor: Tensor) -> None:
    """Copy `tensor`, which this rank has whole, to where `target` lies."""
    local(target).copy_(local(laid(tensor, like=target)))


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """Return the moments that the optimizer keeps of a parameter."""
    state = optimizer.state.get(parameter, {})
    return [state[key] for key in _MOMENTS if state.get(key) is not None]


def matrices_of(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Return the matrices of which some name fits a pattern, each once: tied ones have several names."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.dim() == 2 and any(fnmatchcase(name, pattern) for pattern in patterns):
            found.setdefault(id(parameter), (name, parameter))
    return dict(found.values())
