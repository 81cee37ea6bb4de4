"""From a dataset to its order: the parts that a loader and a trace have in common."""

from dataclasses import dataclass

import msgspec

from datastore.errors import ConfigError
from datastore.loader.geometry import SampleGrid, sample_grid
from datastore.loader.order import ORDER_VERSION, Order, OrderKey
from datastore.loader.settings import LoaderOptions
from datastore.loader.state import LoaderState, dataset_fingerprint
from datastore.store.dataset import Dataset
from datastore.store.segment import Segments

__all__ = ["SMALL_BYTES", "Stream", "lanes_for", "open_stream"]

SMALL_BYTES = 2**30
"""A dataset of at most as many bytes is small: all of it can stay in memory, so it is shuffled as well as possible."""

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Stream:
    """The samples of a dataset, and the state of a loader that has delivered none of them."""

    dataset: Dataset
    grid: SampleGrid
    start: LoaderState

    def order(self, state: LoaderState) -> Order:
        """Return the order that `state` is a position of."""
        return Order(self.grid, self.dataset.segments.uid64, OrderKey(state.seed, state.lanes, state.window))


def open_stream(dataset: Dataset, *, seq_len: int, seed: int, options: LoaderOptions) -> Stream:
    """Return the samples of `dataset`.

    Raises:
        ConfigError: it holds records, `seq_len` does not fit, or `seed` is out of range.
    """
    if dataset.kind != "tokens":
        raise ConfigError(
            f"the dataset holds {dataset.kind}, and a loader reads tokens",
            url=dataset.url,
            hint="Ingest it with --tokenizer.",
        )
    if not 0 <= seed <= _MAX_SEED:
        raise ConfigError("seed out of range", seed=seed, hint="Use a number from 0 to 2^63 - 1.")
    segments = dataset.segments
    grid = sample_grid(segments.tokens, seq_len=seq_len)
    start = LoaderState(
        dataset=dataset.uuid,
        version=dataset.version,
        fingerprint=dataset_fingerprint(segments),
        seq_len=seq_len,
        seed=seed,
        lanes=lanes_for(segments, grid, options),
        window=options.window,
        order=ORDER_VERSION,
        cursor=0,
    )
    return Stream(dataset, grid, start)


def lanes_for(segments: Segments, grid: SampleGrid, options: LoaderOptions) -> int:
    """Return how many lanes `options.lanes` come down to.

    Each lane needs a few blocks to itself (four), or small reads would not pay. Where the whole dataset can stay in
    memory that is no concern, and a window each is enough: then all samples are in a window at any time, which is
    nearly a shuffle of the whole.

    It depends on the dataset alone, not on rank, world, memory or place, and is frozen in the state.
    """
    itemsize = int(segments.itemsize.max())
    block_samples = max(1, int(segments.block_bytes.max()) // (grid.seq_len * itemsize))
    lanes = grid.samples // (4 * block_samples)
    if int(grid.token_start[-1]) * itemsize <= SMALL_BYTES:
        lanes = max(lanes, grid.samples // options.window)
    return max(1, min(options.lanes, lanes))


def at_cursor(state: LoaderState, cursor: int) -> LoaderState:
    """Return `state` with another cursor."""
    return msgspec.structs.replace(state, cursor=cursor)
