"""Modules whose weight is stored packed, under the names of the compressed-tensors format `pack-quantized`.

An export is a copy therefore, and `transformers` and vLLM open it. Forward unpacks: it is there to measure the loss, not to be
fast.

    weight_packed      int32 [out, ceil(in * bits / 32)]       value + 2^(bits - 1), each row padded with zero bits
    weight_scale       float32 [out, 1] or [out, in / group]
    weight_zero_point  int32 [ceil(out * bits / 32), groups]   packed down the columns; not there if the grid is symmetric
    weight_shape       int64 [2]

Values are packed bit after bit, little end first, no bit wasted: thirty-two values of b bits fill b words exactly, so a value of three
bits may lie in two words. Each row begins a new word. Older versions of compressed-tensors left the last bits of a word empty where b
does not divide 32: their files of three bits are not read here, nor ours there.

Source: compressed-tensors 0.20, `compressors/pack_quantized`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from datastore.training.hooks.quantizing.grid import Grid, fitted_grid, round_inputs
from datastore.training.hooks.quantizing.settings import Scheme

__all__ = [
    "Packed",
    "PackedEmbedding",
    "PackedLinear",
    "blank_packed",
    "pack",
    "packed_layer",
    "packed_words",
    "replace_module",
    "unpack",
]

_VALUES = 32
"""That fill whole words, whatever their bits."""

_WORD = (1 << 32) - 1


def packed_words(columns: int, bits: int) -> int:
    """Return how many words a row of `columns` values takes."""
    return -(-columns * bits // 32)


def pack(whole: Tensor, bits: int) -> Tensor:
    """Return int8 [rows, columns] of `bits` bits each as int32 [rows, words]."""
    rows, columns = whole.shape
    values = functional.pad(whole.to(torch.int64) + (1 << (bits - 1)), (0, -columns % _VALUES)).view(rows, -1, _VALUES)
    words = values.new_zeros(rows, values.shape[1], bits + 1)
    for place in range(_VALUES):
        word, shift = divmod(place * bits, 32)
        wide = values[:, :, place] << shift
        words[:, :, word] |= wide & _WORD
        words[:, :, word + 1] |= wide >> 32
    flat = words[:, :, :bits].reshape(rows, -1)[:, : packed_words(columns, bits)]
    return torch.where(flat >= 1 << 31, flat - (1 << 32), flat).to(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return what `pack` was given, int8 [rows, columns]."""
    rows, words = packed.shape
    padded = functional.pad(packed.to(torch.int64) & _WORD, (0, -words % bits)).view(rows, -1, bits)
    padded = functional.pad(padded, (0, 1))
    values = padded.new_empty(rows, padded.shape[1], _VALUES)
    for place in range(_VALUES):
        word, shift = divmod(place * bits, 32)
        # Of the word behind, only the bits that can belong to this value: all 32 would not fit beside the first ones.
        wide = padded[:, :, word] | ((padded[:, :, word + 1] & ((1 << bits) - 1)) << 32)
        values[:, :, place] = (wide >> shift) & ((1 << bits) - 1)
    return (values.view(rows, -1)[:, :columns] - (1 << (bits - 1))).to(torch.int8)


class Packed(nn.Module):
    """A matrix that is stored packed."""

    def __init__(self, shape: tuple[int, int], scheme: Scheme) -> None:
        super().__init__()
        out, columns = self._shape = shape  # `weight_shape` is for files: reading a tensor of a GPU would wait for it.
        self.scheme = scheme
        self.weight_packed: Tensor
        self.weight_scale: Tensor
        self.weight_shape: Tensor
        groups = columns // (scheme.group or columns)
        self.register_buffer("weight_packed", torch.zeros(out, packed_words(columns, scheme.bits), dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(out, groups))
        self.register_buffer("weight_shape", torch.tensor([out, columns]))
        if not scheme.symmetric:
            words = packed_words(out, scheme.bits)
            self.register_buffer("weight_zero_point", torch.zeros(words, groups, dtype=torch.int32))

    def take(self, whole: Tensor, grid: Grid) -> None:
        """Store these integers, int8 [out, in], on this grid."""
        self.weight_packed, self.weight_scale = pack(whole, grid.bits), grid.scales.detach().clone()
        if grid.zeros is not None:
            self.weight_zero_point = pack(grid.zeros.detach().to(torch.int8).T.contiguous(), grid.bits).T.contiguous()

    @property
    def grid(self) -> Grid:
        """Scales and zero points."""
        zeros = None
        if not self.scheme.symmetric:
            zeros = unpack(self.weight_zero_point.T.contiguous(), self.scheme.bits, self._shape[0]).T.float()
        return Grid(self.weight_scale, zeros, self.scheme.bits)

    @property
    def whole(self) -> Tensor:
        """The integers, int8 [out, in]."""
        return unpack(self.weight_packed, self.scheme.bits, self._shape[1])

    @property
    def weight(self) -> Tensor:
        """The weight that the integers stand for, float32 [out, in]."""
        return self.grid.real(self.whole)

    @property
    def size_bytes(self) -> int:
        """Of all that is stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.buffers())


class PackedLinear(Packed):
    """A linear layer whose weight is stored packed."""

    def __init__(self, shape: tuple[int, int], scheme: Scheme, *, bias: Tensor | None = None) -> None:
        super().__init__(shape, scheme)
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the transposed weight."""
        return functional.linear(round_inputs(x) if self.scheme.activations else x, self.weight, self.bias)


class PackedEmbedding(Packed):
    """An embedding whose table is stored packed."""

    def forward(self, ids: Tensor) -> Tensor:
        """Return the row of each number."""
        return functional.embedding(ids, self.weight)


def blank_packed(layer: nn.Linear | nn.Embedding, scheme: Scheme) -> Packed:
    """Return a packed module in the shape of `layer`, to be filled."""
    out, columns = layer.weight.shape
    if isinstance(layer, nn.Embedding):
        return PackedEmbedding((out, columns), scheme)
    bias = None if layer.bias is None else layer.bias.detach().clone()
    return PackedLinear((out, columns), scheme, bias=bias)


def packed_layer(layer: nn.Linear | nn.Embedding, scheme: Scheme, stretch: Tensor | None = None) -> Packed:
    """Return `layer` rounded to nearest."""
    packed = blank_packed(layer, scheme)
    grid = fitted_grid(layer.weight, scheme, stretch)
    packed.take(grid.whole(layer.weight), grid)
    return packed


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place called `name`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
