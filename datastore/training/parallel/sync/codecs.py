"""Codecs: rows of float32 as rows of bytes, and back.

A row goes to one rank, so each is encoded by itself, and all rows of a message take the same number of bytes. Decoding depends on
the bytes alone: ranks that have the same message have the same numbers, bit by bit.

A value that is not finite makes its whole block not finite (or itself, where values stand alone), so that it is seen behind the mean.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["Blocks", "Brief", "Codec", "Largest", "Plain"]


class Codec(ABC):
    """A way to write [rows, values] as bytes."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Return `values` [R, n] of float32 as [R, m] of uint8."""

    @abstractmethod
    def decode(self, codes: Tensor, size: int) -> Tensor:
        """Return the [R, size] of float32 that `codes` [R, m] mean."""


class Plain(Codec):
    """Four bytes for each value, nothing lost."""

    @override
    def encode(self, values: Tensor) -> Tensor:
        return values.contiguous().view(torch.uint8)

    @override
    def decode(self, codes: Tensor, size: int) -> Tensor:
        return codes.contiguous().view(torch.float32)


class Brief(Codec):
    """bfloat16: two bytes for each value."""

    @override
    def encode(self, values: Tensor) -> Tensor:
        return values.to(torch.bfloat16).contiguous().view(torch.uint8)

    @override
    def decode(self, codes: Tensor, size: int) -> Tensor:
        return codes.contiguous().view(torch.bfloat16).float()


class Blocks(Codec):
    """Whole numbers of 8 or 4 bits, and a scale of float32 for each block of values: the largest of them is exact."""

    def __init__(self, *, bits: int, block: int) -> None:
        self._bits, self._block = bits, block
        self._top = 2 ** (bits - 1) - 1

    def _blocks(self, size: int) -> int:
        return -(-size // self._block)

    @override
    def encode(self, values: Tensor) -> Tensor:
        rows, size = values.shape
        blocks = self._blocks(size)
        padded = torch.nn.functional.pad(values, (0, blocks * self._block - size)).view(rows, blocks, self._block)
        scales = padded.abs().amax(2) / self._top
        divisor = torch.where(scales == 0, torch.ones_like(scales), scales)
        whole = (padded / divisor[..., None]).round_().clamp_(-self._top, self._top).nan_to_num_()
        numbers = whole.to(torch.int8).view(rows, -1)
        if self._bits == 4:
            pairs = (numbers + self._top).view(torch.uint8).view(rows, -1, 2)
            numbers = (pairs[..., 0] | (pairs[..., 1] << 4)).view(torch.int8)
        return torch.cat((scales.contiguous().view(torch.uint8), numbers.view(torch.uint8)), dim=1)

    @override
    def decode(self, codes: Tensor, size: int) -> Tensor:
        rows, blocks = len(codes), self._blocks(size)
        scales = codes[:, : 4 * blocks].contiguous().view(torch.float32)
        numbers = codes[:, 4 * blocks :].contiguous()
        if self._bits == 4:
            numbers = torch.stack((numbers & 15, numbers >> 4), dim=2).view(rows, -1)
            whole = numbers.float() - self._top
        else:
            whole = numbers.view(torch.int8).float()
        found: Tensor = (whole.view(rows, blocks, self._block) * scales[..., None]).view(rows, -1)
        return found[:, :size]


class Largest(Codec):
    """The values that are farthest from zero, with their places: eight bytes for each."""

    def __init__(self, *, keep: float) -> None:
        self._keep = keep

    def _kept(self, size: int) -> int:
        return min(size, max(1, math.ceil(self._keep * size)))

    @override
    def encode(self, values: Tensor) -> Tensor:
        places = values.abs().topk(self._kept(values.shape[1]), dim=1, sorted=False).indices
        kept = values.gather(1, places)
        return torch.cat((places.to(torch.int32).view(torch.uint8), kept.contiguous().view(torch.uint8)), dim=1)

    @override
    def decode(self, codes: Tensor, size: int) -> Tensor:
        half = 4 * self._kept(size)
        places = codes[:, :half].contiguous().view(torch.int32).long()
        kept = codes[:, half:].contiguous().view(torch.float32)
        return torch.zeros((len(codes), size), device=codes.device).scatter_(1, places, kept)
