"""Requests to a storage that is far away: each is repeated while that can help, and counted.

A request is tried again if its error is `transient` (throttling, a server's failure, a reset or silent connection, a
body that was cut short), after a pause of a random length up to a bound that doubles: full jitter, so that the clients
of a server that was down do not come back all at once. A number of tries and a deadline bound each request. A server
that never answered at all gets few tries: more often than not, its address is wrong. Rights and credentials are never
tried again. The libraries below are told not to repeat anything themselves, or each layer would multiply the others.

Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

import logging
import secrets as randomness
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Literal, TypeVar

from typing_extensions import Buffer, override

from datastore.errors import ConflictError, StorageError
from datastore.storage.base import Storage, check_key
from datastore.storage.errors import is_unreachable, translate
from datastore.storage.ranges import ranges_at_once
from datastore.storage.statistics import Operation, OperationStatistics, RequestMeter, Timed
from datastore.storage.urls import strip_credentials

__all__ = ["Reading", "RequestStorage", "Requests", "RetryPolicy"]

T = TypeVar("T")

Reading = Literal["get_ranges", "read_into"]

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long a request is tried. The defaults outlast a server's restart, some 20 to 40 s."""

    tries: int = 12
    """Including the first."""

    first_tries: int = 4
    """Including the first, as long as the server has never answered: some 0.4 s."""

    first_pause_s: float = 0.1
    """Upper bound of the first pause; each bound is twice the one before."""

    longest_pause_s: float = 10.0

    deadline_s: float = 120.0
    """No try begins later than this after the first."""


class Requests:
    """The requests of one storage. Thread-safe."""

    def __init__(self, url: str, *, policy: RetryPolicy | None = None, secrets: Iterable[str] = ()) -> None:
        self.meter = RequestMeter()
        self._url = url
        self._policy = policy or RetryPolicy()
        self._secrets = tuple(secrets)
        self._answered = False

    def run(self, operation: Operation, key: str, call: Callable[[], T], *, sized: Callable[[T], int] | int = 0) -> T:
        """Return what `call` returns, at last; `sized` says how many bytes that moved.

        Raises:
            DatastoreError: what `call` raised, as an error of ours.
        """
        writing = operation in {"put", "delete"}
        with self.meter.time(operation) as timed:
            tries = _Tries(self._policy, timed)
            while True:
                try:
                    with self.errors(key, writing=writing):
                        found = call()
                except StorageError as error:
                    self._pause(tries, error)
                else:
                    timed.bytes = sized if isinstance(sized, int) else sized(found)
                    return found

    def conceal(self, secrets: Iterable[str]) -> None:
        """Let no message show these, either."""
        self._secrets = tuple(dict.fromkeys((*self._secrets, *secrets)))

    def create(
        self,
        key: str,
        call: Callable[[], object],
        *,
        size_bytes: int,
        is_mine: Callable[[], bool],
        repeated: bool = False,
    ) -> None:
        """Let `call` write `key` unless it is there.

        An answer that was lost says nothing. The same conditional write is sent again, which can overwrite nobody; if it
        is refused, the bytes that are stored decide (`is_mine`): mine, so the first one had succeeded, or another's. With `repeated` any request may be sent twice unseen.

        Raises:
            ConflictError: the key held, or now holds, other bytes.
            StorageError: nothing was written; or, if it is `transient`, nobody knows.
        """
        doubtful = repeated
        with self.meter.time("put_new") as timed:
            tries = _Tries(self._policy, timed)
            while True:
                try:
                    with self.errors(key, writing=True, creating=True):
                        call()
                except ConflictError:
                    if doubtful and is_mine():
                        return
                    raise
                except StorageError as error:
                    self._pause(tries, error)
                    doubtful = True
                else:
                    timed.bytes = size_bytes
                    return

    @contextmanager
    def errors(self, key: str, *, writing: bool = False, creating: bool = False) -> Iterator[None]:
        """Turn what the backend raises inside the block into errors of ours."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - backends share no base class; it is raised again as ours
            self._answered = self._answered or not is_unreachable(error)
            raise translate(
                error, key=key, url=self._url, writing=writing, creating=creating, secrets=self._secrets
            ) from None
        self._answered = True

    def _pause(self, tries: "_Tries", error: StorageError) -> None:
        """Wait until the next try, or raise `error` if there is none."""
        pause_s = tries.next_pause_s(answered=self._answered) if error.transient else None
        if pause_s is None:
            raise error
        _LOGGER.info("%s; try %d begins in %.1f s", error.fact, tries.timed.requests + 1, pause_s)
        Event().wait(pause_s)
        tries.timed.requests += 1
        tries.timed.retries += 1


class RequestStorage(Storage):
    """What storages have in common that ask a server: a URL without secrets, requests, reads of ranges through `_read`."""

    def __init__(self, url: str, *, policy: RetryPolicy | None = None, secrets: Iterable[str] = ()) -> None:
        self._url = strip_credentials(url).rstrip("/")
        self._requests = Requests(self._url, policy=policy, secrets=secrets)

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    @property
    @override
    def url(self) -> str:
        return self._url

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        return self._requests.meter.statistics()

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if not any(stop > start for start, stop in ranges):
            self.stat(key)
        return ranges_at_once(partial(self._read, "get_ranges", key), ranges)

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        view = memoryview(target).cast("B")
        if view:
            self._read("read_into", key, start, view)
        else:
            self.stat(key)

    @override
    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    @abstractmethod
    def _read(self, operation: Reading, key: str, start: int, view: memoryview) -> None:
        """Fill `view`, which is not empty, with the bytes of `key` from `start` on, as one request."""


class _Tries:
    """The tries of one request."""

    def __init__(self, policy: RetryPolicy, timed: Timed) -> None:
        self.timed = timed
        self._policy = policy
        self._deadline = time.monotonic() + policy.deadline_s
        self._bound_s = policy.first_pause_s

    def next_pause_s(self, *, answered: bool) -> float | None:
        """Return the seconds until the next try, None if there is none."""
        allowed = self._policy.tries if answered else min(self._policy.first_tries, self._policy.tries)
        pause_s = randomness.SystemRandom().uniform(0, self._bound_s)
        if self.timed.requests >= allowed or time.monotonic() + pause_s > self._deadline:
            return None
        self._bound_s = min(self._bound_s * 2, self._policy.longest_pause_s)
        return pause_s
