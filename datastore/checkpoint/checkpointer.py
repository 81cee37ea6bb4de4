"""Checkpoints of one run, as a training program uses them.

    ck = Checkpointer("runs/first", keep=Keep(last=3))
    items = {"model": model, "optim": optimizer, "data": loader}
    info = ck.restore(items)                         # the newest sound step; verified, then loaded, or nothing touched
    ...
    with ck.guard():
        optimizer.step()                             # waits while a save still copies, which is rarely
    handle = ck.save(step, items, metrics={"loss": 2.1})   # returns at once
    ...
    ck.close()                                       # waits for the last save, and raises what went wrong

With `TwoPlaces` in place of the URL a second place gets a copy of each step, and what the first has lost is read from there.

With several ranks each one makes the same calls with its `rank`, the `world` and a `session` that all share and that
no launch had before; they meet in storage only. A checkpointer is used by one thread of one process.
"""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import msgspec
import torch

from datastore.checkpoint.codec import with_codec
from datastore.checkpoint.dropping import drop_item
from datastore.checkpoint.format.manifest import StepCommit
from datastore.checkpoint.format.tree import TensorSpec, pack
from datastore.checkpoint.inspect import StepReport, StepVerifyReport, html_steps, inspect_step, verify_step
from datastore.checkpoint.keeping import Collected, Keep, best_steps, collect, drop_after, pin, pinned_steps, unpin
from datastore.checkpoint.loading.restore import Restored, Restorer
from datastore.checkpoint.places.two import SecondPlace, TwoPlaces, opened
from datastore.checkpoint.ranks import Agree, SavingRank, StorageVote, check_member, check_step, read_run
from datastore.checkpoint.saving.commit import leave_note
from datastore.checkpoint.saving.saver import Handle, Save, SaveHistory, Saver
from datastore.checkpoint.saving.snapshot import capture
from datastore.checkpoint.steps import CheckpointerSettings, Closing, StepLog, steps_of
from datastore.document import convert
from datastore.errors import ConfigError, DatastoreError
from datastore.storage.base import Storage, StorageLike
from datastore.threads import in_thread

__all__ = ["Checkpointer"]

_KEEP = Keep()

_OPTIONS = CheckpointerSettings()


class Checkpointer(Closing):
    """Saves and restores the state of one run below `url`."""

    def __init__(
        self,
        url: StorageLike | TwoPlaces,
        *,
        keep: Keep = _KEEP,
        rank: int = 0,
        world: int = 1,
        session: str = "",
        options: CheckpointerSettings = _OPTIONS,
    ) -> None:
        """Open the run; nothing is written before the first save.

        Raises:
            ConfigError: a setting is wrong, or the URL holds something else.
            CorruptError: `run.json` is damaged.
        """
        check_member(rank, world, session)
        if not isinstance(keep, Keep):
            raise ConfigError("not a rule of what to keep", keep=keep, hint="Pass keep=ds.Keep(last=3).")
        keep = convert(Keep, msgspec.structs.asdict(keep), where="keep")
        options = convert(CheckpointerSettings, msgspec.structs.asdict(options), where="options")
        storage, places = opened(url)
        read_run(storage)
        self._member = SavingRank(with_codec(storage, options.codec), rank, world, session or uuid.uuid4().hex, options)
        self._keep = keep
        self._history = SaveHistory()
        self._saver = Saver(self._member, keep, self._history)
        self._vote = StorageVote(self._member)
        self._second = (
            None if places is None else SecondPlace(places, self._saver.pool, rank=rank, wait_s=options.wait_s)
        )
        self._places = [storage] if self._second is None else [storage, self._second.storage]
        self._flights: list[Handle] = []
        self._job: Future[None] | None = None
        self._on_trial = False
        self._process = os.getpid()
        self._closed = False

    def _repr_html_(self) -> str:
        """For a notebook: the newest steps."""
        return html_steps(self._member.storage)

    @property
    def url(self) -> str:
        """Where the run is, without credentials."""
        return self._member.storage.url

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        *,
        metrics: Mapping[str, Any] | None = None,
        blocking: bool = False,
        first: Callable[[], object] | None = None,
        on_trial: bool = False,
    ) -> Handle:
        """Save `items` as `step` and return at once; the work is done in the background.

        `items` maps names to objects with `state_dict` and `load_state_dict`, to `PerRank`, or to nested dicts of
        tensors and plain values. Until the handle is `staged`, their tensors must not change: put `guard` around what
        changes them. `blocking` returns when the step is committed, and copies nothing. If the save before this one
        has not ended, this waits for it, unless both have room in `options.in_flight_bytes`.

        `first` is called before the step is committed, in the thread that saves: it stores what the step refers to. If it
        fails, the save has failed. A step `on_trial` does not count as kept until `approve` says that it is good: until
        then there is one more to go back to. `metrics` are stored with the step, for `best` and `keep`.

        Raises:
            ConfigError: something in `items` cannot be stored; the message has its path.
            ConflictError: `step` lies before the last one, or is committed with other content.
            DatastoreError: the save before this one failed, which has not been raised yet; or this one, if `blocking`.
        """
        self._check_open()
        step = check_step(step)
        try:
            snapshot = capture(items, rank=self._member.rank, world=self._member.world)
            values = pack(dict(metrics or {}), name="metrics", describe=_no_tensor).skeleton
        except BaseException as error:
            leave_note(self._member, self._member.save_ref(step, self._history.next_attempt(step)), error)
            raise
        handle = Handle(step, snapshot.size_bytes)
        ahead = None if blocking else self._ahead_of(handle)
        if ahead is None:
            self._settle()
        self._history.check_next(step)
        ref = self._member.save_ref(step, self._history.next_attempt(step))
        save = Save(ref, snapshot, values, copy=not blocking, first=first, ahead=ahead)
        work = partial(self._work, handle, save)
        self._on_trial = on_trial
        if blocking:
            handle.run_here(work)
            self._job = in_thread(self._tidy)
        else:
            self._flights.append(handle)
            self._job = in_thread(lambda: self._in_background(handle, work))
        return handle

    def _ahead_of(self, handle: Handle) -> "Future[None] | None":
        """Return the save that is still being written and that `handle` need not wait for; None, if it has to, or there is none."""
        flying = [flight for flight in self._flights if not flight.done]
        room = self._member.options.in_flight_bytes
        if len(flying) != 1 or len(self._flights) > 1 or handle.step <= flying[0].step:
            return None
        return self._job if flying[0].size_bytes + handle.size_bytes <= room else None

    def _work(self, handle: Handle, save: Save, staged: Callable[[], None]) -> StepCommit:
        if save.ahead is None and self._history.ref is not None and self._history.ref.step == save.ref.step:
            commit = self._saver.confirm(save.snapshot, save.metrics, staged=staged)
        else:
            commit = self._saver.save(save, staged=staged)
        if self._second is not None:
            handle.copied = self._second.bring(commit)
        return commit

    def _in_background(self, handle: Handle, work: Callable[[Callable[[], None]], StepCommit]) -> None:
        handle.run(work)
        self._tidy()

    def _tidy(self) -> None:
        if self._member.rank == 0:
            copying: frozenset[int] = frozenset() if self._second is None else self._second.copying
            self._saver.tidy(more=int(self._on_trial), spare=copying)

    def _tidy_after(self, jobs: list[Future[None]]) -> None:
        wait(jobs)
        self._tidy()

    def approve(self) -> None:
        """Count the step that was saved last `on_trial` as one that is good; what need not be kept goes in the background."""
        if self._on_trial:
            self._on_trial = False
            self._job = in_thread(partial(self._tidy_after, [] if self._job is None else [self._job]))

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Enter when no save is copying: `with ck.guard(): optimizer.step()`."""
        for flight in self._flights if self._process == os.getpid() else ():
            flight.wait_staged()
        yield

    def restore(
        self,
        items: Mapping[str, Any],
        *,
        step: int | Literal["latest"] = "latest",
        agree: Agree | None = None,
        partial: bool = False,
        fresh: bool = False,
    ) -> Restored:
        """Load `step` into `items`: all of it, verified before anything is overwritten, or nothing.

        With `fresh` the items are of a program that has just started, and worth nothing yet: chunks are verified as they arrive,
        once, which takes 0.7 of the time. A damaged step is then partly in the items until the step before is loaded over it, or
        the error is raised that there is none.

        "latest" is the newest step that is sound on every rank, in one of two places; `fell_back` of the result tells what was passed over.
        `agree` returns the least of the numbers that all ranks call it with; without it ranks agree through storage.
        Saved items that are not in `items` are an error, unless `partial`.

        Raises:
            MissingError: there is no such step, or none at all.
            CorruptError: the step asked for, or every step, is damaged.
            ResumeError: what is saved does not fit; the message lists the differences.
            WaitError: another rank did not take part in time.
        """
        self._settle()
        agree = agree or self._vote
        restorer = Restorer(self._member, items, places=self._places, agree=agree, partial=partial, fresh=fresh)
        restored, whole = restorer.newest() if step == "latest" else restorer.exactly(check_step(step))
        near = restored.url == self.url  # A save may only point into parts that are in the first place.
        entries = (entry for info in whole.parts for entry in info.entries if near)
        self._history.restored(whole.commit, entries, (damaged.step for damaged in restored.fell_back))
        return restored

    def rewind(self, step: int) -> list[int]:
        """Drop every step after `step` and return them, so that training can go on from there.

        Call it after an older step was restored on purpose. Rank 0 does the work, all ranks may call it.

        Raises:
            MissingError: there is no such step.
        """
        self._settle()
        homes = self._homes(step)
        found = [drop_after(p, step, elsewhere=p not in homes, dry_run=self._member.rank > 0) for p in self._places]
        dropped = sorted(set().union(*found))
        if self._history.ref is not None and self._history.ref.step > step:
            self._history.leave()
        return dropped

    def steps(self) -> list[int]:
        """Return the committed steps, in rising order; of two places those that are in one of them."""
        return steps_of(self._places)

    def latest(self) -> int | None:
        """Return the newest committed step, or None if there is none."""
        return max(self.steps(), default=None)

    def best(self, metric: str) -> int | None:
        """Return the committed step that was saved with the least `metric`, or with a `-` before its name the largest; None if none has it."""
        commits = (StepLog(self._home(step)).read_if_sound(step) for step in self.steps())
        return next(iter(best_steps([commit for commit in commits if commit is not None], metric)), None)

    def pin(self, step: int) -> None:
        """Keep `step`, whatever `keep` says, until `unpin`.

        Raises:
            MissingError: there is no such step.
        """
        for place in self._homes(step):
            pin(place, step)

    def unpin(self, step: int) -> None:
        """Let `step` go by the rules of `keep` again.

        Raises:
            ConfigError: it is not pinned.
        """
        for place in [place for place in self._places if step in pinned_steps(place)] or self._places[:1]:
            unpin(place, step)

    def drop(self, item: str, *, steps: Iterable[int]) -> list[int]:
        """Take `item`, such as the state of the optimizer, out of old `steps`, in each place; return those that had it.

        Rank 0 does the work, all ranks may call it.

        Raises:
            MissingError: there is no such step.
            ConfigError: one is the newest, or has nothing else.
            CorruptError: a step is damaged.
        """
        self._settle()
        found: set[int] = set()
        for step in set(steps) if self._member.rank == 0 else ():
            for place in self._homes(step):
                found.update(drop_item(place, item, steps=[step]).steps)
        return sorted(found)

    def inspect(self, step: int) -> StepReport:
        """Return what is in `step`.

        Raises:
            MissingError: there is no such step.
            CorruptError: its commit is damaged.
        """
        return inspect_step(self._home(step), step)

    def verify(self, step: int) -> StepVerifyReport:
        """Read all of `step` and return what is not as it was written.

        Raises:
            MissingError: there is no such step.
        """
        return verify_step(self._home(step), step)

    def _homes(self, step: int) -> list[Storage]:
        """Return the places that have `step`; the first, if none has."""
        step = check_step(step)
        return [place for place in self._places if step in StepLog(place).steps()] or self._places[:1]

    def _home(self, step: int) -> Storage:
        step = check_step(step)
        return self._homes(step)[0] if len(self._places) > 1 else self._places[0]

    def copy_failure(self) -> DatastoreError | None:
        """Return why a step is not in the second place, if a copy has failed since this was asked last.

        A program that has asked once is told here, and by `close`, and no `save` raises what became of an earlier copy.
        """
        return None if self._second is None else self._second.failure()

    def gc(self, *, dry_run: bool = False) -> Collected:
        """Remove what need not be kept, as each save does; return what was (or, if `dry_run`, would be) removed."""
        self._settle()
        dry_run = dry_run or self._member.rank > 0
        return collect(self._member.storage, self._keep, session=self._member.session, dry_run=dry_run)

    def close(self) -> None:
        """Wait for what is in flight, copies to the second place included, and give back its memory.

        Raises:
            DatastoreError: the last save, or a copy, failed, which has not been raised yet.
        """
        if self._closed or self._process != os.getpid():
            return
        try:
            self._settle()
            if self._second is not None:
                self._second.finish()
        finally:
            self._closed = True
            self._saver.pool.clear()

    def _settle(self) -> None:
        """Wait until no save is in flight; raise what has not been raised yet."""
        self._check_open()
        if self._job is not None:
            wait([self._job])
        while self._flights:
            self._flights.pop(0).raise_unheard()
        if self._second is not None:
            self._second.raise_unheard()

    def _check_open(self) -> None:
        if self._process != os.getpid():
            hint = "Use it in the process that made it; workers need no checkpoints."
            raise ConfigError("a checkpointer does not survive a fork", url=self.url, hint=hint)
        if self._closed:
            raise ConfigError("the checkpointer is closed", url=self.url, hint="Open another one.")


def _no_tensor(value: Any, name: str) -> TensorSpec | None:
    if isinstance(value, torch.Tensor):
        raise ConfigError("metrics are numbers and texts, not tensors", path=name, hint="Pass tensor.item().")
    return None
