"""A run in a second place, step by step: on the fast disk for now, in the bucket for when the disk is gone.

    replicate("/nvme/run", "s3://b/run")          # while it trains, again and again
    replicate("s3://b/run", "/nvme/run")          # and back, after the disk was lost

A step is in the second place when its step file is, which comes last: its parts are read, held against their digests, and
written before. So whoever is killed in between leaves parts that the next call finds, and damage is not spread. What a trainer
keeps beside its steps goes along, but for the lock. Both places can be restored from, and trained on: but not both at once.
Where the first place has gone back and trained on from an earlier step, so does the second.

    fork_step("/nvme/run", "/nvme/branch", step=1000)

Or another run begins with one step of the first, and both go on. On one file system that takes no bytes: parts are never written to again, so a
second name of the same file is as good as a copy, until the disk damages both.

It holds one part in memory at a time.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from logging import getLogger
from typing import TypeAlias

import msgspec
import numpy as np

from datastore.checkpoint.codec import PACKED_SUFFIX, Bytes, Codec, with_codec
from datastore.checkpoint.format.manifest import (
    LATEST_KEY,
    PARTS,
    RUN_KEY,
    STEPS,
    VOTES,
    Chunk,
    PartInfo,
    PartRef,
    StepCommit,
    chunks_of,
    layout_key,
    step_key,
)
from datastore.checkpoint.keeping import (
    NOTES,
    Keep,
    check_standing,
    claimed,
    collect,
    drop_after,
    expired,
    files_of,
    pinned_steps,
)
from datastore.checkpoint.ranks import SavingRank, ensure_run, read_run
from datastore.checkpoint.saving.commit import put_commit, write_hint
from datastore.checkpoint.steps import CheckpointerSettings, StepLog, WholeStep, reading
from datastore.document import seal, unseal
from datastore.errors import ConfigError, CorruptError, MissingError
from datastore.storage.base import Stat, Storage
from datastore.storage.resolve import open_storage
from datastore.units import Progress

__all__ = ["Forked", "Replicated", "fork_step", "replicate"]

_LOGGER = getLogger(__name__)

_NOT_COPIED = frozenset({PARTS, STEPS, VOTES, "lock"})
"""Folders that are copied step by step, or are of one place only."""

_NOT_FORKED = frozenset({PARTS, STEPS, VOTES, "lock", "refs", RUN_KEY})
"""What a run that begins with a step of another has of its own."""

_KEEP = Keep()


@dataclass(frozen=True, slots=True)
class Replicated:
    """What one call did."""

    steps: tuple[int, ...]
    """Steps that the second place has now and had not before."""

    damaged: tuple[int, ...]
    """Steps that the first place cannot give back: the second keeps what it has."""

    dropped: tuple[int, ...]
    """Steps of the second place that the first has gone back behind."""

    removed: tuple[int, ...]
    """Steps that the second place need not keep any more."""

    files: int
    """Other files of the run that were new or had changed."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Forked:
    """A run that begins with a step of another."""

    run_id: str
    step: int
    shared_bytes: int
    """Bytes of parts that are second names of files of the first run."""

    copied_bytes: int


Memory: TypeAlias = Callable[[int], AbstractContextManager[Bytes]]

Place: TypeAlias = str | os.PathLike[str] | Storage


@contextmanager
def _memory(size_bytes: int) -> Iterator[Bytes]:
    yield np.empty(size_bytes, dtype=np.uint8)


def replicate(
    source: Place,
    target: Place,
    *,
    keep: Keep = _KEEP,
    codec: Codec = "none",
    progress: Progress | None = None,
    memory: Memory = _memory,
) -> Replicated:
    """Bring what `target` lacks of the run in `source` there; then let go what `keep` does not keep in `target`.

    Parts are stored in `target` by `codec`, however they are in `source`: "zstd" for a place that takes less than 1 GB/s, or bills bytes.
    `progress` is told the bytes of parts copied so far, and all. `memory` lends what one part takes. For one caller at a time; the run may be saved to meanwhile.

    Raises:
        MissingError: `source` has no run.
        ConfigError: `target` holds another run.
        StorageError: a storage failed; call it again to go on.
    """
    source, target = (place if isinstance(place, Storage) else open_storage(place) for place in (source, target))
    source, target = with_codec(source), with_codec(target, codec)
    _require_same_run(source, target)
    log, there = StepLog(source), StepLog(target)
    dropped = _follow_back(log, there, target)
    files, size_bytes = _copy_others(source, target, but=_NOT_COPIED)
    whole, damaged = _sound(log, _lacking(log, there, keep, pinned=pinned_steps(source)))
    copied: list[int] = []
    if whole:
        with claimed(target, set().union(*(files_of(each.commit) for each in whole))):
            copied, more, done = _copy_steps(source, target, whole, progress, memory)
        damaged += more
        size_bytes += done
    removed = collect(target, keep).steps if copied else ()
    return Replicated(tuple(copied), tuple(sorted(damaged)), tuple(dropped), removed, files, size_bytes)


def fork_step(source: Place, target: Place, *, step: int, progress: Progress | None = None) -> Forked:
    """Begin another run in `target`, where nothing is yet, with `step` of the run in `source`, and with what that has beside its steps.

    Documents are checked, and copied parts held against their digests; parts that become second names of files are not read. `progress` is told the bytes of parts done so far, and all.

    Raises:
        MissingError: `source` has no such step.
        ConfigError: something is in `target`.
        CorruptError: the step is damaged.
        StorageError: a storage failed; empty `target` before you try again.
    """
    source, target = (place if isinstance(place, Storage) else open_storage(place) for place in (source, target))
    source, target = with_codec(source), with_codec(target)
    whole = StepLog(source).read_whole(step)
    for info in whole.parts:
        StepLog(source).check_header(info)
    there = next(iter(target.list()), None)
    if there is not None:
        raise ConfigError("something is there", url=target.url, key=there.key, hint="Name an empty place.")
    member = SavingRank(target, 0, 1, "", CheckpointerSettings())
    run_id = ensure_run(member).run_id
    parts = _parts_of(whole)
    sizes = {key: source.stat(key).size_bytes for key in parts}
    shared = done = 0
    for key, chunks in parts.items():
        if _adopted(source, target, key):
            shared += sizes[key]
        else:
            _copy_part(source, target, key, chunks, _memory)
        done += sizes[key]
        if progress is not None:
            progress(done, sum(sizes.values()))
    _copy_documents(source, target, whole.commit)
    _copy_others(source, target, but=_NOT_FORKED)
    refs = tuple(
        _put_info(target, ref, msgspec.structs.replace(info, run_id=run_id))
        for ref, info in zip(whole.commit.parts, whole.parts, strict=True)
    )
    put_commit(target, msgspec.structs.replace(whole.commit, run_id=run_id, parent=None, parts=refs))
    write_hint(target, whole.commit.ref)
    return Forked(run_id, step, shared, done - shared)


def _adopted(source: Storage, target: Storage, key: str) -> bool:
    """Return whether the part `key`, packed or not, could be given a second name."""
    for name in (key, f"{key}{PACKED_SUFFIX}"):
        path = source.local_path(name)
        if path is not None and target.adopt(name, path):
            return True
    return False


def _put_info(storage: Storage, ref: PartRef, info: PartInfo) -> PartRef:
    raw = seal(info)
    storage.put(ref.info, raw)
    return msgspec.structs.replace(ref, info_digest=unseal(PartInfo, raw, where=ref.info).digest)


def _copy_steps(
    source: Storage, target: Storage, whole: Sequence[WholeStep], progress: Progress | None, memory: Memory
) -> tuple[list[int], list[int], int]:
    """Copy steps; return those that are there now, those that turned out to be damaged, and the bytes of parts."""
    parts = [_parts_of(each) for each in whole]
    present = {stat.key for stat in target.list(PARTS)}
    sizes = {stat.key: stat.size_bytes for stat in source.list(PARTS) if stat.key not in present}
    done, total = 0, sum(sizes.get(key, 0) for key in set().union(*parts))
    copied: list[int] = []
    damaged: list[int] = []
    for each, own in zip(whole, parts, strict=True):
        try:
            for key, chunks in own.items():
                if key not in present:
                    _copy_part(source, target, key, chunks, memory)
                    present.add(key)
                    done += sizes.get(key, 0)
                    if progress is not None:
                        progress(done, total)
            _copy_documents(source, target, each.commit)
        except (CorruptError, MissingError) as error:
            _LOGGER.warning("step %d is not copied: %s", each.commit.step, error)
            damaged += [each.commit.step] if isinstance(error, CorruptError) else []
            continue
        check_standing(target, own)
        put_commit(target, each.commit)
        write_hint(target, each.commit.ref)
        copied.append(each.commit.step)
    return copied, damaged, done


def _copy_documents(source: Storage, target: Storage, commit: StepCommit) -> None:
    with suppress(MissingError):
        target.put(layout_key(commit.ref), source.get(layout_key(commit.ref)))
    for key in sorted(files_of(commit)):
        if key.endswith(".json"):
            target.put(key, source.get(key))


def _require_same_run(source: Storage, target: Storage) -> None:
    run, other = read_run(source), read_run(target)
    if run is None:
        raise MissingError("there is no run with checkpoints", url=source.url, hint="Check the URL, or let it train.")
    if other is not None and other.run_id != run.run_id:
        raise ConfigError("another run is there", url=target.url, run=other.run_id, hint="Name an empty place.")


def _follow_back(log: StepLog, there: StepLog, target: Storage) -> list[int]:
    """Drop the steps of the second place that are not what the first has by that number, and those after them; return them."""
    for step in there.steps():
        mine, theirs = _ref(log, step), _ref(there, step)
        if mine is not None and theirs is not None and mine != theirs:
            before = [other for other in there.steps() if other < step]
            dropped = [other for other in there.steps() if other >= step]
            if before:
                drop_after(target, before[-1])
            for other in dropped if not before else []:
                target.delete(step_key(other))
            _LOGGER.warning("%s has gone back behind step %d: %s follows", log.url, step, there.url)
            return dropped
    return []


def _ref(log: StepLog, step: int) -> object:
    try:
        return log.read(step).ref
    except (MissingError, CorruptError):
        return None


def _lacking(log: StepLog, there: StepLog, keep: Keep, *, pinned: Sequence[int]) -> list[int]:
    """Return the steps that the second place has not, and would not let go at once."""
    present = {step: there.read_if_sound(step) for step in there.steps()}
    new = {step: log.read_if_sound(step) for step in log.steps() if step not in present}
    short_lived = expired(present | new, keep, pinned=frozenset(pinned))
    return sorted(set(new).difference(short_lived))


def _sound(log: StepLog, steps: Iterable[int]) -> tuple[list[WholeStep], list[int]]:
    """Return the steps whose documents are sound, and the numbers of those whose are not."""
    whole, damaged = [], []
    for step in steps:
        try:
            found = log.read_whole(step)
            for info in found.parts:
                log.check_header(info)
            whole.append(found)
        except (CorruptError, MissingError) as error:  # Missing: let go meanwhile.
            _LOGGER.warning("step %d is not copied: %s", step, error)
            damaged += [step] if isinstance(error, CorruptError) else []
    return whole, damaged


def _parts_of(step: WholeStep) -> dict[str, list[Chunk]]:
    """Return the part files that a step needs, and the chunks of its tensors that lie in each."""
    found: dict[str, set[Chunk]] = {info.part: set() for info in step.parts if info.part}
    for info in step.parts:
        for entry in info.entries:
            found.setdefault(entry.part, set()).update(chunks_of(entry, info.chunk_bytes))
    return {key: sorted(chunks) for key, chunks in found.items()}


def _copy_part(source: Storage, target: Storage, key: str, chunks: Sequence[Chunk], memory: Memory) -> None:
    """Copy one part file.

    Raises:
        CorruptError: one of `chunks` is not what was written, or the file cannot be read; nothing was written.
    """
    with memory(source.stat(key).size_bytes) as data:
        with reading(key, 0, len(data)):
            source.read_into(key, 0, data.data)
        for chunk in chunks:
            chunk.check(data[chunk.start : chunk.stop].data)
        target.put(key, data.data)


def _copy_others(source: Storage, target: Storage, *, but: AbstractSet[str]) -> tuple[int, int]:
    """Copy what a run has beside its steps and `target` has not, or has in another state; return how many files and bytes."""
    there = {stat.key: stat for stat in target.list()}
    count = size_bytes = 0
    for stat in list(source.list()):
        if (
            stat.key.split("/", 1)[0] in but
            or stat.key == LATEST_KEY
            or stat.key.startswith(NOTES)
            or not _is_news(stat, there.get(stat.key))
        ):
            continue
        with suppress(MissingError):  # Gone meanwhile.
            raw = source.get(stat.key)
            target.put(stat.key, raw)
            count, size_bytes = count + 1, size_bytes + len(raw)
    return count, size_bytes


def _is_news(stat: Stat, there: Stat | None) -> bool:
    return there is None or there.size_bytes != stat.size_bytes or there.modified < stat.modified
