"""Checks of documents whose digests are right: a step that passes can be read without a surprise.

A digest says that a document is as it was written, not that what was written makes sense: another program, or a fault of
this one, may have written it. So the numbers in it are compared with one another, and then with the sizes of files,
before memory is set aside or state is overwritten. Whatever disagrees is a `CorruptError`, as damage is.

Checked is also what bounds the work: two ranges of a part are the same or have no byte in common, so no byte is verified
twice; and a chunk is neither tiny nor huge. All in O(n log n) for n entries.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from datastore.checkpoint.format.manifest import DIGEST_HEX, Entry, PartInfo, PartRef, StepCommit, is_part_key
from datastore.checkpoint.format.tree import MAX_DEPTH, TensorSpec, specs
from datastore.errors import CorruptError
from datastore.formats.safetensors import ITEM_BYTES

__all__ = ["PlacedBox", "Shape", "check_commit", "check_info", "check_parts", "check_ranges", "coverage_fault"]

_CHUNK_BYTES = range(2**16, 2**26 + 1)
"""How large a chunk may be; 4 MiB is what is written."""

_MAX_DIMENSIONS = 64

_MAX_ELEMENTS = 2**60

_DIGESTS = re.compile(r"[0-9a-f]*")

_INTEGER = re.compile(r"-?0x[0-9a-f]+")

Shape = tuple[int, ...]

PlacedBox = tuple[Shape, Shape]
"""Where a box starts, and how far it goes."""


def check_commit(commit: StepCommit, *, where: str) -> None:
    """Raise `CorruptError` unless the values of `commit` are skeletons, and its parts could be those of its ranks."""
    for name, item in (*commit.items.items(), ("metrics", commit.metrics)):
        fault = _fault_of(item, 0)
        if fault or not isinstance(item, dict) or item.get("$", "map") != "map":
            raise _corrupt(f"the state of an item is not readable: {fault or 'it is no map'}", where, item=name)
    if any(specs(commit.metrics, name="metrics")):
        raise _corrupt("metrics hold a tensor", where)
    if len(commit.parts) != commit.world or any(ref.rank != i for i, ref in enumerate(commit.parts)):
        raise _corrupt("the parts are not one for each rank", where, world=commit.world)
    documents = [ref.info for ref in commit.parts]
    tensors = [*(ref.part for ref in commit.parts if ref.part), *commit.uses]
    for keys, suffix in ((documents, "json"), (tensors, "safetensors")):
        odd = next((key for key in keys if not is_part_key(key, suffix)), None)
        if odd is not None:
            raise _corrupt("not the name of a part", where, key=odd)


def _fault_of(value: Any, depth: int) -> str:
    """Return what is wrong with a skeleton, or nothing."""
    if depth > MAX_DEPTH:
        return "it is nested too deeply"
    if isinstance(value, list):
        return _first(_fault_of(inner, depth + 1) for inner in value)
    if not isinstance(value, dict):
        return ""
    if "$" not in value:
        return _first(_fault_of(inner, depth + 1) for inner in value.values())
    return _fault_of_marked(value, depth)


def _fault_of_marked(value: dict[str, Any], depth: int) -> str:
    kind = value["$"]
    match value:
        case {"$": "tensor", "dtype": str(dtype), "shape": list(shape)} if len(value) == 3:
            good = dtype in ITEM_BYTES and _is_shape(shape)
        case {"$": "tuple", "values": list(values)} if len(value) == 2:
            return _fault_of(values, depth)
        case {"$": "float", "value": "nan" | "inf" | "-inf"}:
            good = len(value) == 2
        case {"$": "int", "value": str(text)}:
            good = len(value) == 2 and _INTEGER.fullmatch(text) is not None
        case {"$": "map", "pairs": list(pairs)} if len(value) == 2:
            if not all(isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int) for pair in pairs):
                return "a map has something that is no pair"
            if len({str(key) for key, _ in pairs}) < len(pairs):
                return "a map has a key twice"
            return _first(_fault_of(inner, depth + 1) for _, inner in pairs)
        case _:
            good = False
    return "" if good else f"not a value of the kind {kind!r}"


def _first(faults: Iterable[str]) -> str:
    return next(filter(None, faults), "")


def _is_shape(shape: Sequence[Any]) -> bool:
    return (
        len(shape) <= _MAX_DIMENSIONS
        and all(type(length) is int and length >= 0 for length in shape)
        # An empty tensor has strides all the same.
        and prod(max(length, 1) for length in shape) <= _MAX_ELEMENTS
    )


def check_info(info: PartInfo, *, where: str) -> None:
    """Raise `CorruptError` unless each entry of `info` is a box inside of its tensor, as many bytes and digests as that is."""
    if info.chunk_bytes not in _CHUNK_BYTES:
        raise _corrupt("the size of a chunk is out of range", where, chunk_bytes=info.chunk_bytes)
    if (info.data_start > info.size_bytes) or (not info.part and info.size_bytes):
        raise _corrupt("a part is shorter than its header", where, size_bytes=info.size_bytes, header=info.data_start)
    for entry in info.entries:
        fault = _fault_of_entry(entry, info)
        if fault:
            raise _corrupt(fault, where, tensor=entry.tensor, part=entry.part, start=entry.start, stop=entry.stop)


def _fault_of_entry(entry: Entry, info: PartInfo) -> str:
    if entry.dtype not in ITEM_BYTES:
        return f"an entry has a dtype that is not known, {entry.dtype}"
    if not _is_shape(entry.global_shape) or not _lies_within(entry):
        return "an entry is no box inside of its tensor"
    size_bytes = prod(entry.shape) * ITEM_BYTES[entry.dtype]
    if entry.stop - entry.start != size_bytes:
        return f"an entry has not the {size_bytes} bytes of its dtype and shape"
    if len(entry.digests) != DIGEST_HEX * -(-size_bytes // info.chunk_bytes) or not _DIGESTS.fullmatch(entry.digests):
        return "an entry has not one digest for each chunk"
    inside = info.data_start <= entry.start <= entry.stop <= info.size_bytes
    return "" if is_part_key(entry.part, "safetensors") and (inside or entry.part != info.part) else _OUTSIDE


_OUTSIDE = "an entry lies outside of the data of a part"


def _lies_within(entry: Entry) -> bool:
    dimensions = len(entry.global_shape)
    return len(entry.shape) == len(entry.offsets) == dimensions and all(
        start + length <= size
        for start, length, size in zip(entry.offsets, entry.shape, entry.global_shape, strict=True)
    )


def check_parts(commit: StepCommit, parts: Sequence[PartInfo], refs: Sequence[PartRef], *, where: str) -> None:
    """Raise `CorruptError` unless `parts`, each checked by itself, are those that `refs` of `commit` name, and fit together.

    Those of all ranks must make up what `commit` says, and nothing else; those of some must be pieces of it that lie apart.
    """
    for info, ref in zip(parts, refs, strict=True):
        mine = (info.run_id, info.step, info.save_id, info.rank, info.world, info.part, info.size_bytes)
        named = (commit.run_id, commit.step, commit.save_id, ref.rank, commit.world, ref.part, ref.size_bytes)
        if mine != named:
            raise _corrupt("a part's document is not of this step", ref.info)
    entries = [entry for info in parts for entry in info.entries]
    unnamed = {entry.part for entry in entries} - {ref.part for ref in commit.parts} - set(commit.uses)
    if unnamed:
        raise _corrupt("the step does not name a part that it needs", where, part=min(unnamed))
    wanted = {name: spec for item, values in commit.items.items() for name, spec in specs(values, name=item)}
    fault = coverage_fault(wanted, entries, some=len(refs) < len(commit.parts))
    if fault is not None:
        raise _corrupt(fault[0], where, tensor=fault[1])
    check_ranges(parts, where=where)


def check_ranges(parts: Sequence[PartInfo], *, where: str) -> None:
    """Raise `CorruptError` unless ranges are the same, with the same digests, or lie apart: nobody reads a byte twice."""
    content: dict[tuple[str, int, int], tuple[str, int]] = {}
    for info in parts:
        for entry in info.entries:
            known = content.setdefault((entry.part, entry.start, entry.stop), (entry.digests, info.chunk_bytes))
            if known != (entry.digests, info.chunk_bytes):
                raise _corrupt("one range has two sets of digests", where, tensor=entry.tensor, part=entry.part)
    before: tuple[str, int] = ("", 0)
    for part, start, stop in sorted(content):
        if part == before[0] and start < before[1] and start < stop:
            raise _corrupt("two ranges of a part overlap", where, part=part, start=start, stop=stop)
        before = (part, max(stop, before[1]) if part == before[0] else stop)


def coverage_fault(
    wanted: Mapping[str, TensorSpec], entries: Iterable[Entry], *, some: bool = False
) -> tuple[str, str] | None:
    """Return why the boxes of `entries` do not make up each tensor of `wanted` and nothing else, and which tensor it is.

    If they are only `some` of the boxes, what is missing is no fault.
    """
    boxes: defaultdict[str, list[PlacedBox]] = defaultdict(list)
    for entry in entries:
        spec = wanted.get(entry.tensor)
        if spec is None or spec.dtype != entry.dtype or spec.shape != entry.global_shape:
            return "a rank wrote a tensor that rank 0 does not have, or not like this", entry.tensor
        boxes[entry.tensor].append((entry.offsets, entry.shape))
    faults: dict[tuple[Shape, tuple[PlacedBox, ...]], str] = {}  # Tensors that are cut alike are looked at once.
    for name, spec in wanted.items():
        key = (spec.shape, tuple(boxes[name]))
        if key not in faults:
            faults[key] = _fault_of_boxes(boxes[name], spec.shape, some=some)
        if faults[key]:
            return faults[key], name
    return None


def _fault_of_boxes(boxes: list[PlacedBox], shape: Shape, *, some: bool) -> str:
    if len(set(boxes)) < len(boxes):
        return "two ranks wrote the same piece of a tensor"
    if not some and (sum(prod(lengths) for _, lengths in boxes) != prod(shape) or not boxes):
        return "the ranks did not write the whole of a tensor"
    full = [box for box in boxes if prod(box[1])]
    return "" if _are_apart(full, len(shape)) else "two ranks wrote the same elements of a tensor"


def _are_apart(boxes: list[PlacedBox], dimensions: int) -> bool:
    """Return whether no two boxes share an element, of boxes that can be parted by cuts through all of them, as those of any mesh.

    Boxes that lie like the blades of a windmill cannot, and are refused: nothing shards a tensor that way, and to compare
    each with each takes hours for as many boxes as a document can name.
    """
    groups = [boxes]
    while groups:
        group = groups.pop()
        if len(group) > 1:
            parted = next(filter(lambda found: len(found) > 1, (_parted(group, i) for i in range(dimensions))), None)
            if parted is None:
                return False
            groups += parted
    return True


def _parted(boxes: list[PlacedBox], dimension: int) -> list[list[PlacedBox]]:
    """Return the boxes in groups that have no row of `dimension` in common."""
    found: list[list[PlacedBox]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box[0][dimension]):
        start, length = box[0][dimension], box[1][dimension]
        if start >= end:
            found.append([])
        found[-1].append(box)
        end = max(end, start + length)
    return found


def _corrupt(fact: str, where: str, **values: object) -> CorruptError:
    return CorruptError(fact, where=where, **values, hint="Use an earlier step; what wrote this one is at fault.")
