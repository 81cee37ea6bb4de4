"""Look at a run from outside: which steps it holds, what is in one, and whether every byte of it is as it was written.

Needs no torch and writes nothing, so it is fit for the command line and for machines without a trainer.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

from datastore.checkpoint.codec import with_codec
from datastore.checkpoint.format.checks import check_parts, check_ranges
from datastore.checkpoint.format.manifest import Chunk, PartInfo, StepCommit, chunks_of, runs_of, step_key
from datastore.checkpoint.format.tree import specs, unpack
from datastore.checkpoint.keeping import pinned_steps
from datastore.checkpoint.steps import Damaged, StepLog, extents_of, reading
from datastore.display import html_table
from datastore.errors import CorruptError, MissingError
from datastore.formats.safetensors import ITEM_BYTES
from datastore.storage.base import Storage
from datastore.threads import each
from datastore.units import Progress, format_bytes

__all__ = [
    "BadRange",
    "ItemReport",
    "StepReport",
    "StepSummary",
    "StepVerifyReport",
    "html_steps",
    "inspect_step",
    "list_steps",
    "newest_steps",
    "newest_values",
    "verify_step",
]

_THREADS = 4

_SHOWN = 20
"""Steps that a notebook shows."""

_RUN_BYTES = 4 * 2**20
"""Small chunks that lie side by side are read together."""


@dataclass(frozen=True, slots=True)
class StepSummary:
    """One line of a listing. Of a damaged step only `step` and `error` are known."""

    step: int
    time: str = ""
    world: int = 0
    state_bytes: int = 0
    """Bytes of all its tensors."""

    written_bytes: int = 0
    """What this save added; less, if tensors were unchanged."""

    metrics: dict[str, Any] | None = None
    error: str = ""
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class ItemReport:
    """One item of a step; in `values` a tensor is shown as its dtype and shape."""

    name: str
    tensors: int
    size_bytes: int
    values: Any


@dataclass(frozen=True, slots=True)
class StepReport:
    """What is in one step."""

    summary: StepSummary
    save_id: str
    session: str
    writer: str
    parent: int | None
    items: tuple[ItemReport, ...]
    parts: tuple[str, ...]
    uses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BadRange:
    """Bytes that are not as they were written."""

    key: str
    start: int = 0
    stop: int = 0
    """Up to here; 0 if it is the file as a whole."""

    tensor: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class StepVerifyReport:
    """The result of reading all of one step; sound if `bad` is empty."""

    step: int
    chunks: int
    size_bytes: int
    bad: tuple[BadRange, ...]


def list_steps(storage: Storage) -> list[StepSummary]:
    """Return every step, oldest first."""
    log, pinned = StepLog(storage), set(pinned_steps(storage))
    found = (_summary(log, step) for step in log.steps())
    return [replace(summary, pinned=summary.step in pinned) for summary in found if summary is not None]


def newest_steps(storage: Storage, most: int) -> tuple[list[StepSummary], int]:
    """Return the newest `most` steps, newest first, and how many there are: each is one small read."""
    log, pinned = StepLog(storage), set(pinned_steps(storage))
    steps = log.steps()
    found = (_summary(log, step) for step in reversed(steps[-most:]))
    return [replace(summary, pinned=summary.step in pinned) for summary in found if summary is not None], len(steps)


def html_steps(storage: Storage) -> str:
    """Return the newest steps as a table for a notebook."""
    steps, total = newest_steps(storage, _SHOWN)
    rows = []
    for found in steps:
        metrics = ", ".join(
            f"{name} {value:.4g}" for name, value in (found.metrics or {}).items() if isinstance(value, float)
        )
        sizes = (format_bytes(found.state_bytes), format_bytes(found.written_bytes)) if not found.error else ("", "")
        notes = [word for word in ("pinned" if found.pinned else "", found.error, metrics) if word]
        rows.append((found.step, found.time[:19], found.world, *sizes, "; ".join(notes)))
    return html_table(f"{storage.url}: {total:,} steps", ("step", "time", "ranks", "state", "written", ""), rows)


def _summary(log: StepLog, step: int) -> StepSummary | None:
    try:
        return _summary_of(log.read(step))
    except MissingError:  # It was let go since the steps were listed.
        return None
    except CorruptError as error:
        return StepSummary(step, error=str(error))


def _summary_of(commit: StepCommit) -> StepSummary:
    return StepSummary(
        step=commit.step,
        time=commit.time,
        world=commit.world,
        state_bytes=sum(_item(name, values).size_bytes for name, values in commit.items.items()),
        written_bytes=sum(ref.size_bytes for ref in commit.parts),
        metrics=unpack(commit.metrics, name="metrics", tensors={}),
    )


def inspect_step(storage: Storage, step: int) -> StepReport:
    """Return what is in `step`.

    Raises:
        MissingError: there is no such step.
        CorruptError: its commit is damaged.
    """
    commit = StepLog(storage).read(step)
    return StepReport(
        summary=_summary_of(commit),
        save_id=commit.save_id,
        session=commit.session,
        writer=commit.writer,
        parent=None if commit.parent is None else commit.parent.step,
        items=tuple(_item(name, values) for name, values in commit.items.items()),
        parts=tuple(ref.part for ref in commit.parts if ref.part),
        uses=commit.uses,
    )


def newest_values(storage: Storage, names: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return items without tensors, of the newest step whose files are there, and why newer ones were passed over.

    Raises:
        MissingError: the run has no checkpoint yet, or the one found lacks an item.
        CorruptError: no step has all its files.
    """
    log = StepLog(storage)
    steps, passed_over = log.steps(), list[str]()
    for step in reversed(steps):
        try:
            saved = log.read_whole(step).commit.items
        except (CorruptError, MissingError) as error:
            passed_over.append(str(Damaged(step, str(error))))
            continue
        if missing := [name for name in names if name not in saved]:
            hint = "Only checkpoints that the trainer made have all of them."
            raise MissingError("the checkpoint lacks an item", url=storage.url, step=step, items=missing, hint=hint)
        return {name: unpack(saved[name], name=name, tensors={}) for name in names}, tuple(passed_over)
    if not steps:
        raise MissingError("the run has no checkpoint yet", url=storage.url, hint="Let it train until the first one.")
    hint = "Restore the files named from a copy."
    raise CorruptError("no checkpoint of the run is sound", url=storage.url, steps=passed_over, hint=hint)


def _item(name: str, skeleton: Any) -> ItemReport:
    found = dict(specs(skeleton, name=name))
    size = sum(prod(spec.shape) * ITEM_BYTES[spec.dtype] for spec in found.values())
    shown = {tensor: str(spec) for tensor, spec in found.items()}
    return ItemReport(name, len(found), size, unpack(skeleton, name=name, tensors=shown))


def verify_step(storage: Storage, step: int, *, progress: Progress | None = None) -> StepVerifyReport:
    """Read every file of `step` and compare it with its digests; `progress` is told the bytes done so far, and all.

    Raises:
        MissingError: there is no such step.
        StorageError: the storage failed.
    """
    storage = with_codec(storage)
    log = StepLog(storage)
    bad: list[BadRange] = []
    try:
        commit = log.read(step)
    except CorruptError as error:
        return StepVerifyReport(step, 0, 0, (BadRange(step_key(step), reason=str(error)),))
    infos = []
    for ref in commit.parts:
        with _noting(bad, ref.info):
            infos.append(log.read_part(ref))
    try:
        if bad:
            check_ranges(infos, where=step_key(step))
        else:
            check_parts(commit, infos, commit.parts, where=step_key(step))
    except CorruptError as error:  # They may name any range any number of times.
        return StepVerifyReport(step, 0, 0, (*bad, BadRange(step_key(step), reason=str(error))))
    chunks = _checked_files(log, infos, bad)
    lock = threading.Lock()
    done, total = 0, sum(chunk.size_bytes for chunk in chunks)

    def check(run: list[Chunk]) -> list[str]:
        nonlocal done
        reasons = _faults(storage, run)
        with lock:
            done += sum(chunk.size_bytes for chunk in run)
            if progress is not None:
                progress(done, total)
        return reasons

    found = each(check, runs_of(chunks, _RUN_BYTES), threads=_THREADS)
    bad.extend(
        BadRange(chunk.part, chunk.start, chunk.stop, chunk.tensor, reason)
        for chunk, reason in zip(chunks, chain.from_iterable(found), strict=True)
        if reason
    )
    return StepVerifyReport(step, len(chunks), done, tuple(bad))


def _checked_files(log: StepLog, infos: list[PartInfo], bad: list[BadRange]) -> list[Chunk]:
    """Check sizes and headers; return the chunks of the parts that are there in full."""
    whole = set()
    for part, needed_bytes in extents_of(infos).items():
        with _noting(bad, part):
            log.check_part(part, needed_bytes)
            whole.add(part)
    for info in infos:
        if info.part in whole:
            with _noting(bad, info.part, info.data_start):
                log.check_header(info)
    found = {chunk for info in infos for entry in info.entries for chunk in chunks_of(entry, info.chunk_bytes)}
    return sorted(chunk for chunk in found if chunk.part in whole)


@contextmanager
def _noting(bad: list[BadRange], key: str, stop: int = 0) -> Iterator[None]:
    try:
        yield
    except CorruptError as error:
        bad.append(BadRange(key, 0, stop, "", str(error)))


def _faults(storage: Storage, run: list[Chunk]) -> list[str]:
    """Return what is wrong with each chunk of `run`, which lie side by side; nothing if it is sound."""
    start = run[0].start
    data = memoryview(bytearray(run[-1].stop - start))
    try:
        with reading(run[0].part, start, run[-1].stop):
            storage.read_into(run[0].part, start, data)
    except (CorruptError, MissingError) as error:
        # One bad sector does not make its neighbours bad.
        return [str(error)] if len(run) == 1 else [_faults(storage, [chunk])[0] for chunk in run]
    return [_mismatch(chunk, data[chunk.start - start : chunk.stop - start]) for chunk in run]


def _mismatch(chunk: Chunk, data: memoryview) -> str:
    try:
        chunk.check(data)
    except CorruptError as error:
        return str(error)
    return ""
