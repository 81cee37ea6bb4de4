"""Whoever makes the batches of rows: threads of this process, or processes that are sent numbers."""

import os
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler

from datastore.errors import ConfigError, whole_number
from datastore.loader.order.order import BatchPlan
from datastore.loader.rows.assemble import Assembler, Made
from datastore.loader.rows.batch import Rows

__all__ = ["check_sendable", "checked_workers", "make_here", "pool_of"]


def checked_workers(rows: Rows) -> int:
    """Return how many processes `rows` ask for.

    Raises:
        ConfigError: that is no such number; or there is no such way with errors.
    """
    workers = whole_number(rows.workers, name="workers")
    if workers < 0:
        raise ConfigError("workers is negative", workers=workers, hint="Use 0 for threads of this process.")
    if rows.on_error not in ("raise", "leave_out"):
        raise ConfigError("no such way with errors", on_error=rows.on_error, hint='Use "raise" or "leave_out".')
    return workers


def check_sendable(assembler: Assembler) -> None:
    """Raise unless `assembler` can be sent to another process.

    Raises:
        ConfigError: it cannot.
    """
    try:
        ForkingPickler.dumps(assembler)  # As the pool will: nothing of it is ever stored.
    except Exception as error:  # noqa: BLE001 - a user's object may raise anything
        raise ConfigError(
            f"what the worker processes are to do cannot be sent to them: {error}",
            hint="Define transform and collate at the top of a module, or use workers=0.",
        ) from None


def pool_of(assembler: Assembler, *, workers: int, threads: int) -> Executor:
    """Return threads of this process, or `workers` processes that are sent `assembler` once, and then plans (`make_here`)."""
    if not workers:
        return ThreadPoolExecutor(threads, thread_name_prefix="datastore-rows")
    context = get_context("forkserver" if os.name == "posix" else "spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_enter, initargs=(assembler,))


_here: Assembler | None = None
"""What a worker process makes batches with."""


def _enter(assembler: Assembler) -> None:
    global _here  # noqa: PLW0603 - a worker process has one
    _here = assembler


def make_here(plan: BatchPlan) -> Made:
    """Return the batch of `plan`, in a worker process."""
    assert _here is not None
    return _here.make(plan)
