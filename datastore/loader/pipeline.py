"""The way ahead of a loader: batches planned, their blocks fetched in the order of need, the first one made when it is asked for.

    plan      some thousand rows at a time, as NumPy's cost per call is spread over them
    request   the blocks of the next `prefetch_batches` batches; and, where lanes are known, what they read on
    make      the batch at the front

All of it can be given up and begun anew from a cursor at any time: after an exception, in a forked process, at another position.
"""

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from itertools import takewhile

import numpy as np

from datastore.loader.assemble import Assembler
from datastore.loader.batch import Batch
from datastore.loader.cache.blocks import TokenBlocks
from datastore.loader.cache.opening import warn_if_memory_is_short
from datastore.loader.cache.prefetch import Prefetcher
from datastore.loader.gathering.gather import AnyArray, BatchColumn, Reads, TokenArray
from datastore.loader.order.ahead import LaneReader
from datastore.loader.order.order import BatchPlan
from datastore.loader.place.position import Position
from datastore.loader.settings import Rank
from datastore.loader.stream import SampleStream, end_of_text_of

__all__ = ["Pipeline"]

_PLAN_ROWS = 65_536
"""Rows of this rank planned at a time."""

_MAX_PLANNED = 2_048
"""Batches planned ahead at most."""

_LOCAL_THREADS = 4
"""Threads that fetch ahead from files of this machine at most: more would wait for each other, and each has a buffer to fill."""


class Pipeline:
    """The batches of one rank from a position on. Not thread-safe; in a forked child it opens everything anew."""

    def __init__(
        self,
        stream: SampleStream,
        position: Position,
        *,
        columns: Mapping[str, BatchColumn],
        rank: Rank,
        global_batch: int,
    ) -> None:
        self._stream = stream
        self._position = position
        self._columns = columns
        self._end_of_text = end_of_text_of(stream, stream.options)
        self._rank = rank
        self._global_batch = global_batch
        self._is_local = stream.is_local
        self._pid = os.getpid()
        self._blocks: TokenBlocks | None = None
        self._prefetcher: Prefetcher | None = None
        self._assembler: Assembler | None = None
        self._planned: deque[tuple[BatchPlan, Reads]] = deque()
        self._next_cursor = position.cursor
        self._requested = self._planned_at_once = 0
        self._reader: LaneReader | None = None
        self._knows_lanes = False
        self._stretches = 1
        """Places that this rank reads from at once."""
        self._begun = 0
        """Batches delivered from here on: before the first one, nothing else is fetched."""

    def start(self) -> None:
        """Begin anew from where the position stands, and forget what was planned."""
        self._knows_lanes = False
        self._planned.clear()
        self._next_cursor = self._position.cursor
        self._requested = self._planned_at_once = self._begun = 0
        if self._prefetcher is not None:
            self._prefetcher.forget()
        if self._blocks is not None:
            self._blocks.forget()

    def make(self, out: TokenArray | None, into: Mapping[str, AnyArray]) -> tuple[BatchPlan, Batch] | None:
        """Return the next batch and its plan, and fetch ahead; None: there is none. Say `passed` once it is delivered.

        Raises:
            DatastoreError: as `TokenBlocks.hold`.
        """
        blocks = self._ready()
        self._look_ahead(blocks)
        self._request(blocks)
        if not self._planned:
            return None
        plan, reads = self._planned[0]
        assert self._assembler is not None
        if self._reader is not None:
            self._reader.outlook.cursor = plan.cursor
        return plan, self._assembler.make(plan, reads, out, into)

    def passed(self) -> None:
        """Go on behind the batch that was made."""
        assert self._blocks is not None
        self._blocks.passed()
        self._planned.popleft()
        self._requested = max(0, self._requested - 1)
        self._begun += 1

    def abandon(self) -> None:
        """Leave the blocks and what fetches them as they are: an interrupt may have ended them in the middle of anything."""
        self._blocks = self._prefetcher = None

    def close(self) -> None:
        """End the threads and give back the memory."""
        if self._prefetcher is not None and self._pid == os.getpid():
            self._prefetcher.close()
        if self._blocks is not None and self._pid == os.getpid():
            self._blocks.close()
        self.abandon()

    def stats(self) -> dict[str, int | float]:
        """Return the counts of the blocks (`BlockStats`), the part of them that was there already, and the batches that are."""
        if self._blocks is None:
            return {}
        found, absent = self._blocks.stats(), self._blocks.absent
        ahead = sum(1 for _ in takewhile(lambda planned: not absent(planned[1].blocks).size, self._planned))
        return asdict(found) | {"hit_rate": found.hit_rate, "ahead": ahead}

    def _ready(self) -> TokenBlocks:
        """Return the blocks, opened by this process."""
        if self._pid != os.getpid():
            # Forked: threads are gone, and locks may have been copied locked. Leave all of it and start anew.
            self._pid = os.getpid()
            self.abandon()
        if self._blocks is not None and self._blocks.abandoned and self._prefetcher is not None:
            self._prefetcher.abandon()
            self._blocks.close()
            self._blocks = None
        if self._blocks is None:
            self._blocks = self._open()
        if not self._knows_lanes:
            self._reader, self._knows_lanes = self._read_lanes(self._blocks), True
        return self._blocks

    def _open(self) -> TokenBlocks:
        blocks, options = self._stream.open_blocks(), self._stream.options
        threads = min(options.threads, _LOCAL_THREADS) if self._is_local else options.threads
        prefetcher = Prefetcher(blocks, threads=threads)
        self._assembler = Assembler(self._stream, blocks, columns=self._columns, end_of_text=self._end_of_text)
        self._requested, self._prefetcher, self._knows_lanes = 0, prefetcher, False
        lanes = -(-self._position.lanes // self._rank.world)
        self._stretches = lanes * len(self._assembler.tracks)
        if not self._is_local:
            warn_if_memory_is_short(blocks.layout, options, stretches=self._stretches, lanes=lanes)
        return blocks

    def _read_lanes(self, blocks: TokenBlocks) -> LaneReader | None:
        """Return how the lanes read on; None where there is nothing to fetch."""
        orders = None if self._is_local else self._position.orders()
        if orders is None:
            return None
        assert self._assembler is not None
        reader = LaneReader(
            orders,
            self._stream.grid,
            blocks.layout,
            tracks=self._assembler.tracks,
            budget_bytes=blocks.budget_bytes,
            stretches=self._stretches,
        )
        blocks.foresee(reader.outlook)
        return reader

    def _look_ahead(self, blocks: TokenBlocks) -> None:
        """Plan on, as far as `prefetch_batches` need it."""
        start, stop = self._rank.share(self._global_batch)
        options = self._stream.options
        ahead = options.prefetch_batches if options.threads else 0
        while len(self._planned) <= ahead:
            # Twice as many each time, so that the first batch does not wait for plans of a thousand.
            most = min(_MAX_PLANNED, max(1 + ahead, _PLAN_ROWS // (stop - start)))
            self._planned_at_once = min(most, max(1 + ahead, 2 * self._planned_at_once))
            plans = self._position.plan(self._next_cursor, batches=self._planned_at_once)
            if not plans:
                break
            self._next_cursor = self._position.end_of(plans[-1])
            assert self._assembler is not None
            reads = self._assembler.reads_of(plans)
            self._planned.extend(zip(plans, reads, strict=True))
            blocks.expect([batch.blocks for batch in reads])

    def _request(self, blocks: TokenBlocks) -> None:
        """Have the blocks of the next batch fetched, and of those ahead of it, as far as they are not requested yet."""
        assert self._prefetcher is not None
        options = self._stream.options
        ahead = options.prefetch_batches if self._begun else 0
        for index in range(self._requested, min(1 + ahead, len(self._planned)) if options.threads else 0):
            plan, reads = self._planned[index]
            absent = blocks.absent(reads.blocks)
            if absent.size:
                self._prefetcher.request(absent[::-1].tolist())  # From the other side: the holder begins at the first.
            # Until each lane has been visited, nothing comes before the blocks that are needed first.
            if ahead and self._reader is not None and self._begun * self._global_batch >= self._position.lanes:
                coming = self._reader.coming(plan)
                blocks.announce(coming)
                self._prefetcher.request(blocks.absent(np.array(coming, np.int64)).tolist(), later=True)
            self._requested = index + 1
