"""Tokens, and what lies beside them, from blocks into the rows of a batch: one copy, straight to where the caller wants them.

A row is copied between two memoryviews: 0.7 us for 2,049 tokens, where a slice of a `np.memmap` takes 2 and
`np.take` of an index matrix 3 (NumPy 2.4, warm; tools/bench/loader).

What a batch reads is planned for many batches at once: per row the shard and where in it, and the blocks that have to be there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datastore.loader.cache.blocks import BlockLayout, TokenBlocks, Track
from datastore.loader.order.order import NO_SAMPLE, BatchPlan
from datastore.loader.order.samples import I64, Gaps, SampleGrid, Span

__all__ = [
    "AnyArray",
    "BatchColumn",
    "Blank",
    "Gatherer",
    "Reads",
    "TokenArray",
    "blank_out",
    "blanks_of",
    "blocks_of",
    "reads_of",
]

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

AnyArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class BatchColumn:
    """What a batch holds beside its tokens: `width` values of `dtype` for each."""

    name: str
    dtype: np.dtype[Any]
    width: int
    track: Track | None
    """Where it lies in the shards; None for what is not stored but follows from something else."""

    @property
    def token_bytes(self) -> int:
        """Bytes for each token."""
        return int(self.dtype.itemsize) * self.width

    def shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """Return the shape of its values for `rows` samples of `tokens` tokens."""
        return (rows, tokens) if self.width == 1 else (rows, tokens, self.width)


@dataclass(frozen=True, slots=True)
class Reads:
    """The reads of one batch: `rows`, `shards` and `starts` go together."""

    rows: Sequence[int]
    """Rows that are one stretch of one shard."""

    shards: list[int]
    starts: list[int]
    """Where each of them starts in its shard."""

    pieces: dict[int, list[Span]]
    """The other rows: those that cross a border, those of narrower tokens, and empty ones that only fill up."""

    blocks: I64
    """All blocks needed, in no order, with repeats."""


class Gatherer:
    """Copies the reads of a batch out of `blocks`; rows have `width` tokens, and the values of `columns` that go with them."""

    def __init__(self, blocks: TokenBlocks, *, width: int, columns: Sequence[BatchColumn] = ()) -> None:
        self._blocks = blocks
        self._width = width
        self._columns = [(column, column.track) for column in columns if column.track is not None]
        self._tracks = [blocks.layout.tokens, *(track for _, track in self._columns)]

    def gather(self, reads: Reads, out: TokenArray, *, columns: Mapping[str, AnyArray]) -> None:
        """Fill the rows of `out` [B, width] and of `columns`, all contiguous; rows that hold no sample become zero.

        Raises:
            DatastoreError: as `TokenBlocks.hold`.
        """
        budget = self._blocks.budget_bytes
        if budget is None or len(reads.blocks) * self._blocks.layout.largest_bytes <= budget:
            with self._blocks.hold(reads.blocks):
                self._copy_rows(reads, out)
                for column, track in self._columns:
                    self._copy_values(reads, columns[column.name], column=column, track=track)
                for row, spans in reads.pieces.items():
                    self._copy_pieces(spans, row, out, columns)
        else:
            self._copy_row_by_row(reads, out, columns)

    def _copy_rows(self, reads: Reads, out: TokenArray) -> None:
        width, tokens_of = self._width, self._blocks.tokens
        target = out.reshape(-1).data
        for row, shard, start in zip(reads.rows, reads.shards, reads.starts, strict=True):
            at = row * width
            target[at : at + width] = tokens_of(shard)[start : start + width]

    def _copy_values(self, reads: Reads, out: AnyArray, *, column: BatchColumn, track: Track) -> None:
        size, data_of = self._width * column.token_bytes, self._blocks.data
        target = out.reshape(-1).view(np.uint8).data
        places = (track.start[reads.shards] + np.array(reads.starts, np.int64) * column.token_bytes).tolist()
        for row, shard, place in zip(reads.rows, reads.shards, places, strict=True):
            at = row * size
            target[at : at + size] = data_of(shard)[place : place + size]

    def _copy_row_by_row(self, reads: Reads, out: TokenArray, columns: Mapping[str, AnyArray]) -> None:
        """Hold no more than one row's blocks at a time: slow, but it works in any memory that has room for them."""
        stretches = {
            row: [Span(shard, start, start + self._width)]
            for row, shard, start in zip(reads.rows, reads.shards, reads.starts, strict=True)
        }
        for row, spans in (stretches | reads.pieces).items():
            with self._blocks.hold(blocks_of(spans, self._blocks.layout, tracks=self._tracks)):
                self._copy_pieces(spans, row, out, columns)

    def _copy_pieces(self, spans: list[Span], row: int, out: TokenArray, columns: Mapping[str, AnyArray]) -> None:
        at = 0
        for span in spans:
            stop = at + span.stop - span.start
            out[row, at:stop] = np.asarray(self._blocks.tokens(span.shard)[span.start : span.stop])
            for column, track in self._columns:
                first = int(track.start[span.shard])
                start, end = (first + place * column.token_bytes for place in (span.start, span.stop))
                values = np.frombuffer(self._blocks.data(span.shard)[start:end], column.dtype)
                columns[column.name][row, at:stop] = values.reshape(stop - at, *columns[column.name].shape[2:])
            at = stop
        out[row, at:] = 0
        for column, _ in self._columns:
            columns[column.name][row, at:] = 0


Blank = tuple[int, int, int]
"""A row, and which of its tokens `[start, stop)`."""


def blank_out(blanks: Sequence[Blank], tokens: TokenArray, *, columns: Mapping[str, AnyArray], token: int) -> None:
    """Write `token` over the stretches `blanks` of `tokens`, and zeros over what goes with them."""
    for row, start, stop in blanks:
        tokens[row, start:stop] = token
        for values in columns.values():
            values[row, start:stop] = 0


def reads_of(plans: list[BatchPlan], *, grid: SampleGrid, layout: BlockLayout, tracks: Sequence[Track]) -> list[Reads]:
    """Return the reads of each of `plans`, which all have the same number of rows, from all of `tracks`."""
    if not plans:
        return []
    samples = np.stack([plan.samples for plan in plans])
    shards = np.stack([plan.shards for plan in plans])
    filled = samples != NO_SAMPLE
    starts = np.where(filled, grid.start_in(shards, samples), 0)
    tokens = grid.stored_start[shards + 1] - grid.stored_start[shards]
    stops = starts + grid.seq_len + 1
    odd = ~filled | (stops > tokens) | layout.is_narrow(shards)
    if grid.gaps is not None:
        odd |= grid.is_broken(samples)
    stops = np.minimum(stops, np.maximum(tokens, 1))
    ranges = [layout.of_tokens(shards, starts, stops, track=track) for track in tracks]
    ends = np.concatenate([end for both in ranges for end in both], axis=1)
    plain = ~odd.any(axis=1)
    for first, last in ranges:
        plain &= ~(last - first > 1).any(axis=1)
    rows = range(samples.shape[1])
    reads = []
    for index, plan in enumerate(plans):
        if plain[index]:
            reads.append(Reads(rows, shards[index].tolist(), starts[index].tolist(), {}, ends[index]))
            continue
        whole = ~odd[index]
        pieces = _pieces(grid, plan, odd[index])
        crossing = [span for spans in pieces.values() for span in spans]
        blocks = [_between(first[index][whole], last[index][whole]) for first, last in ranges]
        blocks.append(blocks_of(crossing, layout, tracks=tracks))
        stretches = (np.flatnonzero(whole).tolist(), shards[index][whole].tolist(), starts[index][whole].tolist())
        reads.append(Reads(*stretches, pieces, np.concatenate(blocks)))
    return reads


def blocks_of(spans: list[Span], layout: BlockLayout, *, tracks: Sequence[Track]) -> I64:
    """Return the blocks that `spans` lie in, on all of `tracks`."""
    shards = np.array([span.shard for span in spans], np.int64)
    start = np.array([span.start for span in spans], np.int64)
    stop = np.array([span.stop for span in spans], np.int64)
    return np.concatenate([_between(*layout.of_tokens(shards, start, stop, track=track)) for track in tracks])


def blanks_of(samples: I64, *, seq_len: int, gaps: Gaps) -> list[Blank]:
    """Return the stretches of each row's sample that lie in `gaps` of the stream; rows without a sample have none."""
    begin = samples * seq_len
    first, last = gaps.touched(begin, begin + seq_len + 1)
    counts = np.where(samples == NO_SAMPLE, 0, last - first)
    rows = np.repeat(np.arange(len(samples)), counts)
    gap = np.arange(len(rows)) + np.repeat(first - np.cumsum(counts) + counts, counts)
    starts = np.maximum(0, gaps.start[gap] - begin[rows])
    stops = np.minimum(seq_len + 1, gaps.stop[gap] - begin[rows])
    return list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))


def _pieces(grid: SampleGrid, plan: BatchPlan, odd: npt.NDArray[np.bool_]) -> dict[int, list[Span]]:
    samples = {row: int(plan.samples[row]) for row in np.flatnonzero(odd).tolist()}
    return {row: list(grid.spans(sample)) if sample != NO_SAMPLE else [] for row, sample in samples.items()}


def _between(first: I64, last: I64) -> I64:
    """Return all numbers from each `first` to its `last`, in no order, with repeats."""
    wide = np.flatnonzero(last - first > 1)
    inner = [np.arange(low + 1, high) for low, high in zip(first[wide].tolist(), last[wide].tolist(), strict=True)]
    return np.concatenate([first, last, *inner])
