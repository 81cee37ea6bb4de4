"""Samples by their position in the order, for those who bring a sampler, batches and worker processes of their own.

Position t is the same sample here as in a `Loader` of the same dataset version, `seq_len`, seed and settings: what a
framework takes one after the other is what the loader would have given it. Nothing is planned or fetched ahead; each read
costs what it holds, wherever it lies.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from datastore.errors import ConfigError
from datastore.loader.assemble import Assembler, empty_columns
from datastore.loader.batch import Batch
from datastore.loader.cache.blocks import TokenBlocks
from datastore.loader.mixture.request import Data
from datastore.loader.order.lanes import I64
from datastore.loader.order.order import BatchPlan
from datastore.loader.place.sources import course_of
from datastore.loader.settings import LoaderSettings, checked_options
from datastore.loader.stream import columns_of, end_of_text_of, open_stream

__all__ = ["SampleReader", "blocks_of_steps"]

_AT_ONCE = 1_024
"""Positions looked up together."""


class SampleReader:
    """The samples of `seq_len + 1` tokens of a dataset, by their position in the order.

    Not thread-safe. It may be sent to another process, or forked: the blocks that it has open stay behind.

    Raises:
        ConfigError: as `Loader`.
    """

    def __init__(
        self,
        dataset: Data,
        *,
        seq_len: int,
        seed: int = 0,
        options: LoaderSettings = LoaderSettings(),  # noqa: B008 - a frozen value
    ) -> None:
        self.dataset = dataset
        self.options = checked_options(options)
        self._stream = open_stream(dataset, seq_len=seq_len, seed=seed, options=self.options)
        self._order = course_of(self._stream.sources, self._stream.start, epochs=None).order
        self._columns = columns_of(self._stream, self.options)
        self._end_of_text = end_of_text_of(self._stream, self.options)
        self._blocks: tuple[int, TokenBlocks] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        start = self._stream.start
        return _again, (self.dataset, start.seq_len, start.seed, self.options)

    @property
    def samples_per_epoch(self) -> int:
        """N, the samples of the dataset: position t lies in epoch t // N. Of a mixture, those of all its sources."""
        return self._stream.grid.samples

    def read(self, positions: Sequence[int] | I64) -> Batch:
        """Return the samples at `positions`, in that order; a position may be asked for more than once.

        Raises:
            ConfigError: a position is negative.
            CorruptError: a block that they lie in is damaged; the message names shard and block.
            StorageError: the storage failed.
        """
        wanted = np.asarray(positions, np.int64)
        if wanted.size and int(wanted.min()) < 0:
            raise ConfigError("a position is negative", position=int(wanted.min()), hint="Positions count from 0.")
        into = empty_columns(self._columns, rows=len(wanted), tokens=self._stream.grid.seq_len + 1)
        assembler, plan = self._assembler(), self._planned(wanted)
        return assembler.make(plan, assembler.reads_of([plan])[0], None, into)

    def blocks(self, positions: I64) -> I64:
        """Return the blocks that the samples at `positions` lie in, each once; nothing is read."""
        found: I64 = np.unique(self._assembler().reads_of([self._planned(positions)])[0].blocks)
        return found

    def _planned(self, positions: I64) -> BatchPlan:
        found = self._order.locate(positions)
        return BatchPlan(int(positions[0]) if positions.size else 0, positions, found.samples, found.shards)

    def _assembler(self) -> Assembler:
        return Assembler(self._stream, self._ready(), columns=self._columns, end_of_text=self._end_of_text)

    def _ready(self) -> TokenBlocks:
        """Return the blocks, opened by this process: a forked one has none of the threads, and perhaps locks that are taken."""
        if self._blocks is None or self._blocks[0] != os.getpid() or self._blocks[1].abandoned:
            self._blocks = os.getpid(), self._stream.open_blocks()
        return self._blocks[1]


def blocks_of_steps(reader: SampleReader, *, steps: int, global_batch: int) -> list[int]:
    """Return the blocks that all ranks together read in the first `steps` steps, those of the first steps first."""
    found: dict[int, None] = {}
    for start in range(0, steps * global_batch, _AT_ONCE):
        positions = np.arange(start, min(start + _AT_ONCE, steps * global_batch), dtype=np.int64)
        found.update(dict.fromkeys(reader.blocks(positions).tolist()))
    return list(found)


def _again(dataset: Data, seq_len: int, seed: int, options: LoaderSettings) -> SampleReader:
    return SampleReader(dataset, seq_len=seq_len, seed=seed, options=options)
