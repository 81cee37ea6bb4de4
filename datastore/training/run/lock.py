"""One writer for a run folder: a lock that outlives nobody.

The holder is the highest generation in `lock/`. Taking the lock is put-if-absent of the next generation, so of any number
of takers one wins, and the winner looks again: a higher generation than its own means that it came too late. A lock whose
process is dead is taken over if that can be known, which is on its own machine only; of another machine's process one has
to be told (`take_over`).
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from datastore.document import Sealed, seal, unseal
from datastore.errors import ConflictError, MissingError
from datastore.storage.base import Storage

__all__ = ["LockHolder", "RunLock", "writer_of"]

_FOLDER = "lock"


class LockHolder(Sealed, frozen=True, kw_only=True):
    """`lock/<generation>.json`: who writes to this run."""

    session: str
    host: str
    boot: str
    """Names the boot of that machine; process ids start anew with it. Empty where the system has no such name."""

    pid: int
    started: str
    """When that process started, in the system's own words: a process id can be given to another process."""

    since: str
    """UTC, ISO 8601."""


class RunLock:
    """The lock of one run folder, held from `with` until its end.

    Raises:
        ConflictError: another process holds it, or may.
    """

    def __init__(self, storage: Storage, *, session: str, take_over: bool = False) -> None:
        self._storage = storage
        self._session = session
        self._take_over = take_over
        self._key = ""

    def __enter__(self) -> Self:
        last = 0
        for generation, key in _generations(self._storage):
            last = generation
            if self._take_over:
                continue  # Whoever it was, and though it cannot be read.
            with _gone_is_fine():
                self._check_dead(unseal(LockHolder, self._storage.get(key), where=key), key)
        self._key = f"{_FOLDER}/{last + 1:08d}.json"
        try:
            self._storage.put_new(self._key, seal(_this_process(self._session)))
        except ConflictError:
            raise ConflictError("another process has just taken this run", run=self._storage.url) from None
        if self.lost:
            self._storage.delete(self._key)
            raise ConflictError("another process has just taken this run", run=self._storage.url)
        for generation, key in _generations(self._storage):
            if generation <= last:
                self._storage.delete(key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._storage.delete(self._key)

    @property
    def lost(self) -> bool:
        """Whether somebody else has taken over since."""
        return any(key > self._key for _, key in _generations(self._storage))

    def _check_dead(self, holder: LockHolder, key: str) -> None:
        if _is_dead(holder):
            return
        raise ConflictError(
            "another process writes to this run",
            run=self._storage.url,
            host=holder.host,
            pid=holder.pid,
            since=holder.since,
            hint=f"Wait for it or stop it. If it is gone for good, take over (`take_over`), or delete {key} in the run folder.",
        )


def writer_of(storage: Storage) -> str | None:
    """Return who writes to the run, as far as is known from here; None: nobody.

    Raises:
        CorruptError: the lock is damaged.
    """
    for _, key in reversed(_generations(storage)):
        with _gone_is_fine():
            holder = unseal(LockHolder, storage.get(key), where=key)
            return None if _is_dead(holder) else f"{holder.host}, process {holder.pid}, since {holder.since}"
    return None


def _generations(storage: Storage) -> list[tuple[int, str]]:
    return [(int(Path(found.key).stem), found.key) for found in storage.list(_FOLDER)]


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    """Its holder may release a lock while we look at it."""
    try:
        yield
    except MissingError:
        return


def _this_process(session: str) -> LockHolder:
    return LockHolder(
        session=session,
        host=socket.gethostname(),
        boot=_boot(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _is_dead(holder: LockHolder) -> bool:
    """Whether the holder's process is known to be gone."""
    if holder.host != socket.gethostname():
        return False
    if holder.boot != _boot():
        return True
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # It lives, and belongs to another user.
    return _started(holder.pid) != holder.started


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return field 22 of /proc/PID/stat (see proc(5)), in clock ticks since boot; empty where there is no /proc.

    A zombie has ended, though its parent has not asked for its status yet: it has no start any more.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in {"Z", "X"} else fields[18]
