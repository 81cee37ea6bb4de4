"""Work on several threads, in three ways.

    in_parallel    the same work on many files, in order, a few at a time: a pool for this call
    all_at_once    the requests of one read, which are short: a pool that all storages of the process share
    in_thread, each    work that the end of the program waits for, such as a save

The pools of `concurrent.futures` take no more work once the main thread has ended, so a save that a script leaves to
itself by ending would fail half-way, unheard. Plain threads are waited for. The price is a new thread for each call,
some 50 us, and these forty lines.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import chain
from types import TracebackType
from typing import Generic, TypeVar

__all__ = ["THREADS", "all_at_once", "each", "in_parallel", "in_thread"]

T = TypeVar("T")

R = TypeVar("R")


class _Keeping(Generic[R]):
    """A block whose error becomes that of a future: it is raised by whoever asks for the result."""

    def __init__(self, future: "Future[R]") -> None:
        self._future = future

    def __enter__(self) -> "Future[R]":
        return self._future

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self._future.set_exception(error)
        return True


def in_thread(work: Callable[[], R], *, name: str = "checkpoint", daemon: bool = False) -> "Future[R]":
    """Do `work` in a thread; return its result to come. The end of the program does not wait for a `daemon`: it may hang."""
    future: Future[R] = Future()

    def run() -> None:
        with _Keeping(future):
            future.set_result(work())

    threading.Thread(target=run, name=name, daemon=daemon).start()
    return future


def each(work: Callable[[T], R], items: Iterable[T], *, threads: int) -> list[R]:
    """Return `work` of each of `items`, in their order; after the first error start no more, and raise it."""
    todo = list(items)
    if threads == 1 or len(todo) < 2:
        return [work(item) for item in todo]
    results: dict[int, R] = {}
    turn = iter(enumerate(todo))
    lock = threading.Lock()
    stop = threading.Event()

    def next_turn() -> tuple[int, T] | None:
        with lock:
            return None if stop.is_set() else next(turn, None)

    def run() -> None:
        try:
            while (found := next_turn()) is not None:
                index, item = found
                results[index] = work(item)
        except BaseException:
            stop.set()
            raise

    futures = [in_thread(run) for _ in range(min(threads, len(todo)))]
    try:
        for future in futures:
            future.exception()  # All of them end before any error is raised.
    finally:
        stop.set()  # Ctrl-C in this thread ends the others, too.
    for future in futures:
        future.result()
    return [results[index] for index in range(len(todo))]


POOL_THREADS = 16

_pools: dict[int, ThreadPoolExecutor] = {}
"""By process: a forked child inherits no thread."""


def all_at_once(tasks: Iterable[Callable[[], T]], *, most: int) -> Sequence[T]:
    """Return what each task returns, in order; at most `most` are begun and not yet done. A single one runs right here."""
    begun: deque[Future[T]] = deque()
    found: list[T] = []
    waiting = iter(tasks)
    first = next(waiting, None)
    second = next(waiting, None)
    if first is None or second is None:
        return [] if first is None else [first()]
    pool = _pools.get(os.getpid())
    if pool is None:
        pool = _pools[os.getpid()] = ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="storage")
    try:
        for task in chain((first, second), waiting):
            begun.append(pool.submit(task))
            if len(begun) == most:
                found.append(begun.popleft().result())
        found.extend(task.result() for task in begun)
    except BaseException:
        wait([task for task in begun if not task.cancel()])  # They write into buffers that are about to go.
        raise
    return found


THREADS = 8


def in_parallel(work: Callable[[T], R], items: Iterable[T], *, threads: int = THREADS) -> Iterator[R]:
    """Yield `work` of each of `items`, in their order, done on `threads` threads.

    Never more than twice as many items are taken as there are threads before the oldest result is handed out, so
    memory does not grow with their number. The first error ends it; work that has begun is waited for.
    """
    with ThreadPoolExecutor(max_workers=threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
