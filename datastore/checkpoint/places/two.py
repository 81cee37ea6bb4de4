"""Two places behind one checkpointer: steps are committed in the first, which is near, and copied to the second, which lasts.

    places = TwoPlaces("/nvme/run", "s3://bucket/run", keep=Keep(last=10))
    ck = Checkpointer(places, keep=Keep(last=2))

A save is done when its step is in the first place; a thread of rank 0 copies it (`replica.py`), and whoever needs to know waits
for `handle.replicated()`. Steps that are committed meanwhile are copied together. A step that is being copied is not let go in
the first place; one that has been let go before its turn came is told, and is not an error. The copy takes the memory that saves copy into,
and more only if the next save comes before it has ended.

If the copy fails, the next call raises it, once, and the step stays good. The step after it brings along what is missing.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from logging import getLogger

from datastore.checkpoint.codec import Codec, with_codec
from datastore.checkpoint.format.manifest import StepCommit, StepRef, step_key
from datastore.checkpoint.keeping import Keep, pinned_steps
from datastore.checkpoint.ranks import read_run, wait_until
from datastore.checkpoint.replica import replicate
from datastore.checkpoint.saving.snapshot import BufferPool
from datastore.checkpoint.steps import StepLog
from datastore.errors import ConfigError, ConflictError, DatastoreError, MissingError, StorageError, WaitError
from datastore.storage.base import Storage, StorageLike
from datastore.storage.resolve import open_storage
from datastore.threads import in_thread

__all__ = ["SecondPlace", "TwoPlaces", "opened"]

_LOGGER = getLogger(__name__)

_KEEP = Keep()

Wait = Callable[[float | None], None]
"""Waits until a step is in the second place, for so many seconds at most."""


@dataclass(frozen=True, slots=True)
class TwoPlaces:
    """Where a run is saved to (`first`), and where it is copied to (`second`); each keeps steps by a rule of its own."""

    first: StorageLike
    second: StorageLike
    keep: Keep = _KEEP
    """What stays in the second place."""

    codec: Codec = "none"
    """How parts are stored there: "zstd" for a place that takes less than 1 GB/s, or bills bytes."""


def opened(place: StorageLike | TwoPlaces) -> tuple[Storage, TwoPlaces | None]:
    """Return the storage that steps are saved to, and both places with their storages, if there are two.

    Raises:
        ConfigError: the places are one, or hold different runs.
    """
    if not isinstance(place, TwoPlaces):
        return _storage(place), None
    first, second = _storage(place.first), _storage(place.second)
    if first.url == second.url:
        hint = 'Name another one, or none (checkpoint.replica = "").'
        raise ConfigError("the second place is the first", url=first.url, hint=hint)
    here, there = read_run(first), _there(second)
    if here is not None and there is not None and here.run_id != there:
        hint = "Name an empty place, or that of this run."
        raise ConfigError("the second place holds another run", url=second.url, run=there, hint=hint)
    return first, replace(place, first=first, second=second)


def _storage(place: StorageLike) -> Storage:
    return with_codec(place if isinstance(place, Storage) else open_storage(place))


def _there(second: Storage) -> str | None:
    """Return which run is in the second place; None if there is none, or nobody can tell now."""
    try:
        found = read_run(second)
    except StorageError as error:
        _LOGGER.warning("the second place cannot be read now: %s", error)
        return None
    return None if found is None else found.run_id


class SecondPlace:
    """Copies what is committed in the first place, and knows what has been copied. Thread-safe."""

    def __init__(self, places: TwoPlaces, pool: BufferPool, *, rank: int, wait_s: float) -> None:
        self._first, self.storage = _storage(places.first), _storage(places.second)
        self._keep, self._codec = places.keep, places.codec
        self._pool = pool
        self._rank = rank
        self._wait_s = wait_s
        self._lock = threading.Lock()
        self._queue: list[tuple[StepCommit, Future[None]]] = []
        self._job: Future[None] | None = None
        self._copying: frozenset[int] = frozenset()
        self._unheard: DatastoreError | None = None
        self._asked = False
        """Whether the program asks for failures: then no other call raises them, but for the last."""

        self._told: set[StepRef] = set()
        """The saves of this process: one line of steps."""

    def bring(self, commit: StepCommit) -> Wait:
        """Have the step of `commit` copied; return what waits for it. Rank 0 copies, the others look whether it has."""
        if self._rank > 0:
            return lambda timeout_s: self._look(commit, self._wait_s if timeout_s is None else timeout_s)
        copied: Future[None] = Future()
        with self._lock:
            self._queue.append((commit, copied))
            if self._job is None or self._job.done():
                self._job = in_thread(self._work, name="replicate")
        return lambda timeout_s: self._listen(commit, copied, timeout_s)

    @property
    def copying(self) -> frozenset[int]:
        """The steps that the first place must not let go just now."""
        return self._copying

    def failure(self) -> DatastoreError | None:
        """Return why a copy has failed, if one has since this was asked last; who asks has heard of it, and is not told by other calls."""
        self._asked = True
        return self._take()

    def _take(self) -> DatastoreError | None:
        with self._lock:
            error, self._unheard = self._unheard, None
        return error

    def raise_unheard(self) -> None:
        """Raise the error of a copy that has failed, unless it has been raised, or the program asks for it."""
        if not self._asked:
            self._raise()

    def _raise(self) -> None:
        error = self._take()
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait until nothing is left to copy, and raise what nobody has heard of."""
        job = self._job
        if job is not None:
            wait([job])
        self._raise()

    def _work(self) -> None:
        while True:
            with self._lock:
                batch, self._queue = self._queue, []
                self._copying = frozenset(commit.step for commit, _ in batch)
                if not batch:
                    self._job = None
                    return
            self._bring_all(batch)

    def _bring_all(self, batch: list[tuple[StepCommit, Future[None]]]) -> None:
        try:
            self._copy([commit for commit, _ in batch])
        except BaseException as error:
            if isinstance(error, DatastoreError):
                _LOGGER.warning("step %d is not in the second place: %s", batch[-1][0].step, error)
                with self._lock:
                    self._unheard = error
            for _, copied in batch:
                copied.set_exception(error)
            if not isinstance(error, DatastoreError):
                raise
        else:
            for commit, copied in batch:
                self._tell(commit, copied)

    def _copy(self, commits: list[StepCommit]) -> None:
        self._told.update(commit.ref for commit in commits)
        for commit in commits:
            self._follow(commit)
        replicate(self._first, self.storage, keep=self._keep, codec=self._codec, memory=self._pool.lend)

    def _follow(self, commit: StepCommit) -> None:
        """Drop what the second place has after the step that `commit` was trained from: the first has gone back behind it."""
        if commit.parent is None:
            return
        log = StepLog(self.storage)
        later = [step for step in log.steps() if step > commit.parent.step]
        stale = [step for step in later if (found := log.read_if_sound(step)) is None or found.ref not in self._told]
        pinned = sorted(set(stale) & set(pinned_steps(self.storage)))
        if pinned:
            hint = "Unpin it, or save to another URL."
            raise ConflictError(
                "a step that was gone back behind is pinned", steps=pinned, url=self.storage.url, hint=hint
            )
        for step in reversed(stale):
            _LOGGER.warning(
                "removing step %d of %s: training went on from step %d", step, self.storage.url, commit.parent.step
            )
            self.storage.delete(step_key(step))

    def _tell(self, commit: StepCommit, copied: Future[None]) -> None:
        """Say of a step whether it is in the second place."""
        try:
            there = self._has(commit)
        except DatastoreError as error:
            copied.set_exception(error)
            return
        if there:
            copied.set_result(None)
            return
        fact = "the step was let go before it was copied, or cannot be read"
        hint = "Keep more steps in the first place, or save less often."
        _LOGGER.warning("%s: step %d", fact, commit.step)
        copied.set_exception(StorageError(fact, step=commit.step, hint=hint))

    def _has(self, commit: StepCommit) -> bool:
        with suppress(MissingError):
            return StepLog(self.storage).read(commit.step).ref == commit.ref
        return False

    def _listen(self, commit: StepCommit, copied: Future[None], timeout_s: float | None) -> None:
        wait([copied], timeout=timeout_s)
        if not copied.done():
            raise self._late(commit, timeout_s)
        error = copied.exception()
        with self._lock:
            if error is self._unheard:
                self._unheard = None
        copied.result()

    def _look(self, commit: StepCommit, timeout_s: float) -> None:
        if not wait_until(lambda: self._has(commit) or None, timeout_s=timeout_s):
            raise self._late(commit, timeout_s)

    def _late(self, commit: StepCommit, timeout_s: float | None) -> WaitError:
        hint = "Wait longer; the step is safe in the first place."
        return WaitError("the step is not in the second place yet", step=commit.step, waited_s=timeout_s, hint=hint)
