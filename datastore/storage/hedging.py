"""Calls to places that may hang: each runs in a thread of its own, and the wait for it is bounded.

A disk that is dying, or a file server that is gone, does not fail: it makes the caller wait, for minutes or for ever.
So the second place is asked when the first is slow, and whoever answers first wins. A thread that hangs cannot be
ended; it is a daemon, and holds up nothing. The price is some 60 microseconds per call.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from datastore.errors import DatastoreError, StorageError

__all__ = ["Answers", "Patience", "all_answers", "first_answer"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for one of several places."""

    hedge_s: float = 3.0
    """After this long without an answer to a read the next place is asked, too."""

    read_s: float = 60.0
    write_s: float = 300.0
    """After this long a call has failed."""


@dataclass(slots=True)
class Answers(Generic[T]):
    """What came of calls, by their position."""

    values: dict[int, T] = field(default_factory=dict)
    errors: dict[int, DatastoreError] = field(default_factory=dict)
    slow: set[int] = field(default_factory=set)
    """Those that had not answered when others were asked, or when the time was up."""


def first_answer(calls: Sequence[Callable[[], T]], patience: Patience) -> Answers[T]:
    """Make `calls`, the next one when those before have failed or are slow; return with the first value, if there is one."""
    answers = Answers[T]()
    waiting: dict[Future[T], int] = {}
    started = 0
    deadline = time.monotonic() + patience.read_s
    while not answers.values:
        more = started < len(calls)
        if more and answers.slow.issuperset(waiting.values()):
            waiting[_start(calls[started])] = started
            started += 1
            continue
        left_s = deadline - time.monotonic()
        if not waiting or left_s <= 0:
            break
        done, late = wait(
            waiting, timeout=min(patience.hedge_s, left_s) if more else left_s, return_when=FIRST_COMPLETED
        )
        for future in done:
            _take(future, waiting.pop(future), answers)
        if not done:
            answers.slow.update(waiting[future] for future in late)
    _give_up(waiting, answers, patience.read_s)
    return answers


def all_answers(calls: Sequence[Callable[[], T]], timeout_s: float) -> Answers[T]:
    """Make all `calls` at once; return when each has answered, or after `timeout_s`."""
    answers = Answers[T]()
    waiting = {_start(call): index for index, call in enumerate(calls)}
    done, late = wait(waiting, timeout=timeout_s)
    for future in done:
        _take(future, waiting.pop(future), answers)
    answers.slow.update(waiting[future] for future in late)
    _give_up(waiting, answers, timeout_s)
    return answers


def _take(future: Future[T], index: int, answers: Answers[T]) -> None:
    try:
        answers.values[index] = future.result()
    except DatastoreError as error:
        answers.errors[index] = error


def _give_up(waiting: dict[Future[T], int], answers: Answers[T], waited_s: float) -> None:
    for index in waiting.values():
        answers.errors[index] = StorageError(
            "no answer in time", waited_s=waited_s, transient=True, hint="Check the disk, or the server behind it."
        )


def _start(call: Callable[[], T]) -> Future[T]:
    future: Future[T] = Future()
    threading.Thread(target=_fulfil, args=(future, call), name="datastore-attempt", daemon=True).start()
    return future


def _fulfil(future: Future[T], call: Callable[[], T]) -> None:
    try:
        value = call()
    except DatastoreError as error:
        future.set_exception(error)
    except BaseException as error:
        future.set_exception(error)
        raise
    else:
        future.set_result(value)
