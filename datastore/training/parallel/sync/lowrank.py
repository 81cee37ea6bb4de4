"""PowerSGD: a matrix of gradients travels as the product of two thin ones.

Each rank multiplies its matrix by a thin one that all have; the sum of the products, made orthogonal, is one factor, and what
it leaves of the matrix, averaged, the other, which is where the next step begins. What the product leaves out is added to the next
gradient. Vectors, and matrices that would not get smaller, are averaged as they are.

Source: T. Vogels, S. Karimireddy, M. Jaggi, "PowerSGD", arXiv:1905.13727, algorithms 1 and 2. torch has it as a communication
hook; that one keeps its state by the number of a bucket, from step 2 on, and pickles it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from datastore.training.parallel.sync.feedback import Averager, finite_or

__all__ = ["LowRank"]


class LowRank(Averager):
    """A mean of matrices of at most `rank`."""

    def __init__(self, world: int, *, rank: int) -> None:
        super().__init__(world)
        self._rank = rank

    @override
    def mean(self, key: str, tensors: Sequence[Tensor]) -> None:
        thin = [place for place, one in enumerate(tensors) if self._helps(one)]
        whole = [one for place, one in enumerate(tensors) if place not in set(thin)]
        rests = [self._rest(f"{key}.{place}.rest", tensors[place]) for place in thin]
        starts = [self._start(f"{key}.{place}.start", tensors[place]) for place in thin]
        if self._exact:
            self._average(tensors)
            return
        self._average(whole)
        matrices = [(tensors[place] + rest).view(len(rest), -1) for place, rest in zip(thin, rests, strict=True)]
        left = [matrix @ start for matrix, start in zip(matrices, starts, strict=True)]
        self._average(left)
        left = [torch.linalg.qr(one).Q for one in left]
        right = [matrix.T @ one for matrix, one in zip(matrices, left, strict=True)]
        self._average(right)
        for place, number in zip(thin, range(len(thin)), strict=True):
            product = left[number] @ right[number].T
            rests[number].copy_(finite_or(matrices[number] - product, 0.0).view_as(rests[number]))
            # A start of zeros, or of what is not finite, would stay so for ever.
            if bool(right[number].isfinite().all()) and bool(right[number].any()):
                starts[number].copy_(right[number])
            tensors[place].copy_(product.view_as(tensors[place]))

    def _helps(self, tensor: Tensor) -> bool:
        rows = len(tensor) if tensor.dim() > 1 else 0
        return bool(rows) and self._rank * (rows + tensor.numel() // rows) < tensor.numel()

    def _start(self, key: str, tensor: Tensor) -> Tensor:
        """Return the thin matrix that all ranks multiply by: the same random one at first."""
        if key not in self.rests:
            columns = tensor.numel() // len(tensor)
            drawn = torch.randn((columns, self._rank), generator=torch.Generator().manual_seed(columns))
            self.rests[key] = drawn.to(tensor.device)
        return self.rests[key]

    def _average(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite `tensors` with their means, in one message."""
        if not tensors:
            return
        flat = self._sum(torch.cat([one.flatten() for one in tensors])) / self.world
        for one, mean in zip(tensors, torch.split(flat, [one.numel() for one in tensors]), strict=True):
            one.copy_(mean.view_as(one))
