"""Samples as stretches of the token stream: which tokens a sample has, and in which shards they lie.

The stream is the shards of a version laid end to end, in the order of the manifest. The line that samples are cut from
is the stream itself, or, if deleted tokens are left out, what remains of it. Sample k is the tokens
[k * seq_len, (k + 1) * seq_len + 1) of the line: inputs and, one further, targets. So nothing is lost but the last few
tokens of the whole dataset, `seq_len` may exceed a shard, and an append leaves earlier samples as they were. The price:
a sample may cross from one shard into the next ones.

A sample belongs to the shard that holds its first token; the samples of a shard are one run of numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.errors import ConfigError
from datastore.loader.order.mix import U64
from datastore.loader.order.order import Order, OrderKey, SampleOrder

__all__ = ["Gaps", "SampleGrid", "Span", "sample_grid"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one shard's tokens, `[start, stop)`, counted from the start of the shard."""

    shard: int
    start: int
    stop: int


class Gaps:
    """Stretches [K, 2] of the stream that are deleted: in order, none empty, none touching. Memory: 32 bytes each.

    A place of the stream counts all tokens, one of the line only those that are left.
    """

    def __init__(self, spans: I64) -> None:
        self.start: I64 = np.ascontiguousarray(spans[:, 0])
        self.stop: I64 = np.ascontiguousarray(spans[:, 1])
        self._before: I64 = np.zeros(len(spans) + 1, np.int64)
        np.cumsum(self.stop - self.start, out=self._before[1:])
        self._line: I64 = self.start - self._before[:-1]

    def stream_of(self, places: I64) -> I64:
        """Return where in the stream each place of the line is; O(log gaps) each."""
        found: I64 = places + self._before[np.searchsorted(self._line, places, side="right")]
        return found

    def line_of(self, places: I64) -> I64:
        """Return how many tokens of the line come before each place of the stream."""
        after = np.searchsorted(self.start, places, side="left")
        inside = np.maximum(0, self.stop[np.maximum(after, 1) - 1] - places) * (after > 0)
        found: I64 = places - self._before[after] + inside
        return found

    def between(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield the stretches of the stream that make up the places [start, stop) of the line."""
        at = int(np.searchsorted(self._line, start, side="right"))
        while start < stop:
            end = min(stop, int(self._line[at])) if at < len(self._line) else stop
            yield start + int(self._before[at]), end + int(self._before[at])
            start, at = end, at + 1

    def touched(self, start: I64, stop: I64) -> tuple[I64, I64]:
        """Return the first gap and one past the last that each stretch of the stream shares tokens with."""
        return np.searchsorted(self.stop, start, side="right"), np.searchsorted(self.start, stop, side="left")


@dataclass(frozen=True, slots=True)
class SampleGrid:
    """The samples of `seq_len + 1` tokens of a line. Memory: 24 bytes a shard, 8 more if anything is left out."""

    seq_len: int
    samples: int
    """N, all samples of the dataset."""

    token_start: I64
    """[S + 1] place on the line of each shard's first token; the last is the length of the line."""

    run_start: I64
    """[S] number of each shard's first sample."""

    run_length: I64
    """[S] samples of each shard."""

    stored_start: I64
    """[S + 1] place in the stream of each shard's first token; `token_start` itself if nothing is left out."""

    gaps: Gaps | None = None
    """What is left out; None if nothing is."""

    @property
    def numbers(self) -> int:
        """How many sample numbers its line takes up; a last one may not be a whole sample."""
        return -(-int(self.token_start[-1]) // self.seq_len)

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a shard that samples next to each other are taken from: here each is read on from the one before."""
        return 1

    @property
    def rows_per_epoch(self) -> int:
        """Samples of an epoch: all of them."""
        return self.samples

    def order(self, uid64: U64, key: OrderKey) -> SampleOrder:
        """Return the order of the samples."""
        return Order(self, uid64, key)

    def owner(self, samples: I64) -> I64:
        """Return the shard that each sample belongs to; O(log shards) each."""
        return np.searchsorted(self.token_start, samples * self.seq_len, side="right") - 1

    def start_in(self, shards: I64, samples: I64) -> I64:
        """Return where each sample starts in its shard."""
        return self._stream_of(samples * self.seq_len) - self.stored_start[shards]

    def end_in(self, shards: I64, samples: I64) -> I64:
        """Return where in its shard the reads of each sample end, at least 1: where the shard ends, if they go beyond it."""
        tokens = self.stored_start[shards + 1] - self.stored_start[shards]
        found: I64 = np.minimum(self.start_in(shards, samples) + self.seq_len + 1, np.maximum(tokens, 1))
        return found

    def samples_of(self, shards: I64, first: I64, last: I64) -> tuple[I64, I64]:
        """Return the first and the last sample of each shard that its tokens `first` to `last` are of, or are next to."""
        low, high = self._sample_at(shards, first), self._sample_at(shards, last)
        return low, high

    def is_broken(self, samples: I64) -> npt.NDArray[np.bool_]:
        """Return whether something is left out between the first and the last token of each sample."""
        if self.gaps is None:
            return np.zeros(samples.shape, np.bool_)
        first = samples * self.seq_len
        reach: I64 = self._stream_of(first + self.seq_len) - self._stream_of(first)
        broken: npt.NDArray[np.bool_] = reach != self.seq_len
        return broken

    def spans(self, sample: int) -> Iterator[Span]:
        """Yield the stretches that make up `sample`, in order; none is empty."""
        start = sample * self.seq_len
        whole = (start, start + self.seq_len + 1)
        for at, end in [whole] if self.gaps is None else self.gaps.between(*whole):
            yield from self._spans(at, end)

    def _spans(self, at: int, end: int) -> Iterator[Span]:
        """Yield the parts of the shards that make up the places [at, end) of the stream."""
        shard = int(np.searchsorted(self.stored_start, at, side="right")) - 1
        while at < end:
            first, last = int(self.stored_start[shard]), int(self.stored_start[shard + 1])
            if last > at:
                yield Span(shard, at - first, min(end, last) - first)
                at = min(end, last)
            shard += 1

    def _sample_at(self, shards: I64, tokens: I64) -> I64:
        places = self.stored_start[shards] + tokens
        if self.gaps is not None:
            places = self.gaps.line_of(places)
        first = self.run_start[shards]
        found: I64 = np.clip(places // self.seq_len, first, first + np.maximum(self.run_length[shards] - 1, 0))
        return found

    def _stream_of(self, places: I64) -> I64:
        return places if self.gaps is None else self.gaps.stream_of(places)


def sample_grid(tokens: I64, *, seq_len: int, gaps: Gaps | None = None) -> SampleGrid:
    """Return the samples of shards with `tokens` [S] tokens each, of which `gaps` are left out.

    Raises:
        ConfigError: `seq_len` is below 1, or the dataset has no sample of that length.
    """
    if seq_len < 1:
        raise ConfigError("seq_len must be at least 1", seq_len=seq_len, hint="Set `seq_len` to 1 or more.")
    stored_start = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum(tokens, out=stored_start[1:])
    token_start = stored_start if gaps is None else gaps.line_of(stored_start)
    total = int(token_start[-1])
    samples = max(0, total - 1) // seq_len
    if samples == 0:
        raise ConfigError(
            "seq_len is longer than the whole dataset" if total else "the dataset has no tokens",
            seq_len=seq_len,
            tokens=total,
            hint="Use a smaller `seq_len` (a sample has one token more), or add data.",
        )
    run_end = np.minimum(-(-token_start // seq_len), samples)
    return SampleGrid(seq_len, samples, token_start, run_end[:-1], np.diff(run_end), stored_start, gaps)
