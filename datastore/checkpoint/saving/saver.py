"""The course of one save on one rank, from the captured state to the commit that all ranks see.

Everything here may run in a thread of its own: it touches the training program's tensors only until it says that the
state is staged.
"""

from collections.abc import Callable, Mapping
from logging import getLogger
from typing import Any

from datastore.checkpoint.buffers import BufferPool
from datastore.checkpoint.format.manifest import PartInfo, RunInfo, StepCommit, StepRef
from datastore.checkpoint.history import History
from datastore.checkpoint.ranks import Member, ensure_run
from datastore.checkpoint.retention import collect
from datastore.checkpoint.saving.commit import (
    await_commit,
    build_commit,
    gather_parts,
    leave_note,
    make_room,
    put_commit,
    write_hint,
)
from datastore.checkpoint.saving.snapshot import Snapshot
from datastore.checkpoint.saving.write import Known, stage, write_share
from datastore.checkpoint.settings import Keep
from datastore.errors import DatastoreError

__all__ = ["Saver"]

_log = getLogger(__name__)


class Saver:
    """Saves one step after the other; not for concurrent use."""

    def __init__(self, member: Member, keep: Keep, history: History) -> None:
        self._member = member
        self._keep = keep
        self._history = history
        self._run: RunInfo | None = None
        self.pool = BufferPool()

    def save(
        self, ref: StepRef, snapshot: Snapshot, metrics: Mapping[str, Any], *, copy: bool, staged: Callable[[], None]
    ) -> StepCommit:
        """Write this rank's share of `ref`, take part in its commit, and return that.

        `staged` is called once the tensors of the snapshot may change again; `copy` says whether they might before
        the save has ended.

        Raises:
            DatastoreError: the step is not committed; earlier ones are intact.
        """
        try:
            info = self._write(ref, snapshot, copy=copy, staged=staged)
            commit = self._commit(ref, snapshot, metrics)
        except BaseException as error:
            self._history.failed.add(ref)
            leave_note(self._member, ref, error)
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

    def tidy(self) -> None:
        """Forget what the run need not keep; a failure is logged, because the step is safe already."""
        try:
            collect(self._member.storage, self._keep, session=self._member.session)
        except DatastoreError as error:
            _log.warning("old checkpoints were not removed: %s", error)

    def _write(self, ref: StepRef, snapshot: Snapshot, *, copy: bool, staged: Callable[[], None]) -> PartInfo:
        share = stage(snapshot, self._history.known, self.pool, threads=self._member.options.threads, copy=copy)
        if copy:
            staged()  # Before anything is asked of the storage, which may be far away.
        try:
            self._run = self._run or ensure_run(self._member)
            self._make_room()
            return write_share(self._member, self._run.run_id, ref, snapshot=snapshot, staged=share)
        finally:
            if share.buffer is not None:
                self.pool.give(share.buffer)

    def _commit(self, ref: StepRef, snapshot: Snapshot, metrics: Mapping[str, Any]) -> StepCommit:
        if self._member.rank > 0:
            return await_commit(self._member, ref)
        parts = gather_parts(self._member, ref)
        parent = self._history.ref
        commit = build_commit(self._member, parts, parent=parent, items=snapshot.items, metrics=metrics)
        self._make_room()
        stored = put_commit(self._member.storage, commit)
        write_hint(self._member.storage, ref)
        return stored

    def _make_room(self) -> None:
        history = self._history
        make_room(self._member, head=history.ref, damaged=history.damaged, failed=history.failed)
