"""Where a mean of ours takes the place of torch's: a communication hook of DistributedDataParallel, the reduce-scatter of FSDP2.

Both are called in the order in which gradients become ready, which is the same on all ranks, and answer when the mean is there:
nothing is computed beside a message. That costs little where the wire is what one waits for, which is why one compresses.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from datastore.checkpoint.items import PerRank
from datastore.training.parallel.sync.codecs import Blocks, Brief, Codec, Largest, Plain
from datastore.training.parallel.sync.feedback import Averager, Feedback
from datastore.training.parallel.sync.lowrank import LowRank
from datastore.training.settings import SyncSettings

__all__ = ["averager", "codec", "hook_copies", "hook_shards", "rests_item"]


_BLOCK = 256
"""Values that share a scale: with 4 bits that is 1/32 of the bytes."""


def averager(settings: SyncSettings, world: int) -> Averager | None:
    """Return how gradients of `world` ranks become their mean; None: as torch has it."""
    if world == 1 or settings.use not in {"bf16", "int8", "int4", "powersgd", "top_k"}:
        return None
    return (
        LowRank(world, rank=settings.rank)
        if settings.use == "powersgd"
        else Feedback(codec(settings, settings.use), world)
    )


def codec(settings: SyncSettings, name: str) -> Codec:
    """Return the codec called `name`."""
    if name == "bf16":
        return Brief()
    if name == "fp32":
        return Plain()
    if name == "top_k":
        return Largest(keep=settings.keep)
    return Blocks(bits=8 if name == "int8" else 4, block=_BLOCK)


def hook_copies(model: DistributedDataParallel, mean: Averager) -> None:
    """Let `mean` average the gradients of `model`, bucket by bucket."""

    def average(_state: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        mean.mean(str(bucket.index()), bucket.gradients())
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, average)


def hook_shards(model: nn.Module, mean: Feedback) -> None:
    """Let `mean` average the gradients of each group of parameters that FSDP2 took apart in `model`."""
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            module.set_custom_reduce_scatter(_Scatter(name or "all", mean))


def rests_item(kind: str, mean: Averager | None) -> dict[str, PerRank]:
    """Return the item of a checkpoint that has the state of `mean`; `kind` says what its messages are."""
    return {f"sync-{kind}": PerRank(mean.rests)} if mean is not None else {}


class _Scatter(ReduceScatter):
    """A reduce-scatter of one group of parameters."""

    def __init__(self, name: str, mean: Feedback) -> None:
        self._name, self._mean = name, mean

    @override
    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    @override
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: object, async_op: bool = False
    ) -> None:
        rows = input_tensor.view(self._mean.world, -1)
        found = self._mean.scattered(self._name, rows)
        output_tensor.copy_(found if op == dist.ReduceOp.AVG else found * self._mean.world)
