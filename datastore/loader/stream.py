"""From a dataset, or a mixture of several, to the samples of tokens: the parts that a loader and a trace have in common."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np

from datastore.dataset.shards.segments import Segments
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, whole_number
from datastore.loader.cache.blocks import TokenBlocks, Track
from datastore.loader.cache.opening import is_local, open_blocks, open_disk
from datastore.loader.gathering.gather import BatchColumn
from datastore.loader.mixture.joint import JointSegments, JointStorage, joint_grid, places_of
from datastore.loader.mixture.request import Data, Mixture
from datastore.loader.order.packs import PackGrid, joint_packs, pack_grid
from datastore.loader.order.samples import I64, Gaps, SampleGrid, sample_grid
from datastore.loader.place.sources import Shape, Source, first_state
from datastore.loader.place.state import LoaderState, dataset_fingerprint
from datastore.loader.settings import LOSS_MASK, LoaderSettings, checked_seed
from datastore.storage.base import Storage

__all__ = [
    "SMALL_BYTES",
    "SampleStream",
    "columns_of",
    "end_of_text_of",
    "lanes_for",
    "open_stream",
]

SMALL_BYTES = 2**30
"""A dataset of at most as many bytes is small: all of it can stay in memory, so it is shuffled as well as possible."""


@dataclass(frozen=True, slots=True)
class SampleStream:
    """The samples of a dataset or of a mixture, and the state of a loader that has delivered none of them."""

    data: Data
    sources: tuple[Source[Dataset], ...]
    segments: Segments
    """The shards of all sources."""

    storage: Storage
    """Their files."""

    grid: SampleGrid | PackGrid
    """Their samples."""

    start: LoaderState
    blanks: Gaps | None
    """Deleted stretches of the stream that samples still have in them; None if there are none."""

    options: LoaderSettings
    is_local: bool
    """Whether all shards are files of this machine."""

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what it was made of: another process makes it anew."""
        return _again, (self.data, self.start.seq_len, self.start.seed, self.options)

    def open_blocks(self) -> TokenBlocks:
        """Return the blocks of its shards."""
        disks = [(source.place.first_shard, open_disk(source.dataset, options=self.options)) for source in self.sources]
        return open_blocks(self.storage, self.segments, local=self.is_local, options=self.options, disks=disks)


def _again(data: Data, seq_len: int, seed: int, options: LoaderSettings) -> SampleStream:
    return open_stream(data, seq_len=seq_len, seed=seed, options=options)


def open_stream(data: Data, *, seq_len: int, seed: int, options: LoaderSettings) -> SampleStream:
    """Return the samples of `data`.

    Raises:
        ConfigError: it holds records, `seq_len` does not fit, or `seed` is out of range; or a source of a mixture has the
            tokens of another tokenizer than the others.
    """
    mixture = data if isinstance(data, Mixture) else None
    given = {name: mixture.sources[name] for name in mixture.names} if mixture else {"": cast("Dataset", data)}
    datasets = cast("dict[str, Dataset]", given)  # Which holds tokens, or is refused.
    for dataset in datasets.values():
        if dataset.kind != "tokens":
            raise ConfigError(
                f"the dataset holds {dataset.kind}, and a loader reads tokens",
                url=dataset.url,
                hint="Read it with `RowLoader`, or ingest it with --tokenizer.",
            )
    _check_tokenizers(datasets)
    seed, seq_len = checked_seed(seed), whole_number(seq_len, name="seq_len")
    cut = _samples_of if options.packing is None else _packs_of
    grids: list[SampleGrid | PackGrid] = [
        cut(name, dataset, seq_len=seq_len, options=options) for name, dataset in datasets.items()
    ]
    places = places_of([grid.numbers for grid in grids], shards=[len(one.segments) for one in datasets.values()])
    sources = tuple(
        Source(name, dataset, grid, place, _shape_of(dataset, grid, options))
        for (name, dataset), grid, place in zip(datasets.items(), grids, places, strict=True)
    )
    start = first_state(sources, mixture, seq_len=seq_len, seed=seed, options=options)
    segments: Segments = sources[0].dataset.segments
    storage: Storage = sources[0].dataset.storage
    grid = grids[0]
    if mixture is not None:
        packs = [grid for grid in grids if isinstance(grid, PackGrid)]
        samples = [grid for grid in grids if isinstance(grid, SampleGrid)]
        grid = joint_packs(packs) if packs else joint_grid(samples, places)
        segments = JointSegments(datasets)
        storage = JointStorage({name: dataset.storage for name, dataset in datasets.items()})
    spans = np.empty((0, 2), np.int64)
    if options.deletions != "compact":
        spans = np.concatenate(
            [source.dataset.deleted_spans + grid.stored_start[source.place.first_shard] for source in sources]
        )
    blanks = Gaps(spans) if spans.size else None
    local = all(is_local(dataset) for dataset in datasets.values())
    return SampleStream(data, sources, segments, storage, grid, start, blanks, options, local)


def _samples_of(name: str, dataset: Dataset, *, seq_len: int, options: LoaderSettings) -> SampleGrid | PackGrid:
    left_out = Gaps(dataset.deleted_spans) if options.deletions == "compact" and dataset.deleted_spans.size else None
    with _named(name):
        return sample_grid(dataset.segments.tokens, seq_len=seq_len, gaps=left_out)


def _packs_of(name: str, dataset: Dataset, *, seq_len: int, options: LoaderSettings) -> SampleGrid | PackGrid:
    """Return the packs of `dataset`: reads where the documents of all shards begin."""
    segments = dataset.segments
    live = (dataset.live_rows(shard) if options.deletions == "compact" else None for shard in range(len(segments)))
    assert options.packing is not None
    disks = [(0, open_disk(dataset, options=options))]
    blocks = open_blocks(dataset.storage, segments, local=is_local(dataset), options=options, disks=disks)
    try:
        with _named(name):
            offsets = _offsets(segments, blocks)
            return pack_grid(offsets, tokens=segments.tokens, seq_len=seq_len, live=live, packing=options.packing)
    finally:
        blocks.close()


def _offsets(segments: Segments, blocks: TokenBlocks) -> Iterator[I64]:
    """Yield where the documents of each shard begin, and where the last one ends: at its last token, if part of it is held back."""

    def read(shard: int) -> I64:
        info = segments.shard(shard)
        size = (info.documents + 1) * np.dtype(info.offsets_dtype).itemsize
        with blocks.hold(
            np.array(blocks.layout.of_bytes(shard, info.offsets_start, info.offsets_start + size), np.int64)
        ):
            raw = blocks.read(*(np.array([value]) for value in (shard, info.offsets_start, size)))
        offsets = np.frombuffer(raw, info.offsets_dtype).astype(np.int64)
        return np.minimum(offsets, info.tokens)

    return map(read, range(len(segments)))


@contextmanager
def _named(source: str) -> Iterator[None]:
    """Say in an error which source of a mixture it is about."""
    try:
        yield
    except ConfigError as error:
        if not source:
            raise
        raise ConfigError(error.fact, source=source, **error.values, hint=error.hint) from None


def _shape_of(dataset: Dataset, grid: SampleGrid | PackGrid, options: LoaderSettings) -> Shape:
    lanes = lanes_for(dataset.segments, grid, options) if options.shuffle else 1
    gaps = Gaps(dataset.deleted_spans) if options.deletions == "compact" and dataset.deleted_spans.size else None
    return Shape(lanes, options.window if options.shuffle else 1, dataset_fingerprint(dataset.segments, gaps=gaps))


def _check_tokenizers(datasets: Mapping[str, Dataset]) -> None:
    """Refuse a mixture of ids that mean different things; of a dataset that names no tokenizer nobody knows."""
    known = {name: ref for name, dataset in datasets.items() if (ref := dataset.commit.tokenizer) is not None}
    first = next(iter(known), None)
    for name, ref in known.items():
        assert first is not None
        if ref.sha256 != known[first].sha256:
            raise ConfigError(
                "two sources of the mixture were made with different tokenizers",
                sources=[first, name],
                hint="Ingest one of them again with the tokenizer of the other.",
            )


def columns_of(stream: SampleStream, options: LoaderSettings) -> dict[str, BatchColumn]:
    """Return what the batches of `stream` bring along beside their tokens.

    Raises:
        ConfigError: the dataset, or a source of the mixture, does not have a column that `options` name.
    """
    segments = stream.segments
    stored = {layout.name: layout for layout in segments.columns}
    for source in stream.sources:
        own = {layout.name for layout in source.dataset.segments.columns}
        for name in options.columns:
            if name not in own and (name != LOSS_MASK or name not in stored):
                raise ConfigError(
                    "the dataset has no such column",
                    **({"source": source.name} if source.name else {}),
                    column=name,
                    columns=sorted(own),
                    hint="Name one that it has.",
                )
    found: dict[str, BatchColumn] = {}
    for name in sorted({*options.columns, LOSS_MASK} & set(stored)):
        dtype, width = np.dtype(stored[name].dtype), stored[name].width
        token_bytes = np.full(len(segments), dtype.itemsize * width, np.int64)
        lacking = segments.lacks(name) if isinstance(segments, JointSegments) else None
        track = Track(segments.column_start(name), token_bytes)
        found[name] = BatchColumn(name, dtype, width, track, lacking if lacking is not None and lacking.any() else None)
    if stream.blanks is not None or options.packing is not None:
        found.setdefault(LOSS_MASK, BatchColumn(LOSS_MASK, np.dtype(np.uint8), 1, None))
    return found


def end_of_text_of(stream: SampleStream, options: LoaderSettings) -> int:
    """Return the id that deleted tokens of `stream` read as; 0 if nothing is deleted.

    Raises:
        ConfigError: nobody says which it is, or the dataset's tokens cannot hold it.
    """
    if stream.blanks is None:
        return 0
    token = options.end_of_text
    for source in stream.sources if token is None else ():
        if source.dataset.commit.tokenizer is not None:
            token = source.dataset.commit.tokenizer.end_of_text
    if token is None:
        raise ConfigError(
            "documents are deleted, and no tokenizer says what to read in their place",
            url=stream.storage.url,
            hint="Name an id: `end_of_text=ID`; or leave them out: `deletions=compact`.",
        )
    if token >= 256 ** int(stream.segments.itemsize.max()):
        raise ConfigError("end_of_text is no token of the dataset", end_of_text=token, hint="Name a smaller id.")
    return token


def lanes_for(segments: Segments, grid: SampleGrid | PackGrid, options: LoaderSettings) -> int:
    """Return how many lanes `options.lanes` come down to.

    Each lane needs a few blocks to itself (four), or small reads would not pay. Where the whole dataset can stay in
    memory that is no concern, and a window each is enough: then all samples are in a window at any time, which is
    nearly a shuffle of the whole.

    It depends on the dataset alone, not on rank, world, memory or place, and is frozen in the state.
    """
    itemsize = int(segments.itemsize.max())
    block_samples = max(1, int(segments.block_bytes.max()) // (grid.seq_len * itemsize))
    lanes = grid.samples // (4 * block_samples)
    if grid.samples * grid.seq_len * itemsize <= SMALL_BYTES:
        lanes = max(lanes, grid.samples // options.window)
    return max(1, min(options.lanes, lanes))
