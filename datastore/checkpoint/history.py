"""Where this process stands in the run: the step its state comes from, and what of it is already stored.

A run is one line of steps. A process may only add to the end of the line, and only if its own state comes from there:
it has saved or restored the last step itself. Saving after an older step was restored on purpose is refused until
`rewind` has dropped the steps after it, so a run never mixes two histories.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from datastore.checkpoint.format.manifest import Entry, StepCommit, StepRef
from datastore.checkpoint.saving.snapshot import Snapshot, item_digests
from datastore.checkpoint.saving.write import Known
from datastore.errors import ConflictError

__all__ = ["Head", "History"]


@dataclass(frozen=True, slots=True)
class Head:
    """The step that the state in memory was loaded from or saved to last."""

    commit: StepCommit
    digests: dict[str, str]

    @property
    def ref(self) -> StepRef:
        """Its name."""
        return self.commit.ref


class History:
    """Changed by the thread that saves and by restores, which never run at the same time."""

    def __init__(self) -> None:
        self.head: Head | None = None
        self.known = Known()
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
        self.head = Head(commit, item_digests(commit.items))
        self.known = Known().after(entries)
        self.damaged = frozenset(damaged)
        self.failed.clear()

    def committed(self, commit: StepCommit, entries: Iterable[Entry]) -> None:
        """Continue from `commit`, which this process has just taken part in."""
        self.head = Head(commit, item_digests(commit.items))
        self.known = self.known.after(entries)
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
