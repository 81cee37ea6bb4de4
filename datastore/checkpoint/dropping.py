"""Items dropped from old steps: the weights stay, the state of the optimizer, which takes twice as much, goes.

    drop_item(storage, "optim", steps=[1000, 2000])

The parts of such a step are written anew without the item, under names of their own, then its step file is replaced, in one write: a reader
finds the one or the other, and a kill in between leaves parts that the next collection takes. It is the only time that a step
file is written a second time; run, step and save stay the same, so a copy of the run in a second place takes no notice. What lies in parts that other steps
need stays where it is. The newest step, which training goes on from, is kept as it is.
"""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from datastore.checkpoint.codec import with_codec
from datastore.checkpoint.format.manifest import (
    Chunk,
    Entry,
    PartInfo,
    PartRef,
    StepCommit,
    StepRef,
    chunks_of,
    info_key,
    part_key,
    plain_item,
    step_key,
)
from datastore.checkpoint.format.tree import specs
from datastore.checkpoint.keeping import Keep, claimed, collect, files_of
from datastore.checkpoint.steps import StepLog, WholeStep, reading
from datastore.digest import digest_hex
from datastore.document import seal, unseal
from datastore.errors import ConfigError, ConflictError
from datastore.formats.safetensors import HeaderTensor, encode_header
from datastore.storage.base import Storage

__all__ = ["Dropped", "drop_item"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """What one call did."""

    steps: tuple[int, ...]
    """Steps that do not have the item any more."""

    size_bytes: int
    """How much less the run takes now."""


def drop_item(storage: Storage, item: str, *, steps: Iterable[int]) -> Dropped:
    """Take `item` out of `steps`, where they have it; what each rank has of its own under that name goes, too.

    Takes the memory of what one rank keeps of a step. All that stays is verified on the way.

    Raises:
        MissingError: there is no such step.
        ConfigError: one is the newest step, or has nothing else; or no step of the run has the item.
        CorruptError: a step is damaged; those before it are done.
    """
    storage = with_codec(storage)
    log = StepLog(storage)
    _check_known(log, item)
    before = _parts_bytes(storage)
    done = []
    for step in sorted(set(steps)):
        whole = log.read_whole(step)
        names = {name for name in whole.commit.items if plain_item(name) == item}
        _check_droppable(log, whole.commit, names)
        if names:
            _replace(storage, whole, names)
            done.append(step)
    if done:
        collect(storage, Keep(last=2**31))  # Nothing but parts that no step needs.
    return Dropped(tuple(done), max(before - _parts_bytes(storage), 0))


def _check_known(log: StepLog, item: str) -> None:
    commits = [log.read_if_sound(step) for step in log.steps()]
    there = {plain_item(name) for commit in commits if commit is not None for name in commit.items}
    if item not in there and None not in commits:
        hint = "Name one that is there."
        raise ConfigError("no step has such an item", item=item, items=sorted(there), url=log.url, hint=hint)


def _parts_bytes(storage: Storage) -> int:
    return sum(stat.size_bytes for stat in storage.list("parts"))


def _check_droppable(log: StepLog, commit: StepCommit, names: set[str]) -> None:
    if not any(log.read_if_sound(step) for step in log.steps() if step > commit.step):
        hint = "Name earlier steps: training goes on from the newest."
        raise ConfigError("the newest step keeps all it has", step=commit.step, hint=hint)
    if names == set(commit.items):
        hint = "Let the step go instead: `datastore checkpoint gc`."
        raise ConfigError("the step has nothing else", step=commit.step, items=sorted(names), hint=hint)


def _replace(storage: Storage, whole: WholeStep, names: set[str]) -> None:
    """Write the step anew without the items `names`."""
    commit = whole.commit
    kept = {name: values for name, values in commit.items.items() if name not in names}
    tensors = {name for item, values in kept.items() for name, _ in specs(values, name=item)}
    shared = _needed_by_others(storage, commit)
    ref = StepRef(step=commit.step, save_id=uuid.uuid4().hex[:16])
    written = {info.rank: part_key(ref, info.rank) for info in whole.parts if info.part and info.part not in shared}
    keys = [*written.values(), *(info_key(ref, info.rank) for info in whole.parts)]
    with claimed(storage, keys):
        infos = [_without(storage, info, tensors, names, part=written.get(info.rank, "")) for info in whole.parts]
        parts = tuple(_store(storage, info, info_key(ref, info.rank)) for info in infos)
        used = {entry.part for info in infos for entry in info.entries}
        lighter = msgspec.structs.replace(
            commit,
            parts=parts,
            uses=tuple(sorted(used - {part.part for part in parts})),
            items=kept,
        )
        if StepLog(storage).read(commit.step).digest != commit.digest:
            raise ConflictError("the step was changed meanwhile", step=commit.step, hint="Do it again.")
        storage.put(step_key(commit.step), seal(lighter))


def _needed_by_others(storage: Storage, commit: StepCommit) -> set[str]:
    log = StepLog(storage)
    others = (log.read_if_sound(step) for step in log.steps() if step != commit.step)
    return set().union(*(files_of(other) for other in others if other is not None))


def _without(storage: Storage, info: PartInfo, tensors: set[str], names: set[str], *, part: str) -> PartInfo:
    """Return the document of one rank with `tensors` alone, which lie in the new part `part` now, unless that is empty."""
    entries = [entry for entry in info.entries if entry.tensor in tensors]
    own = [entry for entry in entries if part and entry.part == info.part]
    moved, header, size_bytes = _rewrite(storage, part, own, info.chunk_bytes, run_id=info.run_id, step=info.step)
    places = {(entry.start, entry.stop): start for entry, start in moved}
    return msgspec.structs.replace(
        info,
        part=part if own else "",
        size_bytes=size_bytes,
        data_start=len(header),
        header_digest=digest_hex(header) if own else "",
        entries=tuple(_moved(entry, part, places) if part and entry.part == info.part else entry for entry in entries),
        items={name: digest for name, digest in info.items.items() if name not in names},
        own_items={name: values for name, values in info.own_items.items() if name not in names},
    )


def _moved(entry: Entry, part: str, places: dict[tuple[int, int], int]) -> Entry:
    start = places[entry.start, entry.stop]
    return msgspec.structs.replace(entry, part=part, start=start, stop=start + entry.stop - entry.start)


def _rewrite(
    storage: Storage, part: str, entries: Sequence[Entry], chunk_bytes: int, *, run_id: str, step: int
) -> tuple[list[tuple[Entry, int]], bytes, int]:
    """Write the bytes of `entries` to a part; return each range with where it starts there, the header, and the length of the file."""
    if not entries:
        return [], b"", 0
    ranges = {(entry.start, entry.stop): entry for entry in reversed(entries)}
    ordered = [ranges[place] for place in sorted(ranges)]
    header = encode_header(
        [HeaderTensor(entry.tensor, entry.dtype, entry.shape) for entry in ordered],
        metadata={"format": "pt", "run": run_id, "step": str(step)},
    )
    data = [_read(storage, entry, chunk_bytes) for entry in ordered]
    storage.put_new(part, header, *(piece.data for piece in data if len(piece)))
    starts, position = [], len(header)
    for entry, piece in zip(ordered, data, strict=True):
        starts.append((entry, position))
        position += len(piece)
    return starts, header, position


def _read(storage: Storage, entry: Entry, chunk_bytes: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
    data = np.empty(entry.stop - entry.start, dtype=np.uint8)
    if len(data):
        with reading(entry.part, entry.start, entry.stop):
            storage.read_into(entry.part, entry.start, data.data)
    chunk: Chunk
    for chunk in chunks_of(entry, chunk_bytes):
        chunk.check(data[chunk.start - entry.start : chunk.stop - entry.start].data)
    return data


def _store(storage: Storage, info: PartInfo, key: str) -> PartRef:
    raw = seal(info)
    storage.put_new(key, raw)
    digest = unseal(PartInfo, raw, where=key).digest
    return PartRef(rank=info.rank, info=key, info_digest=digest, part=info.part, size_bytes=info.size_bytes)
