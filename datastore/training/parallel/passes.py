"""The memory of a step, found without taking it: its passes run on tensors that have shapes and no numbers.

torch computes with such tensors what it would otherwise only learn by doing: which tensors there are at which moment. So any
model, objective and precision is measured alike, and nothing is allocated. What an allocator rounds up, and what a kernel takes
for itself inside of one operation, is not seen.

    kept     at the end of each pass every gradient is there, as on one rank and under DistributedDataParallel
    freed    each gradient goes as soon as it is there, as under FSDP2, which sums it up over ranks
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from datastore.training.models.huggingface import units_of

__all__ = ["Ledger", "bytes_of", "gathered_bytes", "imagined", "peak_of"]


@contextmanager
def imagined() -> Iterator[None]:
    """Make tensors in the block such that have shapes and no numbers.

    Torch 2.13 gives a module another place or dtype by swapping its tensors, which it refuses for those that the block makes, as the
    mode holds weak references to them (pytorch issue 170770): here they take over the other's contents.
    """
    swap, torch.utils.swap_tensors = torch.utils.swap_tensors, _become
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.utils.swap_tensors = swap


def _become(tensor: Tensor, other: Tensor) -> None:
    tensor.data = other.data


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that come to be while it is entered, now and at most; those `there` before are not counted."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now_bytes = self.most_bytes = 0
        self._seen: dict[int, weakref.ref[Any]] = {}
        self._there = {id(storage): storage for storage in (one.untyped_storage() for one in there)}

    @override
    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, Tensor):
                self._count(one)
        return found

    def _count(self, tensor: Tensor) -> None:
        """Count what lies under `tensor`, once for all that share it, until nobody has it any more."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._seen or key in self._there:
            return

        def forget(_gone: object) -> None:
            del self._seen[key]
            self.now_bytes -= size

        self._seen[key] = weakref.ref(storage, forget)
        self.now_bytes += size
        self.most_bytes = max(self.most_bytes, self.now_bytes)


def peak_of(model: nn.Module, learn: Callable[[], Tensor], *, passes: int, kept: bool, ledger: Ledger) -> int:
    """Return the most bytes that there are at once beyond those that `ledger` knows, in `passes` forward and backward.

    `learn` returns the loss of one pass of the imagined `model`. More than two passes need what two do.
    """
    trained = [] if kept else [one for one in model.parameters() if one.requires_grad]
    hooks = [one.register_post_accumulate_grad_hook(_free) for one in trained]  # type: ignore[no-untyped-call]
    before = ledger.most_bytes = ledger.now_bytes
    try:
        with ledger:
            for _ in range(min(passes, 2)):
                learn().backward()  # type: ignore[no-untyped-call]
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    return int(ledger.most_bytes - before)


def _free(parameter: Tensor) -> None:
    parameter.grad = None


def bytes_of(tensors: Iterable[Tensor], *, over: int = 1) -> int:
    """Return the bytes of `tensors`, each spread by its first dimension over so many ranks, on the rank that has most."""
    total: int = 0
    for one in tensors:
        rows = int(one.shape[0]) if one.dim() else 1
        total += -(-rows // over) * (one.numel() // max(1, rows)) * one.element_size()
    return int(total)


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes that FSDP2 has gathered at most: what is in no unit of blocks, and two units, of which one is on its way."""
    units = [bytes_of({one for block in unit for one in block.parameters()}) for unit in units_of(model)]
    return bytes_of(model.parameters()) - sum(units) + sum(sorted(units)[-2:])
