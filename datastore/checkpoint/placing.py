"""Which saved bytes go where: the pieces of a step, as they were saved, against the pieces of tensors that are here.

The layouts need not be related: whatever a saved box and a local box have in common is one transfer. A tensor that
was saved by eight ranks is read by one, or by three, in the same way.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch

from datastore.checkpoint.format.manifest import Entry, PartInfo
from datastore.checkpoint.loading.reader import Transfer
from datastore.checkpoint.plan import Box, overlap
from datastore.checkpoint.tensors import local_piece, memory_key
from datastore.errors import CorruptError

__all__ = ["transfers_of", "unfit_tensors"]


def transfers_of(destinations: Mapping[str, torch.Tensor], parts: Sequence[PartInfo]) -> list[Transfer]:
    """Return what fills the local piece of each destination.

    Raises:
        CorruptError: the parts do not hold all of it.
    """
    sources: dict[str, list[tuple[Entry, int]]] = {}
    for info in parts:
        for entry in info.entries:
            sources.setdefault(entry.tensor, []).append((entry, info.chunk_bytes))
    return [
        transfer
        for name, tensor in destinations.items()
        for transfer in _transfers_into(name, tensor, sources.get(name, []))
    ]


def _transfers_into(name: str, tensor: torch.Tensor, sources: list[tuple[Entry, int]]) -> Iterator[Transfer]:
    piece = local_piece(tensor, name)
    left = piece.box.elements
    for entry, chunk_bytes in sources:
        shared = overlap(piece.box, Box(entry.offsets, entry.shape))
        if shared is not None:
            left -= shared.elements
            target = _cut(piece.tensor, shared.within(piece.box.starts))
            yield Transfer(entry, shared.within(entry.offsets), target, chunk_bytes)
    if left:
        hint = "Use an earlier step."
        raise CorruptError("a tensor was not saved as a whole", tensor=name, elements_missing=left, hint=hint)


def _cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dimension, (start, length) in enumerate(zip(box.starts, box.shape, strict=True)):
        tensor = tensor.narrow(dimension, start, length)
    return tensor


def unfit_tensors(destinations: Mapping[str, torch.Tensor], parts: Sequence[PartInfo]) -> list[str]:
    """Return a line for each destination that cannot hold what is saved although dtype and shape are right."""
    content: dict[str, set[tuple[object, ...]]] = {}
    for info in parts:
        for entry in info.entries:
            content.setdefault(entry.tensor, set()).add((entry.offsets, entry.shape, entry.digests))
    found = []
    homes: dict[tuple[object, ...], str] = {}
    for name, tensor in destinations.items():
        local = local_piece(tensor, name).tensor
        if any(stride == 0 and size > 1 for stride, size in zip(local.stride(), local.shape, strict=True)):
            found.append(f"{name}: an expanded tensor cannot be filled")
        first = homes.setdefault(memory_key(local), name) if local.numel() else name
        if content.get(first) != content.get(name):
            found.append(f"{name}: shares its memory with {first}, but they were saved with different values")
    return found
