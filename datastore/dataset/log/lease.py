"""One writer at a time on storage that cannot promise put-if-absent: a lease, as good as it can be there.

A second writer that starts while the lease is fresh is refused. Two that start within the same `_SETTLE_S` are told
apart by reading the lease back after that time. A writer that was stopped for longer than the lease lasts is not
held back by anything: that is the price of such storage, and why datasets on it say so when they are made.
"""

import secrets
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from datastore.dataset.log.keys import LEASE_KEY
from datastore.document import Sealed, seal, unseal
from datastore.errors import ConflictError, CorruptError, MissingError
from datastore.storage.base import Storage

__all__ = ["WriterLease", "single_writer"]

_FIRST_PAUSE_S = 0.005

_LONGEST_PAUSE_S = 1.0


class CommitPatience:
    """Waits with exponential back-off and full jitter until a deadline."""

    def __init__(self, limit_s: float) -> None:
        self.deadline = time.monotonic() + limit_s
        self.limit_s = limit_s
        self.longest_s = _FIRST_PAUSE_S

    def wait(self, key: str) -> None:
        if time.monotonic() >= self.deadline:
            raise ConflictError(
                "could not commit in time",
                where=key,
                patience_s=self.limit_s,
                hint="Nothing of this commit is visible. Try again when fewer writers are at work.",
            )
        Event().wait(secrets.SystemRandom().uniform(0, self.longest_s))
        self.longest_s = min(self.longest_s * 2, _LONGEST_PAUSE_S)


_LEASE_S = 60.0

_SETTLE_S = 0.1


class WriterLease(Sealed, frozen=True, kw_only=True):
    """`_log/_writer`: who may commit, until when."""

    writer_id: str
    expires: float
    """Seconds since the epoch, by the writer's clock."""


@contextmanager
def single_writer(storage: Storage) -> Iterator[None]:
    """Hold the lease of a dataset.

    Raises:
        ConflictError: another writer holds it.
    """
    mine = WriterLease(writer_id=uuid.uuid4().hex, expires=time.time() + _LEASE_S)
    held = _read(storage)
    if held is not None and held.expires > time.time():
        raise _refusal(storage, held)
    storage.put(LEASE_KEY, seal(mine))
    Event().wait(_SETTLE_S)
    held = _read(storage)
    if held is None or held.writer_id != mine.writer_id:
        raise _refusal(storage, held)
    try:
        yield
    finally:
        storage.delete(LEASE_KEY)


def _read(storage: Storage) -> WriterLease | None:
    try:
        return unseal(WriterLease, storage.get(LEASE_KEY), where=LEASE_KEY)
    except (MissingError, CorruptError):
        return None


def _refusal(storage: Storage, held: WriterLease | None) -> ConflictError:
    return ConflictError(
        "another writer is at work, and this storage allows one at a time",
        url=storage.url,
        free_in_s=round(held.expires - time.time(), 1) if held else None,
        hint="Its put-if-absent does not hold. Try again when the other is done.",
    )
