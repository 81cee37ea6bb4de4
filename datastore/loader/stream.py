"""From a dataset to its order: the parts that a loader and a trace have in common."""

from dataclasses import dataclass

import msgspec
import numpy as np

from datastore.dataset.shards.segments import Segments
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, whole_number
from datastore.loader.cache.blocks import Track
from datastore.loader.gather import BatchColumn
from datastore.loader.order.order import ORDER_VERSION, Order, OrderKey
from datastore.loader.order.samples import Gaps, SampleGrid, sample_grid
from datastore.loader.settings import LOSS_MASK, LoaderSettings
from datastore.loader.state import LoaderState, dataset_fingerprint

__all__ = ["SMALL_BYTES", "SampleStream", "columns_of", "end_of_text_of", "key_of", "lanes_for", "open_stream"]

SMALL_BYTES = 2**30
"""A dataset of at most as many bytes is small: all of it can stay in memory, so it is shuffled as well as possible."""

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class SampleStream:
    """The samples of a dataset, and the state of a loader that has delivered none of them."""

    dataset: Dataset
    grid: SampleGrid
    start: LoaderState
    blanks: Gaps | None
    """Deleted stretches of the stream that samples still have in them; None if there are none."""

    def order(self, state: LoaderState) -> Order:
        """Return the order that `state` is a position of."""
        return Order(self.grid, self.dataset.segments.uid64, key_of(state))


def key_of(state: LoaderState) -> OrderKey:
    """Return what the order of `state` depends on, besides the dataset."""
    return OrderKey(state.seed, state.lanes, state.window, state.shuffle)


def open_stream(dataset: Dataset, *, seq_len: int, seed: int, options: LoaderSettings) -> SampleStream:
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
    seed, seq_len = whole_number(seed, name="seed"), whole_number(seq_len, name="seq_len")
    if not 0 <= seed <= _MAX_SEED:
        raise ConfigError("seed out of range", seed=seed, hint="Use a number from 0 to 2^63 - 1.")
    segments = dataset.segments
    deleted = Gaps(dataset.deleted_spans) if dataset.deleted_spans.size else None
    left_out = deleted if options.deletions == "compact" else None
    grid = sample_grid(segments.tokens, seq_len=seq_len, gaps=left_out)
    start = LoaderState(
        dataset=dataset.uuid,
        version=dataset.version,
        fingerprint=dataset_fingerprint(segments, gaps=left_out),
        seq_len=seq_len,
        seed=seed,
        lanes=lanes_for(segments, grid, options) if options.shuffle else 1,
        window=options.window if options.shuffle else 1,
        order=ORDER_VERSION,
        cursor=0,
        deletions=options.deletions,
        shuffle=options.shuffle,
    )
    return SampleStream(dataset, grid, start, deleted if left_out is None else None)


def columns_of(stream: SampleStream, options: LoaderSettings) -> dict[str, BatchColumn]:
    """Return what the batches of `stream` bring along beside their tokens.

    Raises:
        ConfigError: the dataset does not have a column that `options` name.
    """
    segments = stream.dataset.segments
    stored = {layout.name: layout for layout in segments.columns}
    for name in options.columns:
        if name not in stored:
            raise ConfigError(
                "the dataset has no such column", column=name, columns=sorted(stored), hint="Name one that it has."
            )
    found: dict[str, BatchColumn] = {}
    for name in sorted({*options.columns, LOSS_MASK} & set(stored)):
        dtype, width = np.dtype(stored[name].dtype), stored[name].width
        token_bytes = np.full(len(segments), dtype.itemsize * width, np.int64)
        found[name] = BatchColumn(name, dtype, width, Track(segments.column_start(name), token_bytes))
    if stream.blanks is not None:
        found.setdefault(LOSS_MASK, BatchColumn(LOSS_MASK, np.dtype(np.uint8), 1, None))
    return found


def end_of_text_of(stream: SampleStream, options: LoaderSettings) -> int:
    """Return the id that deleted tokens of `stream` read as; 0 if nothing is deleted.

    Raises:
        ConfigError: nobody says which it is, or the dataset's tokens cannot hold it.
    """
    if stream.blanks is None:
        return 0
    tokenizer = stream.dataset.commit.tokenizer
    token = tokenizer.end_of_text if options.end_of_text is None and tokenizer else options.end_of_text
    if token is None:
        raise ConfigError(
            "documents are deleted, and no tokenizer says what to read in their place",
            url=stream.dataset.url,
            hint="Name an id: `end_of_text=ID`; or leave them out: `deletions=compact`.",
        )
    if token >= 256 ** int(stream.dataset.segments.itemsize.max()):
        raise ConfigError("end_of_text is no token of the dataset", end_of_text=token, hint="Name a smaller id.")
    return token


def lanes_for(segments: Segments, grid: SampleGrid, options: LoaderSettings) -> int:
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
