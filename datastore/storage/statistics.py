"""Counts of what a storage was asked for: requests, bytes, retries and seconds of each kind of operation.

Counting costs about a microsecond an operation, so it is always on. Bytes that are read through a memory map
(`local_path`) are no requests and are not counted.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import Literal, Self

__all__ = ["Operation", "OperationStatistics", "RequestMeter", "Timed", "add_statistics", "total_statistics"]

Operation = Literal["get", "get_ranges", "read_into", "put", "put_new", "list", "stat", "delete"]

_LOCK = Lock()

# Taken for a fork: a child that inherits it while another thread holds it would wait for ever.
os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


@dataclass(frozen=True, slots=True)
class OperationStatistics:
    """The sums for one kind of operation since the storage was opened."""

    requests: int = 0
    """Calls of the backend, those that failed included. A page of a listing or a part of an upload is one."""

    bytes: int = 0
    """Bytes of values that were read or written; of what failed, none."""

    retries: int = 0
    """How many of the requests repeated one that had failed."""

    seconds: float = 0.0
    """Seconds that callers waited, pauses between tries included; threads that wait at once each count."""

    def __add__(self, other: "OperationStatistics") -> "OperationStatistics":
        return OperationStatistics(
            requests=self.requests + other.requests,
            bytes=self.bytes + other.bytes,
            retries=self.retries + other.retries,
            seconds=self.seconds + other.seconds,
        )

    def __sub__(self, other: "OperationStatistics") -> "OperationStatistics":
        return self + OperationStatistics(-other.requests, -other.bytes, -other.retries, -other.seconds)


def total_statistics(statistics: Mapping[str, OperationStatistics]) -> OperationStatistics:
    """Return the sum over all kinds of operations."""
    return sum(statistics.values(), OperationStatistics())


def add_statistics(many: Iterable[Mapping[str, OperationStatistics]]) -> dict[str, OperationStatistics]:
    """Return the sums for storages that stand behind one, each kind of operation by itself."""
    sums: dict[str, OperationStatistics] = {}
    for statistics in many:
        for name, found in statistics.items():
            sums[name] = sums.get(name, OperationStatistics()) + found
    return sums


class RequestMeter:
    """The sums of one storage. Thread-safe; a forked child goes on from its parent's sums."""

    def __init__(self) -> None:
        self._sums: dict[str, OperationStatistics] = {}

    def time(self, operation: Operation) -> "Timed":
        """Return a block that counts as one request; set its `bytes` inside."""
        return Timed(self, operation)

    def add(self, operation: Operation, counted: OperationStatistics) -> None:
        """Count what was done."""
        with _LOCK:
            self._sums[operation] = self._sums.get(operation, OperationStatistics()) + counted

    def statistics(self) -> dict[str, OperationStatistics]:
        """Return the sums of each kind of operation that was asked for."""
        with _LOCK:
            return dict(self._sums)


class Timed:
    """A block of code that is counted when it ends, well or not."""

    __slots__ = ("_meter", "_operation", "_started", "bytes", "requests", "retries")

    def __init__(self, meter: RequestMeter, operation: Operation) -> None:
        self._meter, self._operation = meter, operation
        self.bytes, self.requests, self.retries = 0, 1, 0

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._started
        self._meter.add(self._operation, OperationStatistics(self.requests, self.bytes, self.retries, seconds))
