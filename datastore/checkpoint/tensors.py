"""Tensors as bytes and as boxes of a whole: which can be stored, which part is here, who writes it, where it goes.

A tensor that cannot be told apart by dtype, shape and bytes (sparse, on the meta device, of an unknown
subclass) is refused by name rather than stored half. A DTensor is one piece of a whole; ranks that hold the same
piece agree without a word that the one at coordinate 0 of the mesh dimensions it is replicated over writes it, in the first
slice of the mesh if the tensor lies on one of several.

Who writes which tensor, and where pieces of tensors meet, is pure arithmetic that every rank does alike. No rank asks another: the owner of a tensor that all ranks hold follows from the sizes alone, and a shard's place in
the whole follows from its layout. The price is that ranks must hold the same state; the commit checks that they did.
"""

import heapq
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from datastore.checkpoint.format.checks import coverage_fault
from datastore.checkpoint.format.manifest import Entry
from datastore.checkpoint.format.tree import TensorSpec
from datastore.checkpoint.format.wrapped import is_wrapper
from datastore.errors import ConfigError, ConflictError
from datastore.formats.safetensors import PAIRS

__all__ = [
    "DTYPES",
    "Box",
    "Bytes",
    "TensorPiece",
    "box_at",
    "byte_view",
    "check_coverage",
    "describe",
    "local_piece",
    "memory_key",
    "overlap",
    "owners",
    "row_span",
    "spec_text",
]

Bytes = NDArray[np.uint8]

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float4_e2m1fn_x2: PAIRS,
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}

DTYPES = {name: dtype for dtype, name in _NAMES.items()}
"""The torch dtype of each dtype that a step knows: those of safetensors, 4-bit numbers in pairs."""

_PLAIN = (torch.Tensor, torch.nn.Parameter)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region of a tensor: where it starts and how far it goes, in elements of each dimension."""

    starts: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has; 1 for a scalar."""
        return prod(self.shape)

    def within(self, offsets: tuple[int, ...]) -> "Box":
        """Return the same region, counted from `offsets` instead of from the start of the whole."""
        return Box(tuple(start - offset for start, offset in zip(self.starts, offsets, strict=True)), self.shape)


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """The part of a tensor that is in this process."""

    tensor: torch.Tensor
    """Detached; writing to it writes to the original."""

    box: Box
    replicated: bool
    """Whether every rank holds the whole of it."""

    first: bool
    """Whether this rank is the first of those that hold this piece."""


def describe(value: Any, name: str) -> TensorSpec | None:
    """Return dtype and global shape of `value` if it is a tensor, else None.

    Raises:
        ConfigError: a tensor of a kind that cannot be stored; `name` is in the message.
    """
    if not isinstance(value, torch.Tensor):
        return None
    reason = _unfit(value)
    if reason:
        kind = type(value).__name__
        raise ConfigError(f"this tensor cannot be stored: {reason}", path=name, type=kind, hint=_way_out(value))
    return TensorSpec(_NAMES[value.dtype], tuple(value.shape))


def spec_text(tensor: torch.Tensor) -> str:
    """Return dtype and global shape of any tensor, also of one that cannot be stored: as text, to be compared."""
    return str(TensorSpec(_NAMES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)))


def _unfit(tensor: torch.Tensor) -> str:
    if tensor.is_nested or not (_is_dtensor(tensor) or type(tensor) in _PLAIN):
        return "it is nested" if tensor.is_nested else "its class is not known"
    if tensor.layout != torch.strided:
        return f"its layout is {tensor.layout}"
    if tensor.is_meta:
        return "it is on the meta device and has no data"
    if tensor.dtype not in _NAMES:
        return f"safetensors has no {tensor.dtype}"
    if _NAMES[tensor.dtype] == PAIRS and not tensor.dim():
        return "safetensors has no two 4-bit numbers without a dimension"
    return ""


def _way_out(tensor: torch.Tensor) -> str:
    """Return what to do with a tensor that cannot be stored."""
    if tensor.is_meta:
        return 'Call model.to_empty(device="cpu") first, or name another device.'
    if tensor.is_nested:
        return "Store a list of its parts, tensor.unbind(), and make it of them after the restore."
    if tensor.is_complex():
        return "Store torch.view_as_real(tensor), and make it complex after the restore."
    return "Convert it to a dense torch.Tensor, or leave it out of the state."


def local_piece(tensor: torch.Tensor, name: str) -> TensorPiece:
    """Return the part of `tensor` that is in this process.

    Raises:
        ConfigError: a DTensor holds partial sums, which have no value yet, or quantized shards, or is no box of the whole.
    """
    if _is_dtensor(tensor):
        return _shard(tensor, name)
    whole = Box((0,) * tensor.dim(), tuple(tensor.shape))
    return TensorPiece(tensor.detach(), whole, replicated=True, first=True)


def _is_dtensor(value: torch.Tensor) -> bool:
    # Looked up, not imported: a process that holds a DTensor has the module, all others save the import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def _shard(tensor: Any, name: str) -> TensorPiece:
    mesh, placements = tensor.device_mesh, tensor.placements
    if any(placement.is_partial() for placement in placements):
        hint = "Reduce it first: tensor.redistribute(placements=[Replicate()])."
        raise ConfigError("this DTensor holds partial sums", path=name, hint=hint)
    coordinate = mesh.get_coordinate()
    local = tensor.detach().to_local()
    if is_wrapper(local):
        hint = "Where a state is sharded, keep it in plain numbers: use an optimizer that does not quantize it."
        raise ConfigError("the shards of this DTensor are made of other tensors", path=name, hint=hint)
    if coordinate is None:
        return TensorPiece(local, Box((0,) * tensor.dim(), (0,) * tensor.dim()), replicated=False, first=False)
    box = box_at(coordinate, tensor.shape, placements, mesh.shape)
    if box is None or box.shape != tuple(local.shape):
        hint = "Redistribute it to plain shards, or shard another dimension."
        raise ConfigError("this DTensor is no box of the whole", path=name, placements=str(placements), hint=hint)
    alike = not tensor.numel()  # All ranks hold the same nothing.
    first = all(at == 0 for at, layout in zip(coordinate, placements, strict=True) if alike or layout.is_replicate())
    return TensorPiece(local, box, replicated=False, first=first and _is_first_slice(mesh))


def _is_first_slice(mesh: Any) -> bool:
    """Return whether `mesh` is no slice of a larger one, or of all slices like it the first, the one that has the first rank.

    The other slices hold copies: what FSDP2 cuts over the ranks of `mesh["data"]` is the same for each rank of `mesh["tensor"]`, in modules
    that tensor parallelism leaves as they are.
    """
    root = getattr(mesh, "_root_mesh", None)  # Nothing public tells of which mesh this is a slice.
    return root is None or bool((mesh.mesh == root.mesh.flatten()[0]).any())


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"


def box_at(
    coordinate: Sequence[int], shape: Sequence[int], placements: Sequence[Any], sizes: Sequence[int]
) -> Box | None:
    """Return the piece of a tensor of `shape` that is at `coordinate` of a mesh of `sizes`; None: its elements may lie apart.

    Each mesh dimension cuts what those before it have left, the last pieces being shorter or empty. Only what FSDP2 cuts from the shards of tensor
    parallelism, along the same dimension, is cut the other way round: the strided one, to the left, after the one to its right.
    torch's `compute_local_shape_and_global_offset` gives other pieces then if rows do not divide (2.13: 7 rows on 3 x 2 ranks).
    """
    starts, lengths = [0] * len(shape), list(shape)
    for i in sorted(range(len(sizes)), key=lambda i: _is_strided(placements[i])):
        placement = placements[i]
        dimension = getattr(placement, "dim", None)
        if dimension is None:
            continue
        others = [j for j, other in enumerate(placements) if j != i and getattr(other, "dim", None) == dimension]
        if _is_strided(placement) and [(j > i, sizes[j]) for j in others] != [(True, placement.split_factor)]:
            return None
        chunk = -(-lengths[dimension] // sizes[i])
        begin = min(coordinate[i] * chunk, lengths[dimension])
        starts[dimension] += begin
        lengths[dimension] = min(chunk, lengths[dimension] - begin)
    return Box(tuple(starts), tuple(lengths))


def byte_view(tensor: torch.Tensor) -> Bytes | None:
    """Return the bytes of `tensor`, shared and writable, or None if they do not lie in this memory one after the other."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
        return None
    count = tensor.numel()
    if not count:
        return np.empty(0, dtype=np.uint8)
    # A contiguous tensor of one element may have any stride, which `view` minds.
    view: Bytes = tensor.detach().as_strided((count,), (1,)).view(torch.uint8).numpy()
    return view


def memory_key(tensor: torch.Tensor) -> tuple[object, ...]:
    """Return what two tensors have in common exactly if they are the same elements of the same memory, seen alike.

    A lazy conjugate or negative shares memory, shape and strides with its origin: the two bits alone tell them apart.
    """
    seen = (tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), *seen)


def owners(sizes: Mapping[str, int], *, world: int) -> dict[str, int]:
    """Return the rank that writes each tensor: largest first, each to the rank with the fewest bytes so far.

    Equal on every rank that has the same `sizes`. The most loaded rank has at most 4/3 of the best possible share.

    Source: R. L. Graham, "Bounds on Multiprocessing Timing Anomalies", 1969 (longest processing time first).
    """
    loads = [(0, rank) for rank in range(world)]
    owner: dict[str, int] = {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, rank = loads[0]
        owner[name] = rank
        heapq.heapreplace(loads, (load + size, rank))
    return owner


def overlap(one: Box, other: Box) -> Box | None:
    """Return the region that two boxes of the same whole share, or None if there is not one element in it."""
    starts, shape = [], []
    for a, b, rows, others in zip(one.starts, other.starts, one.shape, other.shape, strict=True):
        start = max(a, b)
        length = min(a + rows, b + others) - start
        if length <= 0:
            return None
        starts.append(start)
        shape.append(length)
    return Box(tuple(starts), tuple(shape))


def row_span(box: Box, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the range [first, last + 1) of element numbers that `box` touches in a row-major array of `shape`."""
    first = last = 0
    for start, length, size in zip(box.starts, box.shape, shape, strict=True):
        first = first * size + start
        last = last * size + start + length - 1
    return first, last + 1


def check_coverage(specs: Mapping[str, TensorSpec], entries: Iterable[Entry]) -> None:
    """Raise unless the pieces of each tensor in `specs` add up to the whole, and there is nothing else.

    Raises:
        ConflictError: elements are missing or written twice, which is what happens when ranks hold different state.
    """
    fault = coverage_fault(specs, entries)
    if fault is not None:
        hint = "Save the same state on every rank, with the same rank and world."
        raise ConflictError(fault[0], tensor=fault[1], hint=hint)
