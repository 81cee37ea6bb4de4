"""Tokens, and what lies beside them, from blocks into the rows of a batch: one copy, straight to where the caller wants them.

A row is copied between two memoryviews: 0.7 us for 2,049 tokens, where a slice of a `np.memmap` takes 2 and
`np.take` of an index matrix 3 (NumPy 2.4, warm; tools/bench/loader).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from datastore.cache.layout import Track
from datastore.loader.cache.blocks import TokenBlocks
from datastore.loader.order.samples import Span
from datastore.loader.reads import Blank, Reads, blocks_of

__all__ = ["AnyArray", "Column", "Gatherer", "TokenArray", "blank_out"]

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
AnyArray = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Column:
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


class Gatherer:
    """Copies the reads of a batch out of `blocks`; rows have `width` tokens, and the values of `columns` that go with them."""

    def __init__(self, blocks: TokenBlocks, *, width: int, columns: Sequence[Column] = ()) -> None:
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

    def _copy_values(self, reads: Reads, out: AnyArray, *, column: Column, track: Track) -> None:
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


def blank_out(blanks: Sequence[Blank], tokens: TokenArray, *, columns: Mapping[str, AnyArray], token: int) -> None:
    """Write `token` over the stretches `blanks` of `tokens`, and zeros over what goes with them."""
    for row, start, stop in blanks:
        tokens[row, start:stop] = token
        for values in columns.values():
            values[row, start:stop] = 0
