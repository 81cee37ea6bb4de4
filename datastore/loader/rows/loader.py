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
from concurrent.futures import Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Self

import numpy as np
from typing_extensions import override

from datastore.display import html_fields
from datastore.errors import ConfigError, DatastoreError, ResumeError, StorageError, whole_number
from datastore.loader.mixture.request import Mixture, Weights
from datastore.loader.order.lanes import I64
from datastore.loader.order.order import BatchPlan
from datastore.loader.place.position import Position
from datastore.loader.place.state import LoaderState
from datastore.loader.rows.assemble import Assembler, Located, Made
from datastore.loader.rows.batch import RowBatch, Rows
from datastore.loader.rows.source import ChangedFiles, RowSource
from datastore.loader.rows.stream import open_rows
from datastore.loader.rows.workers import check_sendable, checked_workers, make_here, pool_of
from datastore.loader.settings import LoaderSettings, Rank, checked_options, checked_seed
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

    `dataset` is an open one, of records, or what `open_files` returns, or a `Mixture`; `seed` and `rank` are as for `Loader`.
    `rows` says which rows to go through and what to make of them (`Rows`); by default all, as they are.

    Of `options`, `columns` are those to read (all, if none is named), `memory_bytes` bounds what is kept of shards (in each
    worker), and `deletions="compact"` leaves deleted rows out of the order instead of the batches. Not thread-safe.

    Raises:
        ConfigError: a value is out of range, the dataset holds tokens, there is no such column, or no row is chosen.
        DependencyError: `where` is SQL, and DuckDB is not installed.
    """

    def __init__(
        self,
        dataset: RowSource | Mixture,
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
        self._workers = checked_workers(rows)
        seed = checked_seed(seed)
        self._stream = open_rows(dataset, rows, seed=seed, options=self.options)
        self._assembler = Assembler(
            dataset=self._stream.source,
            grid=self._stream.grid,
            seed=seed,
            columns=self.options.columns,
            options=self.options,
            rows=rows,
        )
        if self._workers:
            check_sendable(self._assembler)
        self._position = Position(
            dataset,
            self._stream.sources,
            self._stream.start,
            rank=rank,
            global_batch=self.global_batch,
            epochs=self.options.epochs,
        )
        self._first_rows = self._stream.first_rows
        self._queue: deque[tuple[BatchPlan, Future[Made] | Located | None]] = deque()
        """Planned batches: those at the front are being made, or can be made at once."""

        self._planned_to = 0
        self._pool: Executor | None = None
        self._pid = os.getpid()
        self._unsettled = False
        self._batches = self._failed = 0
        self._warn_if_memory_is_short()

    def _repr_html_(self) -> str:
        """For a notebook: what its batches are, and where it stands."""
        return html_fields(
            "Loader of rows", self._position.shown() | {"columns": ", ".join(self.options.columns) or None}
        )

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what it was made of and where it stands, as `Loader` does."""
        check_sendable(self._assembler)
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
            self._start_at(self._position.state)
        self._unsettled = True
        self._look_ahead()
        if not self._queue:
            self._unsettled = False
            raise StopIteration
        plan, coming = self._queue[0]
        try:
            if coming is None:
                made = self._assembler.make(plan)
            elif isinstance(coming, Located):
                made = self._assembler.make_of(coming)
            else:
                made = self._awaited(coming, plan)
        except BrokenProcessPool:
            self._end_pool()
            raise DatastoreError(
                "a worker process of the loader has ended", workers=self._workers, hint="Look for a lack of memory."
            ) from None
        batch = RowBatch(
            made.data, made.positions, made.numbers, plan.cursor, self.dataset, made.failed, self._first_rows
        )
        moved = self._position.after(plan)
        self._queue.popleft()
        self._batches, self._failed = self._batches + 1, self._failed + len(made.failed)
        self._unsettled, self._position.state = False, moved
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def cursor(self) -> int:
        """Rows delivered so far, over all ranks and epochs."""
        return self._position.cursor

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch: those that it goes through, or as many as are drawn; of a mixture, those of all its sources."""
        return self._position.samples_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Steps of one finite pass; an endless one does not stop there, its batches straddle epochs."""
        return -(-self.rows_per_epoch // self.global_batch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, as JSON values: under 1 KB, the same on every rank."""
        return self._position.saved()

    @property
    def batches(self) -> int | None:
        """Steps from the start to the end of all passes, or of the mixture; None: it does not end."""
        return None if self._position.end is None else -(-self._position.end // self.global_batch)

    def load_state_dict(self, state: Mapping[str, Any], *, reweigh: bool = False) -> None:
        """Go on from `state`, on any world and any batch size; with `reweigh`, as `Loader.load_state_dict`.

        Raises:
            ResumeError: `state` belongs to another order, or another choice of rows; the message names the keys that differ.
        """
        try:
            found = self._position.read(state, reweigh=reweigh)
        except ResumeError:
            changed = self._changed_files(state)
            if not changed:
                raise
            raise ResumeError(
                f"files have changed since the state was saved: {'; '.join(changed[:_NAMED])}",
                url=self._stream.source.url,
                changed=len(changed),
                hint="Put them back, or start a new run.",
            ) from None
        self._start_at(found)

    def reweigh(self, weights: Weights) -> None:
        """Give the sources of the mixture other `weights`, from the next batch on and until the end; it is part of the state.

        Raises:
            ConfigError: the loader reads one dataset, or a weight is out of range.
        """
        self._start_at(self._position.reweighed(weights))

    def skip(self, batches: int) -> None:
        """Go on `batches` batches later, without reading any."""
        self._start_at(self._position.skipped(batches))

    def seek(self, position: int) -> None:
        """Go to `position` of the order: so many rows, of all ranks and epochs, come before the next batch. Nothing is read.

        Raises:
            ConfigError: it is negative, or lies behind the end.
        """
        self._start_at(self._position.sought(position))

    def numbers_at(self, position: int, rows: int) -> I64:
        """Return the numbers of the rows at `rows` positions from `position` on, of all ranks; nothing is read or moved."""
        if position < 0 or rows < 0:
            raise ConfigError("there are no such positions", position=position, rows=rows, hint="Count from 0.")
        end = self._position.end
        stop = position + rows if end is None else min(position + rows, max(end, position))
        positions = np.arange(position, stop)
        return self._assembler.grid.numbers(self._position.locate(positions).samples, positions)

    def plan(self, batches: int) -> list[I64]:
        """Return the numbers of the rows of this rank's next `batches` batches, deleted ones too; nothing is read or moved."""
        plans = self._position.plan(self.cursor, batches=batches)
        return [self._assembler.grid.numbers(plan.samples[plan.valid], plan.positions[plan.valid]) for plan in plans]

    def stats(self) -> dict[str, int | float]:
        """Return counts since the start: batches, rows that failed, lanes, and those of the batches kept of shards.

        With worker processes, what is kept, and read from the disk of a cache, is kept and counted there, not here.
        """
        store = self._assembler.store
        counts: dict[str, int | float] = {
            "batches": self._batches,
            "failed": self._failed,
            "lanes": self._position.lanes,
        }
        return counts | {
            "window": self._position.state.window,
            "hits": store.hits,
            "fills": store.fills,
            "evictions": store.evictions,
            "resident_bytes": store.resident_bytes,
            **store.disk_stats(),
        }

    def close(self) -> None:
        """End threads and processes. The loader may be used again; it starts anew where it stands."""
        self._end_pool()
        self._start_at(self._position.state)

    def _start_at(self, state: LoaderState) -> None:
        """Plan from `state` on, and forget what was planned."""
        self._unsettled = True
        if self._pid != os.getpid():  # Forked: threads and processes are not here.
            self._pool, self._pid = None, os.getpid()
        for _, coming in self._queue:
            if isinstance(coming, Future):
                coming.cancel()
        self._queue.clear()
        self._position.go_to(state)
        self._planned_to, self._unsettled = state.cursor, False

    def _changed_files(self, state: Mapping[str, Any]) -> list[str]:
        """Return which files are others than when `state` was saved, as far as a source can tell."""
        saved = {name: source["dataset"] for name, source in state.get("sources", {}).items()}
        found: list[str] = []
        for source in self._stream.sources:
            if isinstance(source.dataset, ChangedFiles):
                found += source.dataset.changed_since(str(saved.get(source.name, state.get("dataset"))))
        return found

    def _look_ahead(self) -> None:
        """Plan on, and have the batches made that have come within `prefetch_batches`."""
        hands = self._workers or self.options.threads
        ahead = min(self.options.prefetch_batches, 2 * hands)
        while len(self._queue) <= ahead:
            plans = self._position.plan(self._planned_to, batches=max(1 + ahead, _PLAN_SLOTS // self.global_batch))
            if not plans:
                break
            self._planned_to = self._position.end_of(plans[-1])
            self._queue.extend((plan, None) for plan in plans)
        if not ahead:
            return
        if self._pool is None:
            self._pool = pool_of(self._assembler, workers=self._workers, threads=self.options.threads)
        for index in range(min(ahead + 1, len(self._queue))):
            plan, coming = self._queue[index]
            if coming is None or (isinstance(coming, Future) and not index and _has_failed(coming)):
                self._queue[index] = plan, self._begun(self._pool, plan)

    def _begun(self, pool: Executor, plan: BatchPlan) -> Future[Made] | Located:
        """Have a batch made, unless it takes no waiting: handed from thread to thread, that would cost a third more."""
        if self._workers:
            return pool.submit(make_here, plan)
        located = self._assembler.locate(plan)
        return located if self._assembler.at_hand(located) else pool.submit(self._assembler.make_of, located)

    def _warn_if_memory_is_short(self) -> None:
        """Tell of a budget that has no room for the batches of shards that this rank's windows lie in."""
        source, state = self._stream.source, self._position.state
        segments = source.segments
        size_bytes = int(segments.size_bytes.sum())
        windows = -(-self._position.lanes // self.rank.world)
        row_bytes = size_bytes / max(1, int(segments.documents.sum()))
        needed = min(size_bytes, int(windows * (state.window * row_bytes + source.batch_bytes)))
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
            url=self._stream.source.url,
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


def _has_failed(coming: Future[Made]) -> bool:
    return coming.done() and (coming.cancelled() or coming.exception() is not None)


def _loader_at(
    dataset: RowSource | Mixture,
    global_batch: int,
    rank: Rank,
    rows: Rows,
    options: LoaderSettings,
    state: dict[str, Any],
) -> RowLoader:
    loader = RowLoader(dataset, global_batch=global_batch, seed=state["seed"], rank=rank, rows=rows, options=options)
    loader.load_state_dict(state)
    return loader
