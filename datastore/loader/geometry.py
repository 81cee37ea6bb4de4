"""Samples as stretches of the token stream: which tokens a sample has, and in which shards they lie.

The stream is the shards of a version laid end to end, in the order of the manifest. Sample k is the tokens
[k * seq_len, (k + 1) * seq_len + 1): inputs and, one further, targets. So nothing is lost but the last few tokens of
the whole dataset, `seq_len` may exceed a shard, and an append leaves earlier samples as they were. The price: a sample
may cross from one shard into the next ones.

A sample belongs to the shard that holds its first token; the samples of a shard are one run of numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.errors import ConfigError

__all__ = ["SampleGrid", "Span", "sample_grid"]

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one shard's tokens, `[start, stop)`, counted from the start of the shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SampleGrid:
    """The samples of `seq_len + 1` tokens of a stream. Memory: 24 bytes a shard."""

    seq_len: int
    samples: int
    """N, all samples of the dataset."""

    token_start: I64
    """[S + 1] place in the stream of each shard's first token; the last is the length of the stream."""

    run_start: I64
    """[S] number of each shard's first sample."""

    run_length: I64
    """[S] samples of each shard."""

    def owner(self, samples: I64) -> I64:
        """Return the shard that each sample belongs to; O(log shards) each."""
        return np.searchsorted(self.token_start, samples * self.seq_len, side="right") - 1

    def start_in(self, shards: I64, samples: I64) -> I64:
        """Return where each sample starts in its shard."""
        return samples * self.seq_len - self.token_start[shards]

    def spans(self, sample: int) -> Iterator[Span]:
        """Yield the stretches that make up `sample`, in order; none is empty."""
        at = sample * self.seq_len
        end = at + self.seq_len + 1
        shard = int(np.searchsorted(self.token_start, at, side="right")) - 1
        while at < end:
            first, last = int(self.token_start[shard]), int(self.token_start[shard + 1])
            if last > at:
                yield Span(shard, at - first, min(end, last) - first)
                at = min(end, last)
            shard += 1


def sample_grid(tokens: I64, *, seq_len: int) -> SampleGrid:
    """Return the samples of shards with `tokens` [S] tokens each.

    Raises:
        ConfigError: `seq_len` is below 1, or the dataset has no sample of that length.
    """
    if seq_len < 1:
        raise ConfigError("seq_len must be at least 1", seq_len=seq_len, hint="Set seq_len to 1 or more.")
    token_start = np.zeros(len(tokens) + 1, np.int64)
    np.cumsum(tokens, out=token_start[1:])
    total = int(token_start[-1])
    samples = max(0, total - 1) // seq_len
    if samples == 0:
        raise ConfigError(
            "seq_len is longer than the whole dataset" if total else "the dataset has no tokens",
            seq_len=seq_len,
            tokens=total,
            hint="Use a smaller seq_len (a sample has seq_len + 1 tokens), or add data.",
        )
    run_end = np.minimum(-(-token_start // seq_len), samples)
    return SampleGrid(seq_len, samples, token_start, run_end[:-1], np.diff(run_end))
