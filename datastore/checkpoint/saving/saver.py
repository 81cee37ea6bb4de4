"""One save on one rank, from the captured state to the commit that all ranks see; what it promises, and what may follow it.

Everything here may run in a thread of its own: it touches the training program's tensors only until it says that the
state is staged.

It returns a promise: that it will be staged, then committed, or that the reason why not will be heard. An error is raised
by whichever comes first: the handle, the next save, or `close`. It is raised there once; after
that a new save may try again. If none of them comes, because the program ends, it is at least logged.

A run is one line of steps. A process may only add to the end of the line, and only if its own state comes from there:
it has saved or restored the last step itself. Saving after an older step was restored on purpose is refused until
`rewind` has dropped the steps after it, so a run never mixes two histories.
"""

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, wait
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import msgspec

from datastore.checkpoint.format.manifest import Entry, PartInfo, RunInfo, StepCommit, StepRef
from datastore.checkpoint.items import item_digests
from datastore.checkpoint.keeping import Keep, check_standing, collect, make_space
from datastore.checkpoint.ranks import SavingRank, ensure_run
from datastore.checkpoint.saving.commit import (
    await_commit,
    build_commit,
    gather_parts,
    leave_note,
    make_room,
    put_commit,
    write_hint,
    write_layout,
)
from datastore.checkpoint.saving.snapshot import BufferPool, Snapshot
from datastore.checkpoint.saving.write import Known, stage, write_share
from datastore.checkpoint.steps import StepLog
from datastore.errors import ConfigError, ConflictError, DatastoreError, WaitError

__all__ = ["Handle", "Save", "SaveHistory", "Saver"]

_LOGGER = getLogger(__name__)


class SaveHistory:
    """Changed by the thread that saves and by restores, which never run at the same time."""

    def __init__(self) -> None:
        self.head: _Head | None = None
        self.known = Known()
        self.whole = False
        """Whether the next save writes everything: a part that it would have pointed into may be gone."""

        self.damaged: frozenset[int] = frozenset()
        self.failed: set[StepRef] = set()
        self._attempts: Counter[int] = Counter()

    @property
    def ref(self) -> StepRef | None:
        """The name of the head, if there is one."""
        return None if self.head is None else self.head.ref

    def next_attempt(self, step: int) -> int:
        """Count the saves of `step` in this session, failed ones included: equal on all ranks."""
        self._attempts[step] += 1
        return self._attempts[step]

    def restored(self, commit: StepCommit, entries: Iterable[Entry], damaged: Iterable[int]) -> None:
        """Continue from `commit`; the steps `damaged` after it were found unusable."""
        self.head = _Head(commit, item_digests(commit.items))
        self.known = Known().after(entries)
        self.whole = False
        self.damaged = frozenset(damaged)
        self.failed.clear()

    def committed(self, commit: StepCommit, entries: Iterable[Entry]) -> None:
        """Continue from `commit`, which this process has just taken part in."""
        self.head = _Head(commit, item_digests(commit.items))
        self.known = self.known.after(entries)
        self.whole = False
        self.damaged = frozenset()
        self.failed.clear()

    def leave(self) -> None:
        """Forget the head: its step is no longer part of the run."""
        self.head = None
        self.known = Known()
        self.failed.clear()

    def check_next(self, step: int) -> None:
        """Raise unless `step` may follow the head, or is it.

        Raises:
            ConflictError: it lies before the head.
        """
        if self.head is not None and step < self.head.ref.step:
            raise ConflictError(
                "this step lies before the one that was saved or restored last",
                step=step,
                last=self.head.ref.step,
                hint="Number steps upwards; to go back, restore an older step and call rewind().",
            )

    def check_same(self, snapshot: Snapshot, metrics: Mapping[str, Any], *, changed: bool) -> StepCommit:
        """Return the head's commit if saving it again would change nothing.

        Raises:
            ConflictError: the state (`changed`: its tensors) or the metrics are others than those committed.
        """
        assert self.head is not None
        commit = self.head.commit
        digests = item_digests({**snapshot.items, **snapshot.own_items})
        theirs = {name: digest for name, digest in self.head.digests.items() if "@" not in name or name in digests}
        if changed or digests != theirs or (metrics and metrics != commit.metrics):
            hint = "Save each step once, or change nothing in between."
            raise ConflictError("this step is committed with another content", step=commit.step, hint=hint)
        return commit


@dataclass(frozen=True, slots=True)
class Save:
    """One save of one rank."""

    ref: StepRef
    snapshot: Snapshot
    metrics: Mapping[str, Any]
    copy: bool = True
    """Whether the tensors of the snapshot might change before the save has ended."""

    first: Callable[[], object] | None = None
    """Called before the commit."""

    ahead: "Future[None] | None" = None
    """The save before this one, which is still being written: this one is copied at once, and written after it."""


class Saver:
    """Saves one step after the other; not for concurrent use."""

    def __init__(self, member: SavingRank, keep: Keep, history: SaveHistory) -> None:
        self._member = member
        self._keep = keep
        self._history = history
        self._run: RunInfo | None = None
        self._opened = time.time()
        self.pool = BufferPool()

    def save(self, save: Save, *, staged: Callable[[], None]) -> StepCommit:
        """Write this rank's share of a step, take part in its commit, and return that.

        `staged` is called once the tensors of the snapshot may change again.

        Raises:
            DatastoreError: the step is not committed; earlier ones are intact.
        """
        try:
            info = self._write(save, staged=staged)
            if save.first is not None:
                save.first()
            commit = self._commit(save)
        except BaseException as error:
            self._history.failed.add(save.ref)
            self._history.whole = True
            leave_note(self._member, save.ref, error)
            raise
        self._history.committed(commit, info.entries)
        return commit

    def confirm(self, snapshot: Snapshot, metrics: Mapping[str, Any], *, staged: Callable[[], None]) -> StepCommit:
        """Return the commit of the head if the snapshot is what it holds; nothing is written.

        Raises:
            ConflictError: the snapshot differs.
        """
        known = Known(self._history.known.entries)  # Everything is asked.
        share = stage(snapshot, known, self.pool, threads=self._member.options.threads, copy=False)
        if share.buffer is not None:
            self.pool.give(share.buffer)
        staged()
        return self._history.check_same(snapshot, metrics, changed=bool(share.fresh))

    def tidy(self, *, more: int = 0, spare: AbstractSet[int] = frozenset()) -> None:
        """Forget what the run need not keep, but for `more` steps and those to `spare`; a failure is logged, because the step is safe already.

        The first time, what writers left unfinished goes as well, who had begun before this one and were killed.
        """
        try:
            if more:
                spare |= set(StepLog(self._member.storage).steps()[-1 - more :])
            collect(
                self._member.storage,
                msgspec.structs.replace(self._keep, last=self._keep.last + more),
                session=self._member.session,
                spare=spare,
            )
            if self._opened:
                self._member.storage.clear_unfinished(before=self._opened)
                self._opened = 0.0
        except DatastoreError as error:
            _LOGGER.warning("old checkpoints were not removed: %s", error)

    def _write(self, save: Save, *, staged: Callable[[], None]) -> PartInfo:
        # What is ahead may let go what is known now.
        known = Known() if save.ahead is not None or self._history.whole else self._history.known
        share = stage(save.snapshot, known, self.pool, threads=self._member.options.threads, copy=save.copy)
        if save.copy:
            staged()  # Before anything is asked of the storage, which may be far away.
        try:
            if save.ahead is not None:
                wait([save.ahead])
                share = share if self._history.whole else share.beside(self._history.known)
            head = self._history.head
            self._run = self._run or ensure_run(self._member, run_id="" if head is None else head.commit.run_id)
            self._make_room()
            if self._member.rank == 0:
                make_space(self._member.storage, self._keep, share.size_bytes * self._member.world)
            return write_share(self._member, self._run.run_id, save.ref, snapshot=save.snapshot, staged=share)
        finally:
            if share.buffer is not None:
                self.pool.give(share.buffer)

    def _commit(self, save: Save) -> StepCommit:
        if self._member.rank > 0:
            return await_commit(self._member, save.ref)
        parts = gather_parts(self._member, save.ref)
        parent = self._history.ref
        commit = build_commit(self._member, parts, parent=parent, items=save.snapshot.items, metrics=save.metrics)
        write_layout(self._member.storage, save.ref, parts)
        check_standing(self._member.storage, commit.uses)
        self._make_room()
        stored = put_commit(self._member.storage, commit)
        write_hint(self._member.storage, save.ref)
        return stored

    def _make_room(self) -> None:
        history = self._history
        make_room(self._member, head=history.ref, damaged=history.damaged, failed=history.failed)


class Handle:
    """One save in flight. Thread-safe."""

    def __init__(self, step: int, size_bytes: int = 0) -> None:
        self.step = step
        self.size_bytes = size_bytes
        """What its copy takes."""

        self.copied: Callable[[float | None], None] | None = None
        """Waits until it is in the second place, if there is one; known once it is committed."""

        self._staged: Future[None] = Future()
        self._committed: Future[StepCommit] = Future()
        self._heard = threading.Event()
        weakref.finalize(self, _tell, step, self._committed, self._heard)

    def staged(self, *, timeout_s: float | None = None) -> None:
        """Wait until the state may change again: it has been copied.

        Raises:
            WaitError: it took longer than `timeout_s`; the save goes on.
            DatastoreError: the save failed.
        """
        self._wait(self._staged, timeout_s, "copied")

    def committed(self, *, timeout_s: float | None = None) -> StepCommit:
        """Wait until the step is durable on all ranks and can be restored; return its commit.

        Raises:
            WaitError: it took longer than `timeout_s`; the save goes on.
            DatastoreError: the save failed; the steps before it are intact.
        """
        self._wait(self._committed, timeout_s, "committed")
        return self._committed.result()

    def replicated(self, *, timeout_s: float | None = None) -> None:
        """Wait until the step is in the second place, too.

        Raises:
            ConfigError: there is no second place.
            WaitError: it took longer than `timeout_s`; the copy goes on.
            DatastoreError: the save, or the copy, failed.
        """
        self.committed(timeout_s=timeout_s)
        if self.copied is None:
            raise ConfigError("there is no second place", step=self.step, hint="Save to ds.TwoPlaces(first, second).")
        self.copied(timeout_s)

    @property
    def ended(self) -> Future[StepCommit]:
        """Done when the save has ended, well or not; to be waited for only."""
        return self._committed

    @property
    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._committed.done()

    def failure(self) -> DatastoreError | None:
        """Return why the save has failed, or None if it has not, or not yet; who asks has heard of it.

        Raises:
            BaseException: it failed for a reason that is none of this package's.
        """
        error = self._committed.exception() if self._committed.done() else None
        if error is not None:
            self._heard.set()
            if not isinstance(error, DatastoreError):
                raise error
        return error

    def wait_staged(self) -> None:
        """Wait as `staged` does; a failure is left for others to raise."""
        wait([self._staged])

    def raise_unheard(self) -> None:
        """Wait for the end; raise the error of a failed save unless it has been raised before."""
        wait([self._committed])
        if not self._heard.is_set():
            self._raise(self._committed)

    def run(self, work: Callable[[Callable[[], None]], StepCommit]) -> None:
        """Do `work`, which calls its argument when the state is staged; keep its result, or raise and keep its error."""
        try:
            commit = work(self._mark_staged)
        except BaseException as error:
            for future in (self._staged, self._committed):
                if not future.done():
                    future.set_exception(error)
            raise
        self._mark_staged()
        self._committed.set_result(commit)

    def run_here(self, work: Callable[[Callable[[], None]], StepCommit]) -> None:
        """Do `work` as `run` does, for a caller who hears of its error by this call."""
        self._heard.set()
        self.run(work)

    def _mark_staged(self) -> None:
        if not self._staged.done():
            self._staged.set_result(None)

    def _wait(self, future: Future[Any], timeout_s: float | None, what: str) -> None:
        futures: list[Future[Any]] = [future]
        wait(futures, timeout=timeout_s)
        if not future.done():
            hint = "Wait longer; the save goes on."
            raise WaitError(f"the step is not {what} yet", step=self.step, waited_s=timeout_s, hint=hint)
        self._raise(future)

    def _raise(self, future: Future[Any]) -> None:
        if future.exception() is not None:
            self._heard.set()
            future.result()


def _tell(step: int, committed: Future[StepCommit], heard: threading.Event) -> None:
    """Log the error of a save that has been forgotten."""
    error = committed.exception() if committed.done() else None
    if error is not None and not heard.is_set():
        _LOGGER.error("step %d was not saved: %s", step, error)


@dataclass(frozen=True, slots=True)
class _Head:
    """The step that the state in memory was loaded from or saved to last."""

    commit: StepCommit
    digests: dict[str, str]

    @property
    def ref(self) -> StepRef:
        """Its name."""
        return self.commit.ref
