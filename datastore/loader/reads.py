"""What a batch reads: per row the shard and where in it, and the blocks that have to be there; many batches at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.cache.layout import BlockLayout, Track
from datastore.loader.order.samples import I64, Gaps, SampleGrid, Span
from datastore.loader.plan import NO_SAMPLE, BatchPlan

__all__ = ["Blank", "Reads", "blanks_of", "blocks_of", "reads_of"]

Blank = tuple[int, int, int]
"""A row, and which of its tokens `[start, stop)`."""


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
