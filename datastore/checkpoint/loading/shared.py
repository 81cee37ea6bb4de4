"""Tensors of a running program that share memory: filled only if what was saved of them agrees.

Tied weights are the simple case: the same elements under two names, told by the digests of what was saved. Anything else
that overlaps - a lazy conjugate beside its origin, slices with common elements, a buffer made by `expand` - cannot be
told from outside. So it takes a detour: its saved values are read beside it, written into a copy of the memory, and
read back. If each comes back as it was saved, the memory can hold them all, and is filled; if not, nothing is loaded.
The price, paid by such tensors only, is memory for their values and for a copy of what they lie in.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from datastore.checkpoint.format.manifest import PartInfo
from datastore.checkpoint.tensors import local_piece, memory_key

__all__ = ["Detour", "contradictions", "detours", "fill", "untied"]


@dataclass(frozen=True, slots=True)
class Detour:
    """A tensor that is filled from `beside`, a tensor like it with memory of its own."""

    name: str
    live: torch.Tensor
    beside: torch.Tensor
    neighbours: tuple[str, ...]
    """What it shares memory with; empty if its own elements share it."""


def detours(destinations: Mapping[str, torch.Tensor]) -> list[Detour]:
    """Return those of `destinations` that share some of their memory, unless they are the same elements seen alike."""
    found = []
    for group in _overlapping({name: local_piece(tensor, name).tensor for name, tensor in destinations.items()}):
        for name in group:
            tensor = destinations[name]
            others = tuple(other for other in group if other != name)
            found.append(Detour(name, tensor, torch.empty_like(tensor, requires_grad=False), others))
    return found


def _overlapping(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    spans = sorted((str(t.device), t.data_ptr(), _extent_bytes(t), name) for name, t in tensors.items() if t.numel())
    group: list[str] = []
    place, end = "", 0
    for device, start, size_bytes, name in spans:
        if group and (device != place or start >= end):
            yield from _entangled(group, tensors)
            group = []
        place, end = device, max(end, start + size_bytes) if group else start + size_bytes
        group.append(name)
    yield from _entangled(group, tensors)


def _entangled(group: list[str], tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    if len({memory_key(tensors[name]) for name in group}) > 1 or any(_folds(tensors[name]) for name in group):
        yield group


def _extent_bytes(tensor: torch.Tensor) -> int:
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (reach + 1) * tensor.element_size()


def _folds(tensor: torch.Tensor) -> bool:
    """Return whether elements of `tensor` may share memory with one another."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def contradictions(found: Sequence[Detour]) -> list[str]:
    """Return a line for each tensor that cannot have its saved values, now in `beside`, together with its neighbours'."""
    copies: dict[tuple[object, ...], torch.UntypedStorage] = {}
    shadows = []
    for detour in found:
        live, beside = _local(detour)
        storage = live.untyped_storage()
        key = (live.device, storage.data_ptr())
        copies[key] = copy = copies[key] if key in copies else storage.clone()  # type: ignore[no-untyped-call]
        shadow = torch.empty(0, dtype=live.dtype, device=live.device)
        shadow.set_(copy, live.storage_offset(), live.shape, live.stride())
        shadow = shadow.conj() if live.is_conj() else shadow
        shadow = torch._neg_view(shadow) if live.is_neg() else shadow  # noqa: SLF001 - torch has no other name for it
        shadows.append((detour, shadow, beside))
    for _, shadow, beside in shadows:
        _copy(shadow, beside)
    wrong = (detour for detour, shadow, beside in shadows if not torch.equal(_bits(shadow), _bits(beside)))
    return [_contradiction(detour) for detour in wrong]


def _contradiction(detour: Detour) -> str:
    if not detour.neighbours:
        return f"{detour.name}: its elements share memory, but they were saved with different values"
    return f"{detour.name}: shares its memory with {detour.neighbours[0]}, but they were saved with different values"


def fill(found: Iterable[Detour]) -> None:
    """Write what lies beside into the tensors themselves."""
    for detour in found:
        _copy(*_local(detour))


def _local(detour: Detour) -> tuple[torch.Tensor, torch.Tensor]:
    return local_piece(detour.live, detour.name).tensor, local_piece(detour.beside, detour.name).tensor


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy, where torch refuses to write to a dimension that was expanded: once for all of it."""
    for dimension, (stride, size) in enumerate(zip(target.stride(), target.shape, strict=True)):
        if stride == 0 and size > 1:
            target, source = target.narrow(dimension, 0, 1), source.narrow(dimension, 0, 1)
    target.copy_(source)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    # A contiguous tensor of one element may have any stride, which `view` minds.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8)


def untied(destinations: Mapping[str, torch.Tensor], parts: Sequence[PartInfo]) -> list[str]:
    """Return a line for each destination that is the same memory as another one, while they were saved with different values."""
    content: dict[str, set[tuple[object, ...]]] = {}
    for info in parts:
        for entry in info.entries:
            content.setdefault(entry.tensor, set()).add((entry.offsets, entry.shape, entry.digests))
    found = []
    homes: dict[tuple[object, ...], str] = {}
    for name, tensor in destinations.items():
        local = local_piece(tensor, name).tensor
        first = homes.setdefault(memory_key(local), name) if local.numel() else name
        if content.get(first) != content.get(name):
            found.append(f"{name}: shares its memory with {first}, but they were saved with different values")
    return found
