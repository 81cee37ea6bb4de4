"""Fill the disk of a cache before it is needed: with a whole dataset, or with what the first steps of training read.

What is there already is read and checked, what is not is fetched, 16 MiB at a time by a few threads. Nothing is evicted for it: it
ends where the budget is used up, and says so.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError
from datastore.loader.cache.batches import CachedBatches
from datastore.loader.cache.blocks import BlockLayout
from datastore.loader.cache.disk import DiskTier
from datastore.loader.cache.opening import is_local
from datastore.loader.cache.prefetch import blocks_of_a_run
from datastore.loader.cache.region import Region
from datastore.loader.settings import LoaderSettings, checked_options
from datastore.threads import in_parallel
from datastore.units import Progress

__all__ = ["Warmed", "warm_cache"]


@dataclass(frozen=True, slots=True)
class Warmed:
    """What was done; sizes in bytes."""

    url: str
    version: int
    cache_dir: str
    local: bool
    """Whether the dataset lies on this machine: then it is read where it lies, and nothing is kept."""

    size_bytes: int
    """Of all blocks that were asked for."""

    there_bytes: int
    """What was there before, and right."""

    written_bytes: int
    left_out_bytes: int
    """What the budget, or the disk, had no room for."""


def warm_cache(
    target: str | os.PathLike[str] | Dataset,
    *,
    options: LoaderSettings,
    blocks: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Warmed:
    """Bring a dataset, or only `blocks` of one of tokens in that order, to `options.cache_dir`, within `cache_bytes`.

    Raises:
        ConfigError: no `cache_dir`, or one that cannot be used; blocks of a dataset of records.
        CorruptError, MissingError, StorageError: a block cannot be fetched, or is damaged.
    """
    options = checked_options(options)
    if not options.cache_dir:
        raise ConfigError("there is no folder to fill", hint="Name one: `cache_dir`.")
    dataset = target if isinstance(target, Dataset) else open_dataset(target)
    root = Path(options.cache_dir).expanduser()
    if is_local(dataset):
        return Warmed(dataset.url, dataset.version, str(root), local=True, **dict.fromkeys(_SIZES, 0))
    disk = DiskTier(root, budget_bytes=options.cache_bytes, uuid=dataset.uuid, url=dataset.url, evicts=False)
    if dataset.kind == "records" and blocks is not None:
        raise ConfigError("only a dataset of tokens has such blocks", url=dataset.url, hint="Bring all of it.")
    works = _of_records(dataset, disk) if dataset.kind == "records" else _of_tokens(dataset, disk, blocks)
    total = sum(work.size_bytes for work in works)
    begun = _until_full(works, disk)
    for done in accumulate(in_parallel(_done, begun, threads=max(1, options.threads))):
        if progress is not None:
            progress(done, total)
    stats = disk.stats()
    left_out = total - stats.disk_hit_bytes - stats.disk_write_bytes if disk.is_full else 0
    there = total - stats.disk_write_bytes - left_out
    sizes = dict(zip(_SIZES, (total, there, stats.disk_write_bytes, left_out), strict=True))
    return Warmed(dataset.url, dataset.version, str(root), local=False, **sizes)


_SIZES = ("size_bytes", "there_bytes", "written_bytes", "left_out_bytes")


@dataclass(frozen=True, slots=True)
class _Work:
    """Some blocks, brought together."""

    size_bytes: int
    run: Callable[[], None]


def _done(work: _Work) -> int:
    work.run()
    return work.size_bytes


def _until_full(works: Sequence[_Work], disk: DiskTier) -> Iterator[_Work]:
    for work in works:
        if disk.is_full:
            return
        yield work


def _of_records(dataset: Dataset, disk: DiskTier) -> list[_Work]:
    batches = CachedBatches(dataset, disk)
    return [
        _Work(span.stop - span.start, partial(_read, batches, shard, batch))
        for shard, info in enumerate(dataset.segments)
        for batch, span in enumerate(info.layout.batches)
    ]


def _read(batches: CachedBatches, shard: int, batch: int) -> None:
    batches.read(shard, batch)


def _of_tokens(dataset: Dataset, disk: DiskTier, wanted: Sequence[int] | None) -> list[_Work]:
    layout = BlockLayout(dataset.segments)
    blocks = list(range(layout.blocks)) if wanted is None else list(wanted)
    run = blocks_of_a_run(layout.largest_bytes)
    works: list[_Work] = []
    at = 0
    while at < len(blocks):
        shard, stop = layout.range_of(blocks[at]).shard, at + 1
        end = layout.of_shard(shard).stop
        while stop < len(blocks) and stop - at < run and blocks[stop] == blocks[stop - 1] + 1 < end:
            stop += 1
        works.append(
            _Work(int(layout.sizes(np.array(blocks[at:stop])).sum()), partial(_bring, dataset, disk, blocks[at:stop]))
        )
        at = stop
    return works


def _bring(dataset: Dataset, disk: DiskTier, blocks: list[int]) -> None:
    layout = BlockLayout(dataset.segments)
    places = [layout.range_of(block) for block in blocks]
    region = Region(dataset.storage, dataset.segments.shard(places[0].shard), disk=disk)
    for filled in region.fill(places):
        region.release(filled.block)
