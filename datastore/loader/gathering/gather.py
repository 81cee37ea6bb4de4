"""Tokens, and what lies beside them, from blocks into the rows of a batch: one copy, straight to where the caller wants them.

The rows of a batch are joined by `bytearray.join`: 0.5 us for 2,049 tokens in memory, where a copy between two memoryviews takes
0.7, a slice of a `np.memmap` 2 and `np.take` of an index matrix 3 (NumPy 2.4, warm; tools/bench/loader).

What a batch reads is planned for many batches at once: per row the shard and where in it, and the blocks that have to be there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datastore.loader.cache.blocks import NOWHERE, BlockLayout, TokenBlocks, Track
from datastore.loader.order.order import NO_SAMPLE, BatchPlan
from datastore.loader.order.samples import I64, Gaps, SampleGrid, Span

__all__ = [
    "AnyArray",
    "BatchColumn",
    "Blank",
    "Gatherer",
    "Marks",
    "Reads",
    "TokenArray",
    "between",
    "blank_deleted",
    "blank_out",
    "blanks_of",
    "blocks_of",
    "fill_lacking",
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

    lacking: npt.NDArray[np.bool_] | None = None
    """[S] shards of a mixture that lack it, and have 1 everywhere; None: all have it."""

    @property
    def token_bytes(self) -> int:
        """Bytes for each token."""
        return int(self.dtype.itemsize) * self.width

    def shape(self, rows: int, tokens: int) -> tuple[int, ...]:
        """Return the shape of its values for `rows` samples of `tokens` tokens."""
        return (rows, tokens) if self.width == 1 else (rows, tokens, self.width)


@dataclass(frozen=True, slots=True)
class Reads:
    """The reads of one batch: `shards` and each of `places` and `sizes` go together."""

    rows: Sequence[int]
    """Rows that are read at once. Their stretches lie end to end: one each, or, of packs, several and zeros."""

    shards: I64
    places: Sequence[I64]
    """On each track, at which byte of its shard's file each stretch starts."""

    pieces: dict[int, list[Span]]
    """The other rows: those that cross a border, those of narrower tokens, and empty ones that only fill up."""

    blocks: I64
    """All blocks needed, in no order, with repeats."""

    sizes: Sequence[I64] | None = None
    """On each track, the bytes of each stretch; None: each is a whole row."""

    marks: "Marks | None" = None
    """Of packs."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Places in the packed rows of a batch, laid end to end."""

    firsts: I64
    """The first token of each document, which is not to be learned: nothing before it tells what it is."""

    empty: I64
    """[E, 2] stretches of zeros, where nothing is."""

    deleted: I64
    """[D, 2] stretches of deleted documents."""


class Gatherer:
    """Copies the reads of a batch out of `blocks`; rows have `width` tokens, and the values of `columns` that go with them."""

    def __init__(self, blocks: TokenBlocks, *, width: int, columns: Sequence[BatchColumn] = ()) -> None:
        self._blocks = blocks
        self._width = width
        self._columns = [(column, column.track) for column in columns if column.track is not None]
        self._tracks = [blocks.layout.tokens, *(track for _, track in self._columns)]

    def gather(self, reads: Reads, out: TokenArray | None, *, columns: Mapping[str, AnyArray]) -> TokenArray:
        """Return the tokens [B, width], in `out` or else in new memory, and fill `columns`; all of them are contiguous.

        Rows that hold no sample become zero.

        Raises:
            DatastoreError: as `TokenBlocks.hold`.
        """
        layout, budget = self._blocks.layout, self._blocks.budget_bytes
        if budget is not None and len(reads.blocks) * layout.largest_bytes > budget:
            found = self._empty(reads) if out is None else out
            self._copy_row_by_row(reads, found, columns)
            return found
        with self._blocks.hold(reads.blocks):
            if out is None and not reads.pieces and not self._blocks.lends:
                found = self._joined(reads, 0, layout.dtype).reshape(-1, self._width)
            else:
                found = self._empty(reads) if out is None else out
                _fill(found, reads, self._joined(reads, 0, layout.dtype))
            for index, (column, _) in enumerate(self._columns, 1):
                _fill(columns[column.name], reads, self._joined(reads, index, column.dtype, width=column.width))
            for row, spans in reads.pieces.items():
                self._copy_pieces(spans, row, found, columns)
        return found

    def _empty(self, reads: Reads) -> TokenArray:
        rows = len(reads.rows) + len(reads.pieces)
        return np.empty((rows, self._width), self._blocks.layout.dtype)

    def _joined(self, reads: Reads, track: int, dtype: np.dtype[Any], *, width: int = 1) -> npt.NDArray[Any]:
        """Return what the rows of `reads` have on a track, end to end."""
        whole = self._width * width * dtype.itemsize
        sizes = np.full(len(reads.shards), whole) if reads.sizes is None else reads.sizes[track]
        return np.frombuffer(self._blocks.read(reads.shards, reads.places[track], sizes), dtype)

    def _copy_row_by_row(self, reads: Reads, out: TokenArray, columns: Mapping[str, AnyArray]) -> None:
        """Hold no more than one row's blocks at a time: slow, but it works in any memory that has room for them."""
        stretches: dict[int, list[Span]] = {row: [] for row in reads.rows}
        itemsize = self._blocks.layout.dtype.itemsize
        sizes = np.full(len(reads.shards), self._width * itemsize) if reads.sizes is None else reads.sizes[0]
        rows = np.array(reads.rows, np.int64)[(np.cumsum(sizes) - 1) // (self._width * itemsize)]
        starts = np.where(
            reads.shards == NOWHERE, 0, (reads.places[0] - self._tracks[0].start[reads.shards]) // itemsize
        )
        stops = starts + sizes // itemsize
        for row, *span in zip(*(each.tolist() for each in (rows, reads.shards, starts, stops)), strict=True):
            stretches[row].append(Span(*span))
        for row, spans in (stretches | reads.pieces).items():
            with self._blocks.hold(blocks_of(spans, self._blocks.layout, tracks=self._tracks)):
                self._copy_pieces(spans, row, out, columns)

    def _copy_pieces(self, spans: list[Span], row: int, out: TokenArray, columns: Mapping[str, AnyArray]) -> None:
        at = 0
        for span in spans:
            stop = at + span.stop - span.start
            if span.shard == NOWHERE:
                out[row, at:stop] = 0
                for column, _ in self._columns:
                    columns[column.name][row, at:stop] = 0
                at = stop
                continue
            itemsize = int(self._tracks[0].token_bytes[span.shard])
            out[row, at:stop] = self._values(span, self._tracks[0], np.dtype(f"u{itemsize}"))
            for column, track in self._columns:
                values = self._values(span, track, column.dtype)
                columns[column.name][row, at:stop] = values.reshape(stop - at, *columns[column.name].shape[2:])
            at = stop
        out[row, at:] = 0
        for column, _ in self._columns:
            columns[column.name][row, at:] = 0

    def _values(self, span: Span, track: Track, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        token_bytes = int(track.token_bytes[span.shard])
        start = int(track.start[span.shard]) + span.start * token_bytes
        size_bytes = (span.stop - span.start) * token_bytes
        place = (np.array([value]) for value in (span.shard, start, size_bytes))
        return np.frombuffer(self._blocks.read(*place), dtype)


def _fill(out: AnyArray, reads: Reads, values: npt.NDArray[Any]) -> None:
    """Copy the rows of `reads`, end to end in `values`, to where they belong."""
    rows = values.reshape(len(reads.rows), *out.shape[1:])
    if reads.pieces:
        out[list(reads.rows)] = rows
    else:
        out[...] = rows


Blank = tuple[int, int, int]
"""A row, and which of its tokens `[start, stop)`."""


def blank_out(blanks: Sequence[Blank], tokens: TokenArray, *, columns: Mapping[str, AnyArray], token: int) -> None:
    """Write `token` over the stretches `blanks` of `tokens`, and zeros over what goes with them."""
    for row, start, stop in blanks:
        tokens[row, start:stop] = token
        for values in columns.values():
            values[row, start:stop] = 0


def fill_lacking(plan: BatchPlan, columns: Sequence[BatchColumn], into: Mapping[str, AnyArray]) -> None:
    """Write 1 over the rows of `plan` whose shard lacks a column."""
    for column in columns:
        if column.lacking is not None:
            into[column.name][column.lacking[plan.shards] & plan.valid] = 1


def blank_deleted(
    plan: BatchPlan,
    tokens: TokenArray,
    *,
    gaps: Gaps,
    columns: Mapping[str, AnyArray],
    token: int,
) -> None:
    """Write `token` over what of `plan` lies in `gaps`, and zeros over its columns."""
    blanks = blanks_of(plan.samples, seq_len=tokens.shape[1] - 1, gaps=gaps)
    blank_out(blanks, tokens, columns=columns, token=token)


def reads_of(
    plans: Sequence[BatchPlan], *, grid: SampleGrid, layout: BlockLayout, tracks: Sequence[Track]
) -> list[Reads]:
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
    places = [(track.start[shards] + starts * track.token_bytes[shards]) for track in tracks]
    plain = ~odd.any(axis=1)
    for first, last in ranges:
        plain &= ~(last - first > 1).any(axis=1)
    rows = range(samples.shape[1])
    reads = []
    for index, plan in enumerate(plans):
        if plain[index]:
            reads.append(Reads(rows, shards[index], [place[index] for place in places], {}, ends[index]))
            continue
        whole = ~odd[index]
        pieces = _pieces(grid, plan, odd[index])
        crossing = [span for spans in pieces.values() for span in spans]
        blocks = [between(first[index][whole], last[index][whole]) for first, last in ranges]
        blocks.append(blocks_of(crossing, layout, tracks=tracks))
        whole_places = [place[index][whole] for place in places]
        stretches = (np.flatnonzero(whole).tolist(), shards[index][whole], whole_places)
        reads.append(Reads(*stretches, pieces, np.concatenate(blocks)))
    return reads


def blocks_of(spans: list[Span], layout: BlockLayout, *, tracks: Sequence[Track]) -> I64:
    """Return the blocks that `spans` lie in, on all of `tracks`; those of `NOWHERE` lie in none."""
    spans = [span for span in spans if span.shard != NOWHERE]
    shards = np.array([span.shard for span in spans], np.int64)
    start = np.array([span.start for span in spans], np.int64)
    stop = np.array([span.stop for span in spans], np.int64)
    return np.concatenate([between(*layout.of_tokens(shards, start, stop, track=track)) for track in tracks])


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


def between(first: I64, last: I64) -> I64:
    """Return all numbers from each `first` to its `last`, in no order, with repeats."""
    wide = np.flatnonzero(last - first > 1)
    inner = [np.arange(low + 1, high) for low, high in zip(first[wide].tolist(), last[wide].tolist(), strict=True)]
    return np.concatenate([first, last, *inner])
