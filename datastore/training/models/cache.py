"""Keys and values of the tokens seen so far, so that generation feeds only new tokens: as they are, or as integers of 8 bits.

With 8 bits each head of each token has a scale of its own, its largest magnitude over 127: what is stored later changes nothing that is
stored already, so a text read at once and one read token by token are rounded alike. Of one layer at a time the real values are made, for
its attention; the memory that grows with the text is (D + 4) / 4 D of what float32 takes, 0.27 for heads of a width of 64.

Legend: B batch, K heads of keys and values, T tokens, D width of a head.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

__all__ = ["KeyValueCache", "RoundedCache"]

_TOP = 127
"""The largest integer; the least is its negative."""


@dataclass(slots=True)
class KeyValueCache:
    """Keys and values as they are, one pair [B, K, T, D] per layer."""

    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return self.pairs[0][0].shape[2] if self.pairs else 0

    @property
    def size_bytes(self) -> int:
        """Bytes that are kept."""
        return sum(one.nbytes for pair in self.pairs for one in pair)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the new keys and values of `layer` and return all of them."""
        if layer == len(self.pairs):
            self.pairs.append((keys, values))
        else:
            before = self.pairs[layer]
            self.pairs[layer] = (torch.cat((before[0], keys), dim=2), torch.cat((before[1], values), dim=2))
        return self.pairs[layer]


@dataclass(slots=True)
class RoundedCache(KeyValueCache):
    """Keys and values as int8, one pair per layer, and their scales: float32 [B, K, T, 1]."""

    scales: KeyValueCache = field(default_factory=KeyValueCache)

    @property
    @override
    def size_bytes(self) -> int:
        return sum(one.nbytes for pair in (*self.pairs, *self.scales.pairs) for one in pair)

    @override
    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        (whole_keys, key_scales), (whole_values, value_scales) = _rounded(keys), _rounded(values)
        # Not super(): a dataclass with slots is another class than the one that its methods were written in.
        wholes = KeyValueCache.extend(self, layer, whole_keys, whole_values)
        scales = self.scales.extend(layer, key_scales, value_scales)
        found = [(whole * scale).to(keys.dtype) for whole, scale in zip(wholes, scales, strict=True)]
        return found[0], found[1]


def _rounded(real: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers of [B, K, T, D], and their scales [B, K, T, 1]."""
    scales = real.float().abs().amax(dim=-1, keepdim=True) / _TOP
    scales = torch.where(scales == 0, 1.0, scales)
    return torch.round(real.float() / scales).to(torch.int8), scales
