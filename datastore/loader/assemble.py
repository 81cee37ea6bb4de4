"""A planned batch made: its tokens and columns gathered from blocks, and what is not stored filled in.

read     where in which shards its rows lie, planned for many batches at once
gather   one copy, straight to where the caller wants them
finish   a loss mask of sources that have none, documents of packed rows, what is deleted
"""

from collections.abc import Mapping, Sequence

import numpy as np

from datastore.loader.batch import Batch
from datastore.loader.cache.blocks import TokenBlocks
from datastore.loader.gathering.gather import (
    AnyArray,
    BatchColumn,
    Gatherer,
    Reads,
    TokenArray,
    blank_deleted,
    fill_lacking,
    reads_of,
)
from datastore.loader.gathering.packed import finish_packed, reads_of_packs
from datastore.loader.order.order import BatchPlan
from datastore.loader.order.packs import PackGrid
from datastore.loader.settings import LOSS_MASK
from datastore.loader.stream import SampleStream

__all__ = ["Assembler", "empty_columns"]


class Assembler:
    """Makes batches of `stream` out of `blocks`; not thread-safe."""

    def __init__(
        self, stream: SampleStream, blocks: TokenBlocks, *, columns: Mapping[str, BatchColumn], end_of_text: int
    ) -> None:
        self._stream = stream
        self._blocks = blocks
        self._end_of_text = end_of_text
        self._lacking = [column for column in columns.values() if column.lacking is not None]
        stored = [column.track for column in columns.values() if column.track is not None]
        self.tracks = [blocks.layout.tokens, *stored]
        """Where what it gathers lies: the tokens, then each column."""
        self._gatherer = Gatherer(blocks, width=stream.grid.seq_len + 1, columns=tuple(columns.values()))
        mask = columns.get(LOSS_MASK)
        self._computes_mask = mask is not None and mask.track is None

    def reads_of(self, plans: Sequence[BatchPlan]) -> list[Reads]:
        """Return the reads of each of `plans`, which all have the same number of rows."""
        grid, layout = self._stream.grid, self._blocks.layout
        if isinstance(grid, PackGrid):
            return reads_of_packs(plans, grid=grid, layout=layout, tracks=self.tracks, gaps=self._stream.blanks)
        return reads_of(plans, grid=grid, layout=layout, tracks=self.tracks)

    def make(self, plan: BatchPlan, reads: Reads, out: TokenArray | None, into: Mapping[str, AnyArray]) -> Batch:
        """Return the batch of `plan`, its tokens in `out` or else in new memory, its columns in `into`.

        Raises:
            DatastoreError: as `TokenBlocks.hold`.
        """
        tokens = self._gatherer.gather(reads, out, columns=into)
        fill_lacking(plan, self._lacking, into)
        if self._computes_mask:
            into[LOSS_MASK].fill(1)
            into[LOSS_MASK][~plan.valid] = 0
        if reads.marks is not None:
            finish_packed(reads.marks, tokens, columns=into, token=self._end_of_text)
        elif self._stream.blanks is not None:
            blank_deleted(plan, tokens, gaps=self._stream.blanks, columns=into, token=self._end_of_text)
        return Batch(tokens, plan.positions, plan.samples, plan.cursor, self._stream, into)


def empty_columns(columns: Mapping[str, BatchColumn], *, rows: int, tokens: int) -> dict[str, AnyArray]:
    """Return arrays for `columns` of one batch; what is in them is undefined."""
    return {name: np.empty(column.shape(rows, tokens), column.dtype) for name, column in columns.items()}
