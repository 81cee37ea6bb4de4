"""Packs: whole documents side by side in rows of one length, so that none is cut that fits and hardly a token is padding.

A pack is a sample: it has a number, and belongs to a shard. So the order, the ranks, the state and the resume of packed rows are
those of samples, with nothing added; that is what makes them seekable and independent of the number of ranks.

Documents are packed in groups that lie next to each other in one shard (4 MB or so), by their lengths alone, once, when the
loader is made. Each goes, the longest first, to the row with the least room that has enough for it (best fit decreasing). A document that is longer
than a row is cut into whole rows; what is left of it is packed like any other. The packs of an epoch are those of every other
one; which rows come when is the order's.

Complexity: 0.5 us a document once, 12 bytes of memory each, and 8 a pack. A group of 2,000 rows is filled to 99.9 % by texts of
the web or of code; the last row of a group is what is lost.

Source: D. S. Johnson, "Near-optimal bin packing algorithms", 1973; H. Ding et al., "Fewer truncations improve language
modeling", ICML 2024.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.errors import ConfigError
from datastore.loader.cache.blocks import NOWHERE
from datastore.loader.order.mix import U64
from datastore.loader.order.order import Order, OrderKey, SampleOrder
from datastore.loader.order.samples import I64, Gaps, Span
from datastore.loader.settings import Packing

__all__ = ["PackGrid", "best_fit", "buckets", "deleted_pieces", "joint_packs", "pack_grid"]

I32 = npt.NDArray[np.int32]

_GROUP_TOKENS = 2**21
"""Tokens that are packed together at least: two blocks of a narrow shard, so that a pack reads from few places."""

_GROUP_ROWS = 256
"""Rows that are packed together at least, however long they are: one of them may be left half empty."""


@dataclass(frozen=True, slots=True)
class PackGrid:
    """The packs of a dataset: rows of `seq_len + 1` tokens."""

    seq_len: int
    samples: int
    """N, all packs."""

    run_start: I64
    """[S] number of each shard's first pack."""

    run_length: I64
    """[S] packs of each shard."""

    stored_start: I64
    """[S + 1] place in the stream of each shard's first token."""

    first_piece: I64
    """[N + 1] number of each pack's first piece."""

    piece_start: I64
    """[P] where each piece starts in its shard."""

    piece_length: I32
    """[P] its tokens."""

    group_pack: I64
    """[G] number of the first pack of each group."""

    group_stop: I64
    """[G] place in the stream where the documents of each group end."""

    widths: I32 | None = None
    """[N] of sequences of similar length, the tokens that each of them takes up in a row, zeros with it; None: just its own."""

    @property
    def numbers(self) -> int:
        """How many sample numbers it takes up."""
        return self.samples

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a shard that packs next to each other are taken from: those of the largest group, about."""
        starts = np.concatenate([self.stored_start[:1], self.group_stop[:-1]])
        return int((self.group_stop - starts).max())

    @property
    def rows_per_epoch(self) -> int:
        """Samples of an epoch: all of them."""
        return self.samples

    def order(self, uid64: U64, key: OrderKey) -> SampleOrder:
        """Return the order of the samples."""
        return Order(self, uid64, key)

    @property
    def fill(self) -> float:
        """Share of the tokens of all rows that are of documents."""
        return float(self.piece_length.sum(dtype=np.int64)) / (self.samples * (self.seq_len + 1))

    def end_in(self, shards: I64, samples: I64) -> I64:
        """Return where in its shard the group of each pack ends: any pack of it may hold its last document."""
        group = np.searchsorted(self.group_pack, samples, side="right") - 1
        found: I64 = self.group_stop[group] - self.stored_start[shards]
        return found

    def samples_of(self, shards: I64, first: I64, last: I64) -> tuple[I64, I64]:
        """Return the first and the last pack of the groups that the tokens `first` to `last` of each shard are of."""
        low, high = (
            np.minimum(
                np.searchsorted(self.group_stop, self.stored_start[shards] + at, side="right"), len(self.group_pack) - 1
            )
            for at in (first, last)
        )
        start = self.run_start[shards]
        most = start + np.maximum(self.run_length[shards] - 1, 0)
        after = np.append(self.group_pack[1:], self.samples)
        return np.clip(self.group_pack[low], start, most), np.clip(after[high] - 1, start, most)

    def spans(self, sample: int) -> Iterator[Span]:
        """Yield the pieces that make up `sample`, in order; zeros are not told."""
        shard = int(np.searchsorted(self.run_start, sample, side="right")) - 1
        for piece in range(int(self.first_piece[sample]), int(self.first_piece[sample + 1])):
            start = int(self.piece_start[piece])
            yield Span(shard, start, start + int(self.piece_length[piece]))

    def row(self, sample: int) -> Iterator[Span]:
        """Yield what `sample` is made of, the zeros between its pieces too: of a sequence shorter than others in its row."""
        width = 0 if self.widths is None else int(self.widths[sample])
        for span in self.spans(sample):
            yield span
            if span.stop - span.start < width:
                yield Span(NOWHERE, 0, width - (span.stop - span.start))


def pack_grid(
    offsets: Iterable[I64],
    *,
    tokens: I64,
    seq_len: int,
    live: Iterable[npt.NDArray[np.bool_] | None],
    packing: Packing = "best_fit",
) -> PackGrid:
    """Return the packs of shards with `tokens` [S] tokens, whose documents lie at `offsets` (each [documents + 1]).

    `live` says of each shard which documents to pack; None: all. Documents of fewer than two tokens have nothing to predict
    and are left out.

    Raises:
        ConfigError: `seq_len` is below 1, or there is nothing to pack.
    """
    if seq_len < 1:
        raise ConfigError("seq_len must be at least 1", seq_len=seq_len, hint="Set `seq_len` to 1 or more.")
    starts, lengths, counts, run_length = [np.empty(0, np.int64)], [np.empty(0, np.int32)], [np.zeros(1, np.int64)], []
    stored_start = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum(tokens, out=stored_start[1:])
    group_packs: list[int] = []
    group_stop: list[int] = []
    for first_token, found, mask in zip(stored_start[:-1].tolist(), offsets, live, strict=True):
        packs = 0
        for start, length in _groups(*_pieces(found, mask, seq_len), tokens=max(_GROUP_TOKENS, _GROUP_ROWS * seq_len)):
            order, sizes = _PACKERS[packing](length, room=seq_len + 1)
            starts.append(start[order])
            lengths.append(length[order].astype(np.int32))
            counts.append(sizes)
            group_packs.append(len(sizes))
            group_stop.append(first_token + int(start[-1] + length[-1]))
            packs += len(sizes)
        run_length.append(packs)
    total = sum(run_length)
    if not total:
        raise ConfigError(
            "there is nothing to pack: no document has two tokens", tokens=int(tokens.sum()), hint="Add data."
        )
    runs = np.array(run_length, np.int64)
    first_piece, piece_length = np.cumsum(np.concatenate(counts)), np.concatenate(lengths)
    return PackGrid(
        seq_len=seq_len,
        samples=total,
        run_start=np.cumsum(runs) - runs,
        run_length=runs,
        stored_start=stored_start,
        first_piece=first_piece,
        piece_start=np.concatenate(starts),
        piece_length=piece_length,
        group_pack=np.cumsum([0, *group_packs[:-1]]),
        group_stop=np.array(group_stop, np.int64),
        widths=np.maximum.reduceat(piece_length, first_piece[:-1]) if packing == "buckets" else None,
    )


def best_fit(lengths: I64, *, room: int) -> tuple[I64, I64]:
    """Return `lengths` (each at most `room`) in the order of the rows that they are packed into, and how many are in each row.

    A row holds its pieces in the order that they are given in, and rows come in the order of their first piece. Takes 0.5 us
    a piece, 1 where rows are long.
    """
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(room + 1)]
    """Rows by the room that they have left."""
    rooms = 0
    """Which rooms there are, one bit each: the least that is enough is the lowest bit from there on."""
    sizes = lengths.tolist()
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = sizes[piece]
        enough = rooms >> size
        if enough:
            left = (enough & -enough).bit_length() - 1
            row = open_rows[size + left].pop()
            if not open_rows[size + left]:
                rooms ^= 1 << (size + left)
        else:
            left, row = room - size, len(rows)
            rows.append([])
        rows[row].append(piece)
        if left:
            open_rows[left].append(row)
            rooms |= 1 << left
    for pieces in rows:
        pieces.sort()
    rows.sort()
    order = np.array([piece for pieces in rows for piece in pieces], np.int64)
    return order, np.array([len(pieces) for pieces in rows], np.int64)


def buckets(lengths: I64, *, room: int) -> tuple[I64, I64]:
    """Return `lengths` so that those of a row are similar: each row has as many as would fit if all were as long as its longest.

    The same answer as `best_fit`; rows come in the order of the longest piece that each begins with.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes = lengths[order].tolist()
    counts: list[int] = []
    at = 0
    while at < len(sizes):
        counts.append(min(room // sizes[at], len(sizes) - at))
        at += counts[-1]
    return order, np.array(counts, np.int64)


_PACKERS: dict[Packing, Callable[..., tuple[I64, I64]]] = {"best_fit": best_fit, "buckets": buckets}


def joint_packs(grids: Sequence[PackGrid]) -> PackGrid:
    """Return the packs of several datasets, one after the other."""
    first_pack = np.cumsum([0, *(grid.samples for grid in grids)])
    first_piece = np.cumsum([0, *(len(grid.piece_start) for grid in grids)])
    first_token = np.cumsum([0, *(int(grid.stored_start[-1]) for grid in grids)])
    return PackGrid(
        seq_len=grids[0].seq_len,
        samples=int(first_pack[-1]),
        run_start=np.concatenate([grid.run_start + at for grid, at in zip(grids, first_pack[:-1], strict=True)]),
        run_length=np.concatenate([grid.run_length for grid in grids]),
        stored_start=np.concatenate(
            [*(grid.stored_start[:-1] + at for grid, at in zip(grids, first_token[:-1], strict=True)), first_token[-1:]]
        ),
        first_piece=np.concatenate(
            [*(grid.first_piece[:-1] + at for grid, at in zip(grids, first_piece[:-1], strict=True)), first_piece[-1:]]
        ),
        piece_start=np.concatenate([grid.piece_start for grid in grids]),
        piece_length=np.concatenate([grid.piece_length for grid in grids]),
        group_pack=np.concatenate([grid.group_pack + at for grid, at in zip(grids, first_pack[:-1], strict=True)]),
        group_stop=np.concatenate([grid.group_stop + at for grid, at in zip(grids, first_token[:-1], strict=True)]),
        widths=np.concatenate(widths)
        if (widths := [grid.widths for grid in grids if grid.widths is not None])
        else None,
    )


def deleted_pieces(grid: PackGrid, pieces: I64, shards: I64, *, gaps: Gaps) -> npt.NDArray[np.bool_]:
    """Return whether each of `pieces`, which lie in `shards`, is of a document that is deleted: whole documents are."""
    start = grid.stored_start[shards] + grid.piece_start[pieces]
    first, last = gaps.touched(start, start + grid.piece_length[pieces])
    return np.less(first, last)


def _pieces(offsets: I64, live: npt.NDArray[np.bool_] | None, seq_len: int) -> tuple[I64, I64]:
    """Return where the pieces of a shard's documents start, and how long they are, in order.

    Two pieces of a document share a token: the last target of one is the first input of the next.
    """
    start, length = offsets[:-1], np.diff(offsets)
    kept = length > 1 if live is None else (length > 1) & live
    start, length = start[kept], length[kept]
    parts = 1 + (length - 2) // seq_len
    part = np.arange(int(parts.sum())) - np.repeat(np.cumsum(parts) - parts, parts)
    starts = np.repeat(start, parts) + part * seq_len
    return starts, np.minimum(np.repeat(start + length, parts) - starts, seq_len + 1)


def _groups(start: I64, length: I64, *, tokens: int) -> Iterator[tuple[I64, I64]]:
    """Yield pieces in groups of `tokens` tokens."""
    if not len(start):
        return
    group = np.cumsum(length) // tokens
    cuts = np.flatnonzero(np.diff(group)) + 1
    yield from zip(np.split(start, cuts), np.split(length, cuts), strict=True)
