"""The header of a safetensors file, so that a part is opened by any safetensors reader and by no special tool of ours.

    8 bytes   length of the JSON, little-endian
    JSON      {"__metadata__": {...}, name: {"dtype", "shape", "data_offsets"}}, padded with spaces
    data      the tensors, without gaps, in the order of the header

The padding makes the data start at a multiple of 4 KiB, and tensors stand in the order of falling item size, so each
one is aligned for its dtype: a reader may map the file or read past the page cache.

4-bit numbers have no address: torch holds two in a byte and counts bytes, safetensors counts numbers. `PAIRS` names them
as torch sees them; only in a header are they `F4`, with the last dimension doubled.

Source: https://github.com/huggingface/safetensors#format; for F4, safetensors 0.8.0 (bindings/python, `torch.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import orjson

__all__ = ["ALIGN_BYTES", "ITEM_BYTES", "PAIRS", "HeaderTensor", "encode_header"]

PAIRS = "F4_X2"
"""Two 4-bit floats in a byte."""

ALIGN_BYTES = 4096

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    PAIRS: 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of one element of each dtype."""


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor of the file, as its header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.item_bytes


def encode_header(tensors: Sequence[HeaderTensor], *, metadata: Mapping[str, str]) -> bytes:
    """Return the bytes that precede the data of `tensors`, laid end to end in this order; a multiple of `ALIGN_BYTES`."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    position = 0
    for tensor in tensors:
        stop = position + tensor.size_bytes
        dtype, shape = tensor.dtype, list(tensor.shape)
        if dtype == PAIRS:
            dtype, shape = "F4", [*shape[:-1], 2 * shape[-1]]
        table[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, stop]}
        position = stop
    text = orjson.dumps(table)
    padded = -(-(8 + len(text)) // ALIGN_BYTES) * ALIGN_BYTES - 8
    return padded.to_bytes(8, "little") + text.ljust(padded, b" ")
