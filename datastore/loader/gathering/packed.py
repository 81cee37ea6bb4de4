"""The reads of packed rows, and where in them nothing is to be learned.

A row is its pieces end to end, then zeros. They are read in one go like rows that are one stretch, each piece from where it lies.
All of it is planned for many batches at once; what is left to do for each is two writes into its loss mask.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from datastore.errors import ConfigError
from datastore.loader.cache.blocks import NOWHERE, BlockLayout, Track
from datastore.loader.gathering.gather import AnyArray, Marks, Reads, TokenArray, between, blocks_of
from datastore.loader.order.order import NO_SAMPLE, BatchPlan
from datastore.loader.order.packs import PackGrid, deleted_pieces
from datastore.loader.order.samples import I64, Gaps, Span
from datastore.loader.settings import LOSS_MASK

__all__ = ["document_starts", "finish_packed", "has_deleted_piece", "reads_of_packs", "sequences_of"]


class _Stretches(NamedTuple):
    """What rows are made of, in order."""

    row: I64
    piece: I64
    """-1: zeros."""

    length: I64
    at: I64
    """Place of its first token, rows laid end to end."""


def reads_of_packs(
    plans: Sequence[BatchPlan], *, grid: PackGrid, layout: BlockLayout, tracks: Sequence[Track], gaps: Gaps | None
) -> list[Reads]:
    """Return the reads of each of `plans`, which all have the same number of rows, from all of `tracks`."""
    if not plans:
        return []
    samples, shards = (np.concatenate([getattr(plan, name) for plan in plans]) for name in ("samples", "shards"))
    rows = len(plans[0].samples)
    everything = _stretches(grid, samples)
    odd = (samples == NO_SAMPLE) | layout.is_narrow(shards)
    read = _Stretches(*(part[~odd[everything.row]] for part in everything)) if odd.any() else everything
    is_piece = read.piece >= 0
    shard = np.where(is_piece, shards[read.row], NOWHERE)
    start = np.where(is_piece, grid.piece_start[read.piece], 0)
    inside = shard[is_piece], start[is_piece], (start + read.length)[is_piece]
    ranges = [layout.of_tokens(*inside, track=track) for track in tracks]
    places = [np.where(is_piece, track.start[shard] + start * track.token_bytes[shard], 0) for track in tracks]
    # Rows of narrower tokens are read otherwise, so here the tokens of a track have the bytes of the widest.
    sizes = [read.length * int(track.token_bytes.max(initial=0)) for track in tracks]
    bounds = np.searchsorted(read.row, np.arange(0, len(samples) + 1, rows)).tolist()
    blocks = _blocks_by_batch(
        ranges, np.searchsorted(read.row[is_piece], np.arange(0, len(samples) + 1, rows)).tolist()
    )
    marks = _marks(grid, everything, shards, batches=len(plans), rows=rows, gaps=gaps)
    is_odd = odd.reshape(len(plans), rows).any(axis=1).tolist()
    found = []
    for index in range(len(plans)):
        part = slice(bounds[index], bounds[index + 1])
        pieces: dict[int, list[Span]] = {}
        if is_odd[index]:
            others = np.flatnonzero(odd[index * rows : (index + 1) * rows]).tolist()
            pieces = {at: _spans(grid, int(samples[index * rows + at])) for at in others}
            crossing = [span for spans in pieces.values() for span in spans]
            blocks[index] = np.concatenate([blocks[index], blocks_of(crossing, layout, tracks=tracks)])
        found.append(
            Reads(
                [row for row in range(rows) if row not in pieces] if pieces else range(rows),
                shard[part],
                [each[part] for each in places],
                pieces,
                blocks[index],
                [each[part] for each in sizes],
                marks[index],
            )
        )
    return found


def _blocks_by_batch(ranges: Sequence[tuple[I64, I64]], bounds: Sequence[int]) -> list[I64]:
    """Return all blocks of the ranges [low, high] of each batch."""
    parts = [slice(*pair) for pair in pairwise(bounds)]
    if any((high - low > 1).any() for low, high in ranges):
        return [np.concatenate([between(low[part], high[part]) for low, high in ranges]) for part in parts]
    ends = np.stack([end for pair in ranges for end in pair])
    return [ends[:, part].reshape(-1) for part in parts]


def finish_packed(marks: Marks, tokens: TokenArray, *, columns: Mapping[str, AnyArray], token: int) -> None:
    """Set the loss mask of packed rows to 0 where `marks` say so, and write `token` over documents that are deleted."""
    mask = columns[LOSS_MASK].reshape(-1)
    mask[marks.firsts] = 0
    for start, stop in marks.empty.tolist():
        mask[start:stop] = 0
    flat = tokens.reshape(-1)
    for start, stop in marks.deleted.tolist():
        flat[start:stop] = token
        for values in columns.values():
            values.reshape(len(flat), -1)[start:stop] = 0


def has_deleted_piece(grid: PackGrid, samples: I64, *, gaps: Gaps) -> bool:
    """Return whether a document of the packed rows `samples` lies in `gaps`."""
    found = _stretches(grid, samples)
    pieces = np.flatnonzero(found.piece >= 0)
    shards = np.searchsorted(grid.run_start, samples, side="right") - 1
    return bool(deleted_pieces(grid, found.piece[pieces], shards[found.row[pieces]], gaps=gaps).any())


def sequences_of(grid: PackGrid, sample: int) -> tuple[int, int]:
    """Return how many sequences a row of them has, and how many tokens each takes up.

    Raises:
        ConfigError: the rows are packed otherwise.
    """
    if grid.widths is None:
        raise ConfigError(
            "only rows of sequences of similar length have a shape", hint='Read with LoaderSettings(packing="buckets").'
        )
    return int(grid.first_piece[sample + 1] - grid.first_piece[sample]), int(grid.widths[sample])


def document_starts(grid: PackGrid, samples: I64) -> I64:
    """Return [D, 2] the row and the place in it where each document of the packed rows `samples` starts; zeros count as one."""
    found = _stretches(grid, samples)
    return np.stack([found.row, found.at % (grid.seq_len + 1)], axis=1)


def _stretches(grid: PackGrid, samples: I64) -> _Stretches:
    """Return the stretches of all rows that hold a sample: pieces, zeros after each if it takes up more than it has, and at the end."""
    rows = np.flatnonzero(samples != NO_SAMPLE)
    first = grid.first_piece[samples[rows]]
    count = grid.first_piece[samples[rows] + 1] - first
    row = np.repeat(rows, count)
    begin = np.repeat(np.cumsum(count) - count, count)
    piece = np.repeat(first, count) + np.arange(len(row)) - begin
    length = grid.piece_length[piece].astype(np.int64)
    taken = length if grid.widths is None else grid.widths[samples[row]].astype(np.int64)
    before = np.cumsum(taken) - taken
    at = before - before[begin] + row * (grid.seq_len + 1)
    end = at + length
    following = np.append(at[1:], 0)
    last = np.cumsum(count) - 1
    following[last] = (rows + 1) * (grid.seq_len + 1)
    empty = np.flatnonzero(following > end)
    # Zeros come right after the piece that they follow.
    places = np.arange(len(row)) + np.searchsorted(empty, np.arange(len(row)))
    found = _Stretches(*(np.empty(len(row) + len(empty), np.int64) for _ in _Stretches._fields))
    for target, pieces, zeros in zip(
        found,
        (row, piece, length, at),
        (row[empty], np.full(len(empty), -1), (following - end)[empty], end[empty]),
        strict=True,
    ):
        target[places] = pieces
        target[places[empty] + 1] = zeros
    return found


def _marks(
    grid: PackGrid, found: _Stretches, shards: I64, *, batches: int, rows: int, gaps: Gaps | None
) -> list[Marks]:
    """Return for each batch where nothing is learned: the first token of each piece, what is deleted, and zeros."""
    pieces, zeros = np.flatnonzero(found.piece >= 0), np.flatnonzero(found.piece < 0)
    gone = np.empty(0, np.int64)
    if gaps is not None:
        gone = pieces[deleted_pieces(grid, found.piece[pieces], shards[found.row[pieces]], gaps=gaps)]
    tokens = rows * (grid.seq_len + 1)
    borders = np.arange(batches + 1) * tokens
    parts = []
    for chosen in (pieces, zeros, gone):
        start = found.at[chosen]
        begin = start % tokens
        within = np.stack([begin, begin + found.length[chosen]], axis=1)
        cuts = np.searchsorted(start, borders).tolist()
        parts.append([within[low:high] for low, high in pairwise(cuts)])
    return [Marks(firsts[:, 0], empty, deleted) for firsts, empty, deleted in zip(*parts, strict=True)]


def _spans(grid: PackGrid, sample: int) -> list[Span]:
    """Return the pieces and zeros that make up a row, but for the zeros at its end."""
    return list(grid.row(sample)) if sample != NO_SAMPLE else []
