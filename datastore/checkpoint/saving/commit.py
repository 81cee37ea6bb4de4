"""A step comes into being: rank 0 sees that every part is there, then creates one file; all ranks wait for that file.

Ranks meet only through storage, so a save needs no process group and cannot hang one. Whoever waits does so for a
finite time and names whom it waited for; a rank that fails leaves a note, so that the others need not wait so long.
The commit is put-if-absent, and after any error it is read back: if it carries this save's id, it has succeeded.
"""

import threading
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from itertools import count
from logging import getLogger
from typing import Any

from datastore.checkpoint.format.layout import INDEXED_RANKS, layout_of
from datastore.checkpoint.format.manifest import (
    LATEST_KEY,
    LatestHint,
    PartInfo,
    PartRef,
    StepCommit,
    StepRef,
    failure_key,
    info_key,
    layout_key,
    step_key,
)
from datastore.checkpoint.format.tree import specs
from datastore.checkpoint.ranks import SavingRank, wait_until, writer
from datastore.checkpoint.steps import StepLog
from datastore.checkpoint.tensors import check_coverage
from datastore.document import seal, unseal
from datastore.errors import ConflictError, CorruptError, DatastoreError, MissingError, StorageError, WaitError
from datastore.host import utc_now
from datastore.storage.base import Storage

__all__ = [
    "await_commit",
    "build_commit",
    "gather_parts",
    "leave_note",
    "make_room",
    "put_commit",
    "write_hint",
    "write_layout",
]

_LOGGER = getLogger(__name__)

_ATTEMPTS = 5

_FIRST_PAUSE_S = 0.1


def gather_parts(member: SavingRank, ref: StepRef) -> list[PartInfo]:
    """Return every rank's document of the save `ref`, in rank order, each part's size checked.

    Raises:
        WaitError: some ranks did not deliver in time; the message names them.
        StorageError: a rank failed and left a note; or a part is not as long as its document says.
    """
    found: dict[int, PartInfo] = {}

    def next_missing() -> list[PartInfo] | None:
        for rank in range(len(found), member.world):
            info = _read_info(member.storage, ref, rank)
            if info is None:
                _raise_noted(member.storage, ref, rank)
                return None
            found[rank] = info
        return list(found.values())

    parts = wait_until(next_missing, timeout_s=member.options.wait_s)
    if parts is None:
        late = [rank for rank in range(member.world) if _read_info(member.storage, ref, rank) is None]
        hint = "Check those processes; the step was not committed, the one before it is intact."
        raise WaitError("ranks did not deliver their part in time", step=ref.step, ranks=late, hint=hint)
    for info in parts:
        _check_size(member.storage, info)
    return parts


def _read_info(storage: Storage, ref: StepRef, rank: int) -> PartInfo | None:
    key = info_key(ref, rank)
    with suppress(MissingError):
        return unseal(PartInfo, storage.get(key), where=key)
    return None


def _check_size(storage: Storage, info: PartInfo) -> None:
    if info.part:
        found = storage.stat(info.part).size_bytes
        if found != info.size_bytes:
            hint = "Check the target and its disk."
            raise StorageError("a part is not as long as it was written", part=info.part, found=found, hint=hint)


def leave_note(member: SavingRank, ref: StepRef, error: BaseException) -> None:
    """Tell the other ranks, if that is possible at all, that this one cannot do its part of the save `ref`."""
    if member.world > 1:
        with suppress(DatastoreError):
            member.storage.put_new(failure_key(ref, member.rank), str(error).encode() or b"failed")


def _raise_noted(storage: Storage, ref: StepRef, rank: int) -> None:
    with suppress(MissingError):
        note = storage.get(failure_key(ref, rank)).decode(errors="replace")
        raise StorageError(f"rank {rank} could not save: {note}", step=ref.step, hint="See the log of that rank.")


def build_commit(
    member: SavingRank,
    parts: list[PartInfo],
    *,
    parent: StepRef | None,
    items: Mapping[str, Any],
    metrics: Mapping[str, Any],
) -> StepCommit:
    """Return the commit that `parts` add up to; `items` are the values that rank 0 holds.

    Raises:
        ConflictError: the ranks hold different state, or a tensor is not there as a whole.
    """
    first = parts[0]
    for info in parts:
        if info.items != first.items:
            names = sorted(
                name for name in {**info.items, **first.items} if info.items.get(name) != first.items.get(name)
            )
            hint = "Save what is equal on all ranks, or wrap it in PerRank."
            raise ConflictError("ranks hold different values", items=names, ranks=[0, info.rank], hint=hint)
    everything = {**items, **{name: values for info in parts for name, values in info.own_items.items()}}
    entries = [entry for info in parts for entry in info.entries]
    check_coverage({name: spec for item in everything for name, spec in specs(everything[item], name=item)}, entries)
    own = {info.part for info in parts}
    return StepCommit(
        run_id=first.run_id,
        step=first.step,
        save_id=first.save_id,
        session=member.session,
        parent=parent,
        time=utc_now(),
        writer=writer(),
        world=member.world,
        parts=tuple(_ref_of(info) for info in parts),
        uses=tuple(sorted({entry.part for entry in entries} - own)),
        items=everything,
        metrics=dict(metrics),
    )


def _ref_of(info: PartInfo) -> PartRef:
    ref = StepRef(step=info.step, save_id=info.save_id)
    key = info_key(ref, info.rank)
    return PartRef(rank=info.rank, info=key, info_digest=info.digest, part=info.part, size_bytes=info.size_bytes)


def make_room(
    member: SavingRank, *, head: StepRef | None, damaged: AbstractSet[int], failed: AbstractSet[StepRef]
) -> None:
    """Make sure that the next commit continues the history that this process is in, which ends at `head`.

    Rank 0 removes steps after `head` that a restore found damaged: training went on from an earlier one. Saves of
    this process that seem to have `failed` may have been committed after all: they belong to the same history.

    Raises:
        ConflictError: there are steps after `head` that this process has not restored: another writer's, or those of
            a history that was left by restoring an older step.
    """
    log = StepLog(member.storage)
    newer = [step for step in log.steps() if head is None or step > head.step]
    for step in reversed(newer):
        if step in damaged and member.rank == 0:
            _LOGGER.warning("removing the damaged step %d of %s: training went on from an earlier one", step, log.url)
            member.storage.delete(step_key(step))
    newer = [step for step in newer if step not in damaged]
    if any(_ref_of_step(log, step) not in failed for step in newer):
        raise ConflictError(
            "the run holds steps that this process has not restored",
            steps=newer,
            restored=None if head is None else head.step,
            url=member.storage.url,
            hint="Restore the newest step, drop those steps with rewind(), or use another URL.",
        )


def _ref_of_step(log: StepLog, step: int) -> StepRef | None:
    with suppress(CorruptError):
        return log.read(step).ref
    return None


def put_commit(storage: Storage, commit: StepCommit) -> StepCommit:
    """Create the step file: from here on the step exists. Return the commit as it is stored, with its digest.

    Raises:
        ConflictError: another save of this step was committed first.
        StorageError: the storage failed, also when asked again.
    """
    key, raw = step_key(commit.step), seal(commit)
    pause = threading.Event()
    for attempt in count(1):
        try:
            storage.put_new(key, raw)
        except (ConflictError, StorageError) as error:
            if _committed(storage, commit.ref):
                break  # It was this save's: only the answer was lost.
            if isinstance(error, ConflictError) or attempt == _ATTEMPTS or not error.transient:
                raise
            pause.wait(_FIRST_PAUSE_S * 2**attempt)
        else:
            break
    return unseal(StepCommit, raw, where=key)


def _committed(storage: Storage, ref: StepRef) -> bool:
    """Return whether the save `ref` is committed.

    Raises:
        ConflictError: its step is committed, by another save.
    """
    try:
        found = StepLog(storage).read(ref.step)
    except MissingError:
        return False
    if found.ref != ref:
        hint = "Only one process group may save to a run; restore this step or use another URL."
        raise ConflictError("this step was committed by another save", step=ref.step, session=found.session, hint=hint)
    return True


def await_commit(member: SavingRank, ref: StepRef) -> StepCommit:
    """Return the commit of the save `ref`, which rank 0 makes.

    Raises:
        ConflictError: the step is committed, by another save.
        StorageError: rank 0 failed and left a note.
        WaitError: rank 0 did not commit in time.
    """

    def committed() -> StepCommit | None:
        if _committed(member.storage, ref):
            return StepLog(member.storage).read(ref.step)
        _raise_noted(member.storage, ref, 0)
        return None

    # Rank 0 may itself wait that long for the slowest part.
    commit = wait_until(committed, timeout_s=2 * member.options.wait_s)
    if commit is None:
        hint = "Check that process; the step was not committed, the one before it is intact."
        raise WaitError("rank 0 did not commit the step in time", step=ref.step, rank=0, hint=hint)
    return commit


def write_layout(storage: Storage, ref: StepRef, parts: Sequence[PartInfo]) -> None:
    """Note which of many documents has what; a failure is logged, because who restores can read them all."""
    if len(parts) >= INDEXED_RANKS:
        try:
            storage.put(layout_key(ref), seal(layout_of(ref, parts)))
        except StorageError as error:
            _LOGGER.warning("the layout of step %d was not written: %s", ref.step, error)


def write_hint(storage: Storage, ref: StepRef) -> None:
    """Note the newest step for people and dashboards; a failure is logged, because no reader relies on it."""
    try:
        storage.put(LATEST_KEY, seal(LatestHint(step=ref.step, save_id=ref.save_id)))
    except StorageError as error:
        _LOGGER.warning("the hint to the newest step was not written: %s", error)
