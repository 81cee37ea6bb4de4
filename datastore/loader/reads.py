"""What a batch reads: per row the shard and where in it, and the blocks that have to be there; many batches at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.cache.layout import BlockLayout
from datastore.loader.geometry import I64, SampleGrid, Span
from datastore.loader.plan import NO_SAMPLE, BatchPlan

__all__ = ["Reads", "blocks_of", "reads_of"]


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


def reads_of(plans: list[BatchPlan], *, grid: SampleGrid, layout: BlockLayout) -> list[Reads]:
    """Return the reads of each of `plans`, which all have the same number of rows."""
    if not plans:
        return []
    samples = np.stack([plan.samples for plan in plans])
    shards = np.stack([plan.shards for plan in plans])
    filled = samples != NO_SAMPLE
    starts = np.where(filled, grid.start_in(shards, samples), 0)
    tokens = grid.token_start[shards + 1] - grid.token_start[shards]
    stops = starts + grid.seq_len + 1
    odd = ~filled | (stops > tokens) | layout.is_narrow(shards)
    first, last = layout.of_tokens(shards, starts, np.minimum(stops, np.maximum(tokens, 1)))
    ends = np.concatenate([first, last], axis=1)
    plain = ~(odd | (last - first > 1)).any(axis=1)
    rows = range(samples.shape[1])
    reads = []
    for index, plan in enumerate(plans):
        if plain[index]:
            reads.append(Reads(rows, shards[index].tolist(), starts[index].tolist(), {}, ends[index]))
            continue
        whole, used = ~odd[index], filled[index]
        pieces = _pieces(grid, plan, odd[index])
        blocks = _all_blocks(layout, pieces, first[index][used], last[index][used])
        stretches = (np.flatnonzero(whole).tolist(), shards[index][whole].tolist(), starts[index][whole].tolist())
        reads.append(Reads(*stretches, pieces, blocks))
    return reads


def blocks_of(spans: list[Span], layout: BlockLayout) -> I64:
    """Return the blocks that `spans` lie in."""
    shards = np.array([span.shard for span in spans], np.int64)
    start = np.array([span.start for span in spans], np.int64)
    stop = np.array([span.stop for span in spans], np.int64)
    return _between(*layout.of_tokens(shards, start, stop))


def _pieces(grid: SampleGrid, plan: BatchPlan, odd: npt.NDArray[np.bool_]) -> dict[int, list[Span]]:
    samples = {row: int(plan.samples[row]) for row in np.flatnonzero(odd).tolist()}
    return {row: list(grid.spans(sample)) if sample != NO_SAMPLE else [] for row, sample in samples.items()}


def _all_blocks(layout: BlockLayout, pieces: dict[int, list[Span]], first: I64, last: I64) -> I64:
    crossing = [span for spans in pieces.values() for span in spans]
    return np.concatenate([_between(first, last), blocks_of(crossing, layout)])


def _between(first: I64, last: I64) -> I64:
    """Return all numbers from each `first` to its `last`."""
    ranges = [np.arange(low, high + 1) for low, high in zip(first.tolist(), last.tolist(), strict=True)]
    return np.concatenate(ranges) if ranges else np.empty(0, np.int64)
