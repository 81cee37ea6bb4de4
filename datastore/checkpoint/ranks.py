"""The ranks that save together: which run it is, who belongs to it, how they wait for one another and how they agree.

`run.json` is written by the first save, never by reading. If it was lost while steps are there, the next save writes
it again with the identity that the steps carry.

Ranks wait for one another through storage: each asks again with growing pauses, and gives up in finite time.

They agree on which step they restore, since none may take one that another could not verify. An agreement is a function that every rank calls with a number, equally often, and that returns the least of them on
every rank. That is enough for everything: the newest step that all can see, whether all found it sound (0 or 1), and
whether all mean the same save. A trainer passes an all-reduce of its process group; without one the ranks meet in
storage, at the price of one tiny file per rank and question.
"""

import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from typing import TypeVar

from datastore.checkpoint.format.manifest import RUN_KEY, VOTES, RunInfo, StepRef
from datastore.checkpoint.steps import CheckpointerSettings, StepLog
from datastore.digest import digest_hex
from datastore.document import seal, unseal
from datastore.errors import ConfigError, ConflictError, CorruptError, MissingError, WaitError, plain
from datastore.host import utc_now
from datastore.storage.base import Storage, probe_exclusive

__all__ = [
    "Agree",
    "SavingRank",
    "StorageVote",
    "all_equal",
    "check_member",
    "check_step",
    "ensure_run",
    "read_run",
    "wait_until",
    "writer",
]

_SESSION = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")

_OTHERS = {"datastore.json": "a dataset"}


def check_member(rank: int, world: int, session: str) -> None:
    """Raise `ConfigError` unless `rank` of `world` in `session` can be a member."""
    if world < 1 or not 0 <= rank < world:
        raise ConfigError("no such rank", rank=rank, world=world, hint="Ranks count from 0 to world - 1.")
    if world > 1 and not session:
        hint = "Pass a text that all ranks share and that is new for each launch."
        raise ConfigError("several ranks need a session", world=world, hint=hint)
    if session and not _SESSION.fullmatch(session):
        hint = "Use letters, digits, '.', '_' and '-'."
        raise ConfigError("not a name for a session", session=session, hint=hint)


def check_step(step: int) -> int:
    """Return `step`, a whole number from 0 on, as one of Python.

    Raises:
        ConfigError: it is something else.
    """
    number: int = plain(step)
    if type(number) is not int or number < 0:
        raise ConfigError("not a step", step=number, hint="Use an integer from 0 on.")
    return number


@dataclass(frozen=True, slots=True)
class SavingRank:
    """One rank of one launch. `session` is the same on all ranks and new for each launch: it makes part names unique."""

    storage: Storage
    rank: int
    world: int
    session: str
    options: CheckpointerSettings

    def save_ref(self, step: int, attempt: int) -> StepRef:
        """Return the name of the `attempt`-th save of `step` in this session: equal on all ranks, used by no other."""
        return StepRef(step=step, save_id=digest_hex(f"{self.session}/{step}/{attempt}".encode())[:16])


def read_run(storage: Storage) -> RunInfo | None:
    """Return what `run.json` says, or None if there is none.

    Raises:
        CorruptError: it does not match its digest.
        ConfigError: this URL holds something else.
    """
    try:
        return unseal(RunInfo, storage.get(RUN_KEY), where=RUN_KEY)
    except CorruptError as error:
        hint = "Restore it from a copy, or remove it: the next save writes it again from the newest step."
        raise CorruptError(error.fact, hint=hint, **error.values) from None
    except MissingError:
        pass
    for key, what in _OTHERS.items():
        try:
            storage.stat(key)
        except MissingError:
            continue
        hint = "Give the run a folder of its own."
        raise ConfigError(f"this URL holds {what}, not a run", url=storage.url, hint=hint)
    return None


def ensure_run(member: SavingRank, *, run_id: str = "") -> RunInfo:
    """Return what `run.json` says; rank 0 writes it if it is not there (for the run `run_id`, if that is known), the others wait for it.

    Raises:
        WaitError: rank 0 did not write it in time.
    """
    storage = member.storage
    info = read_run(storage)
    if info is None and member.rank == 0:
        with suppress(ConflictError):  # Another launch was faster; its answer is as good.
            storage.put_new(RUN_KEY, seal(_new_run(storage, run_id)))
        info = read_run(storage)
    info = info or wait_until(lambda: read_run(storage), timeout_s=member.options.wait_s)
    if info is None:
        hint = "Check that rank 0 is alive and that all ranks save to the same URL."
        raise WaitError("rank 0 did not create the run in time", url=storage.url, rank=0, hint=hint)
    return info


def _new_run(storage: Storage, run_id: str) -> RunInfo:
    log = StepLog(storage)
    known = (commit.run_id for step in reversed(log.steps()) if (commit := log.read_if_sound(step)) is not None)
    run_id = run_id or next(known, None) or uuid.uuid4().hex
    return RunInfo(run_id=run_id, created=utc_now(), exclusive=probe_exclusive(storage), writer=writer())


def writer() -> str:
    """Return which code writes."""
    return f"datastore {version('llm-datastore')}, process {os.getpid()}"


Agree = Callable[[int], int]
"""Return the least of the numbers that the ranks call this with; a collective operation."""


class StorageVote:
    """An agreement through files. Each launch needs a session of its own, or it would read the votes of the last one."""

    def __init__(self, member: SavingRank) -> None:
        self._member = member
        self._numbers = count()

    def __call__(self, value: int) -> int:
        """Return the least `value` of all ranks.

        Raises:
            WaitError: some ranks did not vote in time; the message names them.
            ConflictError: this rank's vote is there already, so another process has the same session and rank.
        """
        if self._member.world == 1:
            return value
        number = next(self._numbers)
        try:
            self._member.storage.put_new(self._key(number, self._member.rank), str(value).encode())
        except ConflictError:
            hint = "Give each launch a session of its own, and each process its own rank."
            raise ConflictError(
                "another process voted in this place", session=self._member.session, hint=hint
            ) from None
        found: list[int] = []

        def next_missing() -> list[int] | None:
            for rank in range(len(found), self._member.world):
                vote = self._read(number, rank)
                if vote is None:
                    return None
                found.append(vote)
            return found

        if wait_until(next_missing, timeout_s=self._member.options.wait_s) is None:
            late = [rank for rank in range(self._member.world) if self._read(number, rank) is None]
            hint = "Check those processes; all ranks must call restore."
            raise WaitError("ranks did not take part in the restore in time", ranks=late, hint=hint)
        return min(found)

    def _key(self, number: int, rank: int) -> str:
        return f"{VOTES}/{self._member.session}/{number:06d}-{rank:05d}"

    def _read(self, number: int, rank: int) -> int | None:
        try:
            return int(self._member.storage.get(self._key(number, rank)))
        except MissingError:
            return None


def all_equal(agree: Agree, value: int) -> bool:
    """Return, on every rank, whether all of them called this with the same `value`."""
    least, greatest = agree(value), -agree(-value)
    return least == greatest


T = TypeVar("T")

_FIRST_PAUSE_S = 0.002

_LONGEST_PAUSE_S = 1.0


def wait_until(ready: Callable[[], T | None], *, timeout_s: float) -> T | None:
    """Return the first value of `ready()` that is not None, or None if there was none for `timeout_s`.

    Asked at least once; the pauses double from 2 ms to 1 s, so an answer is seen at most twice as late as it came.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    pause_s = _FIRST_PAUSE_S
    while True:
        value = ready()
        left = deadline - time.monotonic()
        if value is not None or left <= 0:
            return value
        pause.wait(min(pause_s, left))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
