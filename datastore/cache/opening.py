"""Which cache a dataset gets: a map where its shards are files of this machine, memory with a budget where not."""

from datastore.dataset.snapshot import Dataset
from datastore.loader.cache.blocks import TokenBlocks
from datastore.loader.cache.mapped import MappedBlocks
from datastore.loader.cache.memory import BlockCache

__all__ = ["is_local", "open_blocks"]


def is_local(dataset: Dataset) -> bool:
    """Return whether the shards can be mapped."""
    segments = dataset.segments
    return bool(len(segments)) and dataset.storage.local_path(segments.shard(0).path) is not None


def open_blocks(dataset: Dataset, *, budget_bytes: int) -> TokenBlocks:
    """Return the blocks of `dataset`; `budget_bytes` bounds the memory for shards that are not on this machine."""
    if is_local(dataset):
        return MappedBlocks(dataset.storage, dataset.segments)
    return BlockCache(dataset.storage, dataset.segments, budget_bytes=budget_bytes)
