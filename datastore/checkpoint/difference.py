"""Two steps held against each other: which tensors are the same, which have changed and by how much, which one side only has.

What has the same digests is the same, and is not read. Of the rest both sides are read whole and verified, one tensor at a time, and
compared in float64. The steps may be of different runs, and of any layouts.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from datastore.checkpoint.format.manifest import Entry, StepCommit, plain_item
from datastore.checkpoint.format.tree import TensorSpec, specs, unpack
from datastore.checkpoint.loading.reader import Reader, transfers_of
from datastore.checkpoint.steps import StepLog, WholeStep
from datastore.checkpoint.tensors import DTYPES
from datastore.errors import ConfigError
from datastore.storage.base import Storage
from datastore.units import Progress

__all__ = ["StepDifference", "TensorChange", "difference"]

_THREADS = 2


@dataclass(frozen=True, slots=True)
class TensorChange:
    """How a tensor differs."""

    name: str
    before: str
    after: str
    """Dtype and shape on each side."""

    changed: float | None = None
    """Share of its elements that differ; None where dtype or shape do."""

    largest: float | None = None
    """The largest difference of an element; NaN where one side is NaN and the other is not."""

    relative: float | None = None
    """Norm of the difference over the norm of what was before; infinite where that was zero."""


@dataclass(frozen=True, slots=True)
class StepDifference:
    """What differs between two steps."""

    before: str
    after: str
    """Each as RUN@STEP."""

    same: int
    """Tensors that are the same on both sides."""

    changed: list[TensorChange]
    only_before: list[str]
    only_after: list[str]
    values: dict[str, tuple[Any, Any]]
    """Plain values that differ, by their path; None on the side that lacks one."""

    metrics: dict[str, tuple[Any, Any]]


def difference(
    before: tuple[Storage, int], after: tuple[Storage, int], *, item: str = "", progress: Progress | None = None
) -> StepDifference:
    """Return what differs between two steps, each a run and a number, or in one `item` of them. `progress` counts the tensors that must be read.

    Takes the time to read what has changed twice, and memory for two tensors.

    Raises:
        MissingError: there is no such step.
        ConfigError: neither step has the item.
        CorruptError: what was read is damaged.
    """
    sides = [(storage, StepLog(storage).read_whole(step)) for storage, step in (before, after)]
    skeletons = [_skeletons(whole.commit, item) for _, whole in sides]
    if item and not any(skeletons):
        there = sorted({plain_item(name) for _, whole in sides for name in whole.commit.items})
        raise ConfigError("neither step has such an item", item=item, items=there, hint="Name one that is there.")
    wanted = [_specs(each) for each in skeletons]
    digests = [_digests(whole) for _, whole in sides]
    both = [name for name in wanted[0] if name in wanted[1]]
    differ = [name for name in both if wanted[0][name] != wanted[1][name] or digests[0][name] != digests[1][name]]
    changes = []
    for done, name in enumerate(differ):
        if progress is not None:
            progress(done, len(differ))
        change = _change(name, sides, wanted)
        if change is not None:
            changes.append(change)
    if progress is not None:
        progress(len(differ), len(differ))
    commits = [whole.commit for _, whole in sides]
    return StepDifference(
        before=f"{before[0].url}@{before[1]}",
        after=f"{after[0].url}@{after[1]}",
        same=len(both) - len(changes),
        changed=changes,
        only_before=[name for name in wanted[0] if name not in wanted[1]],
        only_after=[name for name in wanted[1] if name not in wanted[0]],
        values=_values(*(dict(_plain(each)) for each in skeletons)),
        metrics=_values(*(unpack(commit.metrics, name="metrics", tensors={}) for commit in commits)),
    )


def _skeletons(commit: StepCommit, item: str) -> dict[str, Any]:
    """Return the items of a step, or those of one name."""
    return {name: each for name, each in commit.items.items() if item in ("", plain_item(name))}


def _specs(items: Mapping[str, Any]) -> dict[str, TensorSpec]:
    return {name: spec for item in items for name, spec in specs(items[item], name=item)}


def _digests(whole: WholeStep) -> dict[str, frozenset[tuple[object, ...]]]:
    """Return for each tensor what it is the same by: the boxes that it is stored in, with their digests."""
    found: dict[str, set[tuple[object, ...]]] = {}
    for info in whole.parts:
        for entry in info.entries:
            found.setdefault(entry.tensor, set()).add(_named(entry, info.chunk_bytes))
    return {name: frozenset(parts) for name, parts in found.items()}


def _named(entry: Entry, chunk_bytes: int) -> tuple[object, ...]:
    return entry.offsets, entry.shape, entry.digests, chunk_bytes


def _change(
    name: str, sides: list[tuple[Storage, WholeStep]], wanted: list[dict[str, TensorSpec]]
) -> TensorChange | None:
    """Return how a tensor differs; None if it does not: other ranks may have cut it otherwise."""
    shown = str(wanted[0][name]), str(wanted[1][name])
    if shown[0] != shown[1]:
        return TensorChange(name, *shown)
    old, new = (_read(*side, name, each[name]) for side, each in zip(sides, wanted, strict=True))
    if torch.equal(_bits(old), _bits(new)):
        return None
    if old.dtype.is_complex:
        old, new = torch.view_as_real(old), torch.view_as_real(new)
    if not _is_number(old):
        share = (_bits(old) != _bits(new)).double().mean().item()
        return TensorChange(name, *shown, share)
    first, second = old.double(), new.double()
    # Infinity less infinity is nothing to speak of.
    apart = torch.where(first == second, 0.0, second - first)
    share = ((first != second) & ~(first.isnan() & second.isnan())).double().mean().item()
    norm, scale = apart.norm().item(), first.norm().item()
    relative = norm / scale if scale else math.inf if norm else 0.0
    return TensorChange(name, *shown, share, apart.abs().max().item(), relative)


def _is_number(tensor: torch.Tensor) -> bool:
    try:
        tensor[:0].double()
    except (RuntimeError, TypeError, IndexError):
        return tensor.dim() == 0
    return True


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)


def _read(storage: Storage, whole: WholeStep, name: str, spec: TensorSpec) -> torch.Tensor:
    target = torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    reader = Reader(storage, transfers_of({name: target}, whole.parts), threads=_THREADS)
    reader.deliver()
    return target


def _plain(items: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield every plain value of the items, by its path."""
    for item, skeleton in items.items():
        stand_ins = {name: ... for name, _ in specs(skeleton, name=item)}
        yield from _leaves(unpack(skeleton, name=item, tensors=stand_ins), item)


def _leaves(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{path}/{index}")
    elif value is not ...:
        yield path, value


def _values(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = {**before, **after}
    return {
        name: (before.get(name), after.get(name))
        for name in names
        if not _same(before.get(name), after.get(name)) or (name in before) != (name in after)
    }


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or (one != one and other != other))  # noqa: PLR0124 - NaN
