"""Tensors of which only some ranks have the values, shown on all ranks alike: as a checkpoint wants to see them."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

__all__ = ["shown"]


def shown(here: Tensor | None, shape: torch.Size, dtype: torch.dtype, *, mesh: DeviceMesh) -> Tensor:
    """Return `here`, which every rank of `mesh` has, as a tensor of those; None: one without an element on this rank.

    A DTensor lies over the last dimensions of `mesh` as it does over its own, and is the same along the others.
    """
    placed: tuple[Placement, ...] = here.placements if isinstance(here, DTensor) else ()
    if here is None:
        here = torch.empty((0,) * len(shape) if shape else (), dtype=dtype)
    stride = torch.empty(shape, device="meta").stride()
    placements = (Replicate(),) * (mesh.ndim - len(placed)) + placed
    here = here.detach()
    here = here.to_local() if isinstance(here, DTensor) else here
    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(shape, stride, dtype))
    return DTensor(here, spec, requires_grad=False)  # type: ignore[no-untyped-call]
