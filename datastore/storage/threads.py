"""Requests of one call that are under way at once, on threads that all storages of a process share."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from itertools import chain
from typing import TypeVar

from datastore.storage.ranges import GAP_BYTES, merge_ranges, slices

__all__ = ["all_at_once", "ranges_at_once"]

T = TypeVar("T")

_THREADS = 16

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
        pool = _pools[os.getpid()] = ThreadPoolExecutor(_THREADS, thread_name_prefix="storage")
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


def ranges_at_once(read: Callable[[int, memoryview], None], ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of each of `ranges`, in order; `read` fills a buffer from a position on, neighbours at one go."""
    asked = merge_ranges(ranges, gap_bytes=GAP_BYTES)
    wholes = [memoryview(bytearray(stop - start)) for start, stop in asked]
    tasks = [partial(read, start, whole) for (start, _), whole in zip(asked, wholes, strict=True)]
    all_at_once(tasks, most=_THREADS)
    return slices(ranges, asked, wholes)
