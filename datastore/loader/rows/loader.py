"""The loader of rows: an iterator of batches over a dataset of records, in the order that the loader of tokens has.

    choose    all rows, those that a condition is true for, or a list
    plan      which rows the next batches hold: from the cursor alone, on every rank by itself
    make      each planned batch, by threads or worker processes, some ahead (`assemble.py`)
    deliver   in order; the cursor counts what was delivered

Why not one loader for both: tokens are cut into samples of a fixed length and copied at 0.7 us each, rows are read as they
are, filtered and handed to a user's code. What they share is what matters for exactness: order, planner, state.
"""

import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from typing import Any, Self

import msgspec
import numpy as np
from typing_extensions import override

from datastore.errors import ConfigError, DatastoreError, ResumeError, StorageError, whole_number
from datastore.loader.order.lanes import I64
from datastore.loader.order.order import BatchPlan, OrderKey, Planner, SampleOrder
from datastore.loader.rows.assemble import Assembler, Made
from datastore.loader.rows.batch import RowBatch, Rows
from datastore.loader.rows.source import ChangedFiles, RowSource
from datastore.loader.rows.stream import checked_columns, chosen_rows, first_state
from datastore.loader.settings import LoaderSettings, Rank, checked_options
from datastore.loader.state import LoaderState, as_values, read_state
from datastore.units import format_bytes

__all__ = ["RowLoader"]

_PLAN_SLOTS = 16_384
"""Slots of global batches planned at a time."""

_NAMED = 5
"""Changed files that an error names."""

_SHOWN = 8
"""Rows of a batch that an error names."""


class RowLoader(Iterator[RowBatch]):
    """One rank's batches of a dataset of records: `global_batch` rows over all ranks, shuffled as `Loader` shuffles samples.

    `rows` says which rows to go through and what to make of them (`Rows`); by default all, as they are.

    Of `options`, `columns` are those to read (all, if none is named), `memory_bytes` bounds what is kept of shards (in each
    worker), and `deletions="compact"` leaves deleted rows out of the order instead of the batches. Not thread-safe.

    Raises:
        ConfigError: a value is out of range, the dataset holds tokens, there is no such column, or no row is chosen.
        DependencyError: `where` is SQL, and DuckDB is not installed.
    """

    def __init__(
        self,
        dataset: RowSource,
        *,
        global_batch: int,
        seed: int = 0,
        rank: Rank = Rank(),  # noqa: B008 - a frozen value
        rows: Rows = Rows(),  # noqa: B008 - a frozen value
        options: LoaderSettings = LoaderSettings(),  # noqa: B008 - a frozen value
    ) -> None:
        self.dataset = dataset
        self.rank = rank
        self.global_batch = whole_number(global_batch, name="global_batch")
        self.options = checked_options(options)
        self._workers = _checked_workers(rows)
        seed = whole_number(seed, name="seed")
        grid = chosen_rows(dataset, rows, seed=seed, options=self.options)
        self._assembler = Assembler(
            dataset=dataset,
            grid=grid,
            seed=seed,
            columns=checked_columns(dataset, self.options.columns),
            options=self.options,
            rows=rows,
        )
        if self._workers:
            _check_sendable(self._assembler)
        self._start = first_state(dataset, grid, seed=seed, options=self.options)
        self._state: LoaderState = self._start
        self._planner = self._planner_of(self._state)
        self._queue: deque[tuple[BatchPlan, Future[Made] | None]] = deque()
        """Planned batches, those at the front being made."""

        self._planned_to = 0
        self._pool: Executor | None = None
        self._pid = os.getpid()
        self._unsettled = False
        self._batches = self._failed = 0
        self._warn_if_memory_is_short()

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what it was made of and where it stands, as `Loader` does."""
        _check_sendable(self._assembler)
        made_of = self.dataset, self.global_batch, self.rank, self._assembler.rows, self.options
        return _loader_at, (*made_of, self.state_dict())

    @override
    def __next__(self) -> RowBatch:
        """Return the next batch.

        Raises:
            StopIteration: a finite pass is over.
            RejectedError: the transform failed on a row; the message names it. The cursor stays.
            CorruptError, MissingError, StorageError: what it needs cannot be read. The cursor stays.
        """
        if self._unsettled or self._pid != os.getpid():
            self._start_at(self._state)
        self._unsettled = True
        self._look_ahead()
        if not self._queue:
            self._unsettled = False
            raise StopIteration
        plan, coming = self._queue[0]
        try:
            made = self._assembler.make(plan) if coming is None else self._awaited(coming, plan)
        except BrokenProcessPool:
            self._end_pool()
            raise DatastoreError(
                "a worker process of the loader has ended", workers=self._workers, hint="Look for a lack of memory."
            ) from None
        batch = RowBatch(made.data, made.positions, made.numbers, plan.cursor, self.dataset, made.failed)
        moved = msgspec.structs.replace(self._state, cursor=self._within(plan.cursor + self.global_batch))
        self._queue.popleft()
        self._batches, self._failed = self._batches + 1, self._failed + len(made.failed)
        self._unsettled, self._state = False, moved
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def cursor(self) -> int:
        """Rows delivered so far, over all ranks and epochs."""
        cursor: int = self._state.cursor
        return cursor

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch: those that it goes through, or as many as are drawn."""
        return self._assembler.grid.rows_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Steps of one finite pass; an endless one does not stop there, its batches straddle epochs."""
        return -(-self.rows_per_epoch // self.global_batch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, as JSON values: under 1 KB, the same on every rank."""
        return as_values(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, on any world and any batch size.

        Raises:
            ResumeError: `state` belongs to another order, or another choice of rows; the message names the keys that differ.
        """
        try:
            found = read_state(state, here=self._start)
        except ResumeError:
            changed = (
                self.dataset.changed_since(str(state.get("dataset"))) if isinstance(self.dataset, ChangedFiles) else []
            )
            if not changed:
                raise
            raise ResumeError(
                f"files have changed since the state was saved: {'; '.join(changed[:_NAMED])}",
                url=self.dataset.url,
                changed=len(changed),
                hint="Put them back, or start a new run.",
            ) from None
        self._start_at(found)

    def skip(self, batches: int) -> None:
        """Go on `batches` batches later, without reading any."""
        if batches < 0:
            raise ConfigError("cannot skip backwards", batches=batches, hint="Load a saved state instead.")
        cursor = self._within(self.cursor + batches * self.global_batch)
        self._start_at(msgspec.structs.replace(self._state, cursor=cursor))

    def seek(self, position: int) -> None:
        """Go to a position of the order: so many rows, of all ranks and epochs, come before the next batch. Nothing is read.

        Raises:
            ConfigError: it is negative, or lies behind the end.
        """
        position = whole_number(position, name="position")
        if position < 0 or (self._total is not None and position > self._total):
            raise ConfigError(
                "there is no such position", position=position, end=self._total, hint="Stay in the order."
            )
        self._start_at(msgspec.structs.replace(self._state, cursor=position))

    def numbers_at(self, position: int, rows: int) -> I64:
        """Return the numbers of the rows at `rows` positions from `position` on, of all ranks; nothing is read or moved."""
        if position < 0 or rows < 0:
            raise ConfigError("there are no such positions", position=position, rows=rows, hint="Count from 0.")
        stop = position + rows if self._total is None else min(position + rows, max(self._total, position))
        positions = np.arange(position, stop)
        return self._assembler.grid.numbers(self._order_of(self._state).locate(positions).samples, positions)

    def plan(self, batches: int) -> list[I64]:
        """Return the numbers of the rows of this rank's next `batches` batches, deleted ones too; nothing is read or moved."""
        plans = self._planner.plan(self.cursor, batches=batches)
        return [self._assembler.grid.numbers(plan.samples[plan.valid], plan.positions[plan.valid]) for plan in plans]

    def stats(self) -> dict[str, int | float]:
        """Return counts since the start: batches, rows that failed, lanes, and those of the batches kept of shards.

        With worker processes, what is kept, and read from the disk of a cache, is kept and counted there, not here.
        """
        store = self._assembler.store
        counts: dict[str, int | float] = {"batches": self._batches, "failed": self._failed, "lanes": self._state.lanes}
        return counts | {
            "window": self._state.window,
            "hits": store.hits,
            "fills": store.fills,
            "evictions": store.evictions,
            "resident_bytes": store.resident_bytes,
            **store.disk_stats(),
        }

    def close(self) -> None:
        """End threads and processes. The loader may be used again; it starts anew where it stands."""
        self._end_pool()
        self._start_at(self._state)

    @property
    def _total(self) -> int | None:
        return None if self.options.epochs is None else self.options.epochs * self.rows_per_epoch

    def _within(self, cursor: int) -> int:
        return cursor if self._total is None else min(cursor, max(self._total, self.cursor))

    def _start_at(self, state: LoaderState) -> None:
        """Plan from `state` on, and forget what was planned."""
        self._unsettled = True
        if self._pid != os.getpid():  # Forked: threads and processes are not here.
            self._pool, self._pid = None, os.getpid()
        if (state.lanes, state.window) != (self._state.lanes, self._state.window):
            self._planner = self._planner_of(state)
        for _, coming in self._queue:
            if coming is not None:
                coming.cancel()
        self._queue.clear()
        self._state, self._planned_to, self._unsettled = state, state.cursor, False

    def _planner_of(self, state: LoaderState) -> Planner:
        return Planner(self._order_of(state), rank=self.rank, global_batch=self.global_batch, total=self._total)

    def _order_of(self, state: LoaderState) -> SampleOrder:
        key = OrderKey(state.seed, state.lanes, state.window, state.shuffle)
        return self._assembler.grid.order(self.dataset.segments.uid64, key)

    def _look_ahead(self) -> None:
        """Plan on, and have the batches made that have come within `prefetch_batches`."""
        hands = self._workers or self.options.threads
        ahead = min(self.options.prefetch_batches, 2 * hands)
        while len(self._queue) <= ahead:
            plans = self._planner.plan(self._planned_to, batches=max(1 + ahead, _PLAN_SLOTS // self.global_batch))
            if not plans:
                break
            self._planned_to = self._within(plans[-1].cursor + self.global_batch)
            self._queue.extend((plan, None) for plan in plans)
        if not ahead:
            return
        if self._pool is None:
            self._pool = _pool(self._assembler, workers=self._workers, threads=self.options.threads)
        for index in range(min(ahead + 1, len(self._queue))):
            plan, coming = self._queue[index]
            if coming is None or (
                coming.done() and (coming.cancelled() or coming.exception() is not None) and not index
            ):
                again = (
                    self._pool.submit(_make, plan) if self._workers else self._pool.submit(self._assembler.make, plan)
                )
                self._queue[index] = plan, again

    def _warn_if_memory_is_short(self) -> None:
        """Tell of a budget that has no room for the batches of shards that this rank's windows lie in."""
        segments, state = self.dataset.segments, self._state
        size_bytes = int(segments.size_bytes.sum())
        windows = -(-state.lanes // self.rank.world)
        row_bytes = size_bytes / max(1, int(segments.documents.sum()))
        needed = min(size_bytes, int(windows * (state.window * row_bytes + self.dataset.batch_bytes)))
        if needed > self.options.memory_bytes:
            warnings.warn(
                f"memory_bytes ({format_bytes(self.options.memory_bytes)}) cannot hold what the windows of this rank lie in "
                f"({format_bytes(needed)}): it will be read again and again. "
                "Raise memory_bytes, use more ranks, or start with fewer lanes or a smaller window.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _awaited(self, coming: Future[Made], plan: BatchPlan) -> Made:
        """Return a batch that is being made; give up those who make it if that takes too long."""
        wait((coming,), timeout=self.options.timeout_s)
        if coming.done():
            return coming.result()
        self._end_pool()
        raise StorageError(
            "a batch of rows was not made in time",
            transient=True,
            url=self.dataset.url,
            rank=f"{self.rank.rank} of {self.rank.world}",
            cursor=plan.cursor,
            rows=plan.samples.tolist()[:_SHOWN],
            waited_s=self.options.timeout_s,
            made_by=f"{self._workers} worker processes" if self._workers else f"{self.options.threads} threads",
            hint="Look at the network, the server and `transform`; or wait longer: `timeout_s`.",
        )

    def _end_pool(self) -> None:
        if self._pool is not None and self._pid == os.getpid():
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None


def _loader_at(
    dataset: RowSource, global_batch: int, rank: Rank, rows: Rows, options: LoaderSettings, state: dict[str, Any]
) -> RowLoader:
    loader = RowLoader(dataset, global_batch=global_batch, seed=state["seed"], rank=rank, rows=rows, options=options)
    loader.load_state_dict(state)
    return loader


def _checked_workers(rows: Rows) -> int:
    workers = whole_number(rows.workers, name="workers")
    if workers < 0:
        raise ConfigError("workers is negative", workers=workers, hint="Use 0 for threads of this process.")
    if rows.on_error not in ("raise", "leave_out"):
        raise ConfigError("no such way with errors", on_error=rows.on_error, hint='Use "raise" or "leave_out".')
    return workers


def _check_sendable(assembler: Assembler) -> None:
    try:
        ForkingPickler.dumps(assembler)  # As the pool will: nothing of it is ever stored.
    except Exception as error:  # noqa: BLE001 - a user's object may raise anything
        raise ConfigError(
            f"what the worker processes are to do cannot be sent to them: {error}",
            hint="Define transform and collate at the top of a module, or use workers=0.",
        ) from None


def _pool(assembler: Assembler, *, workers: int, threads: int) -> Executor:
    if not workers:
        return ThreadPoolExecutor(threads, thread_name_prefix="datastore-rows")
    context = get_context("forkserver" if os.name == "posix" else "spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_enter, initargs=(assembler,))


_here: Assembler | None = None
"""What a worker process makes batches with."""


def _enter(assembler: Assembler) -> None:
    global _here  # noqa: PLW0603 - a worker process has one
    _here = assembler


def _make(plan: BatchPlan) -> Made:
    assert _here is not None
    return _here.make(plan)
