"""A mean over ranks in fewer bytes, with error feedback: what a message leaves out is added to the next one.

Two messages make a mean that all ranks have: each rank gets its part of every rank's values (reduce-scatter), takes the
mean of what it has decoded, in the order of ranks, and sends that to all (all-gather). Both are encoded, and both leave a rest:
that of a rank's own values, and that of the part of the mean it makes. The rests are the state. FSDP2 wants the first message only.

A rest that is not finite is dropped: a step that overflowed must not spoil all later ones.

Source: F. Seide et al., "1-bit stochastic gradient descent", Interspeech 2014 (error feedback); H. Tang et al., "1-bit Adam",
arXiv:2102.02888 (two messages, a rest for each).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from datastore.training.parallel.sync.codecs import Codec

__all__ = ["Averager", "Feedback", "finite_or"]


class Averager(ABC):
    """A mean over all ranks with a memory. Messages go by a key, and each key has its own part of the memory."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.sent_bytes = 0
        """What this rank has sent to others since it started."""

        self.rests: dict[str, Tensor] = {}
        """The state, live: as each rank has its own, and as it must be restored for the same bits."""

        self._exact = False

    @abstractmethod
    def mean(self, key: str, tensors: Sequence[Tensor]) -> None:
        """Overwrite `tensors`, views of one message, with their means over ranks."""

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Neither compress nor change the state while the block runs; state that would come to be is made."""
        self._exact = True
        try:
            yield
        finally:
            self._exact = False

    def _rest(self, key: str, like: Tensor) -> Tensor:
        if key not in self.rests:
            self.rests[key] = torch.zeros_like(like)
        return self.rests[key]

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over ranks, made in place."""
        if self.world > 1:
            dist.all_reduce(values)
            self.sent_bytes += 2 * values.nbytes * (self.world - 1) // self.world
        return values


class Feedback(Averager):
    """A mean in a codec."""

    def __init__(self, codec: Codec, world: int) -> None:
        super().__init__(world)
        self._codec = codec

    @override
    def mean(self, key: str, tensors: Sequence[Tensor]) -> None:
        flat = torch.cat([one.flatten() for one in tensors])
        part = -(-len(flat) // self.world)
        rows = torch.nn.functional.pad(flat, (0, part * self.world - len(flat))).view(self.world, part)
        means = self.gathered(key, self.scattered(key, rows))[: len(flat)]
        for one, mean in zip(tensors, torch.split(means, [one.numel() for one in tensors]), strict=True):
            one.copy_(mean.view_as(one))

    def scattered(self, key: str, rows: Tensor) -> Tensor:
        """Return the mean over ranks of that row of `rows` [world, n] which has this rank's number."""
        codes = self._encode(f"{key}.own", rows)
        if codes is None:
            received = torch.empty_like(rows)
            dist.all_to_all_single(received, rows.contiguous())
            return received.mean(0)
        received = torch.empty_like(codes)
        dist.all_to_all_single(received, codes)
        self.sent_bytes += codes[0].numel() * (self.world - 1)
        return self._codec.decode(received, rows.shape[1]).mean(0)

    def gathered(self, key: str, part: Tensor) -> Tensor:
        """Return the parts of all ranks, one after the other."""
        codes = self._encode(f"{key}.mean", part[None])
        sent = part.contiguous() if codes is None else codes[0]
        received = torch.empty((self.world * len(sent),), dtype=sent.dtype, device=sent.device)
        dist.all_gather_single(received, sent)
        if codes is None:
            return received
        self.sent_bytes += sent.numel() * (self.world - 1)
        return self._codec.decode(received.view(self.world, -1), len(part)).flatten()

    def _encode(self, key: str, values: Tensor) -> Tensor | None:
        """Return `values` and the rest of the message before as bytes, and keep what they leave out; None: send as they are."""
        rest = self._rest(key, values)
        if self._exact:
            return None
        values = values + rest
        codes = self._codec.encode(values)
        rest.copy_(finite_or(values - self._codec.decode(codes, values.shape[1]), 0.0))
        return codes


def finite_or(values: Tensor, other: Tensor | float) -> Tensor:
    """Return `values`, with `other` in the place of what is not finite."""
    return torch.where(values.isfinite(), values, other)
