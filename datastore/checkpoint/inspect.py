"""Look at a run from outside: which steps it holds, what is in one, and whether every byte of it is as it was written.

Needs no torch and writes nothing, so it is fit for the command line and for machines without a trainer.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

from datastore.checkpoint.format.manifest import Chunk, PartInfo, StepCommit, chunks_of, step_key
from datastore.checkpoint.format.tree import specs, unpack
from datastore.checkpoint.steps import StepLog, extents_of
from datastore.errors import CorruptError
from datastore.formats.safetensors import ITEM_BYTES
from datastore.storage.base import Storage
from datastore.threads import each
from datastore.units import Progress

__all__ = [
    "BadRange",
    "ItemReport",
    "StepReport",
    "StepSummary",
    "StepVerifyReport",
    "inspect_step",
    "list_steps",
    "verify_step",
]

_THREADS = 4


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
    log = StepLog(storage)
    return [_summary(log, step) for step in log.steps()]


def _summary(log: StepLog, step: int) -> StepSummary:
    try:
        return _summary_of(log.read(step))
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
    log = StepLog(storage)
    bad: list[BadRange] = []
    try:
        refs = log.read(step).parts
    except CorruptError as error:
        return StepVerifyReport(step, 0, 0, (BadRange(step_key(step), reason=str(error)),))
    infos = []
    for ref in refs:
        with _noting(bad, ref.info):
            infos.append(log.read_part(ref))
    chunks = _checked_files(log, infos, bad)
    lock = threading.Lock()
    done, total = 0, sum(chunk.size_bytes for chunk in chunks)

    def check(chunk: Chunk) -> str:
        nonlocal done
        reason = _fault(storage, chunk)
        with lock:
            done += chunk.size_bytes
            if progress is not None:
                progress(done, total)
        return reason

    reasons = each(check, chunks, threads=_THREADS)
    bad.extend(
        BadRange(chunk.part, chunk.start, chunk.stop, chunk.tensor, reason)
        for chunk, reason in zip(chunks, reasons, strict=True)
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


def _fault(storage: Storage, chunk: Chunk) -> str:
    data = bytearray(chunk.size_bytes)
    storage.read_into(chunk.part, chunk.start, data)
    try:
        chunk.check(data)
    except CorruptError as error:
        return str(error)
    return ""
