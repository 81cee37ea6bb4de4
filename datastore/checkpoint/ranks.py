"""Who is saving: the run, and this process's place among those that save together.

`run.json` is written by the first save, never by reading. If it was lost while steps are there, the next save writes
it again with the identity that the steps carry.
"""

import os
import uuid
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

from datastore.checkpoint.format.manifest import RUN_KEY, RunInfo, StepRef
from datastore.checkpoint.settings import CheckpointOptions
from datastore.checkpoint.steps import StepLog
from datastore.checkpoint.waiting import wait_until
from datastore.digest import digest_hex
from datastore.document import seal, unseal
from datastore.errors import ConfigError, ConflictError, CorruptError, MissingError, WaitError
from datastore.storage.base import Storage
from datastore.storage.probe import probe_exclusive

__all__ = ["Member", "ensure_run", "now", "read_run", "writer"]

_OTHERS = {"datastore.json": "a dataset"}


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of one launch. `session` is the same on all ranks and new for each launch: it makes part names unique."""

    storage: Storage
    rank: int
    world: int
    session: str
    options: CheckpointOptions

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


def ensure_run(member: Member) -> RunInfo:
    """Return what `run.json` says; rank 0 writes it if it is not there, the others wait for it.

    Raises:
        WaitError: rank 0 did not write it in time.
    """
    storage = member.storage
    info = read_run(storage)
    if info is None and member.rank == 0:
        with suppress(ConflictError):  # Another launch was faster; its answer is as good.
            storage.put_new(RUN_KEY, seal(_new_run(storage)))
        info = read_run(storage)
    info = info or wait_until(lambda: read_run(storage), timeout_s=member.options.wait_s)
    if info is None:
        hint = "Check that rank 0 is alive and that all ranks save to the same URL."
        raise WaitError("rank 0 did not create the run in time", url=storage.url, rank=0, hint=hint)
    return info


def _new_run(storage: Storage) -> RunInfo:
    log = StepLog(storage)
    newest = log.newest()
    run_id = uuid.uuid4().hex if newest is None else log.read(newest).run_id
    return RunInfo(run_id=run_id, created=now(), exclusive=probe_exclusive(storage), writer=writer())


def now() -> str:
    """Return the time as stored: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def writer() -> str:
    """Return which code writes."""
    return f"datastore {version('datastore')}, process {os.getpid()}"
