"""Tensors of which only some ranks have the values, shown on all ranks alike: as a checkpoint wants to see them."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

__all__ = ["shown"]


def shown(here: Tensor | None, shape: torch.Size, dtype: torch.dtype, *, mesh: DeviceMesh) -> Tensor:
    """Return `here`, which every rank of `mesh` has, as a tensor of those; None: one without an element on this rank."""
    if here is None:
        here = torch.empty((0,) * len(shape) if shape else (), dtype=dtype)
    stride = torch.empty(shape, device="meta").stride()
    placements = (Replicate(),) * mesh.ndim
    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(shape, stride, dtype))
    return DTensor(here.detach(), spec, requires_grad=False)  # type: ignore[no-untyped-call]
