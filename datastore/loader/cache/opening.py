"""From a dataset to its blocks: files of this machine where they lie, others through memory, and perhaps a disk under it."""

import warnings
from pathlib import Path

from datastore.dataset.shards.segments import Segments
from datastore.dataset.snapshot import Dataset
from datastore.loader.cache.blocks import BlockLayout, TokenBlocks
from datastore.loader.cache.disk import DiskTier
from datastore.loader.cache.files import FileBlocks
from datastore.loader.cache.memory import BlockCache, Disks
from datastore.loader.settings import LoaderSettings
from datastore.storage.base import Storage
from datastore.units import format_bytes

__all__ = ["is_local", "open_blocks", "open_disk", "warn_if_memory_is_short"]


def is_local(dataset: Dataset) -> bool:
    """Return whether the shards are files of this machine."""
    segments = dataset.segments
    return bool(len(segments)) and dataset.storage.local_path(segments.shard(0).path) is not None


def open_blocks(
    storage: Storage, segments: Segments, *, local: bool, options: LoaderSettings, disks: Disks = ()
) -> TokenBlocks:
    """Return the blocks of `segments`, under the bounds that `options` set for shards that are not on this machine.

    `disks` says from which shard on which disk is under the memory.
    """
    if local:
        return FileBlocks(storage, segments)
    return BlockCache(storage, segments, budget_bytes=options.memory_bytes, disks=disks, timeout_s=options.timeout_s)


def open_disk(dataset: Dataset, *, options: LoaderSettings) -> DiskTier | None:
    """Return the disk under the memory; None if there is none, or nothing to keep there.

    Raises:
        ConfigError: `cache_dir` cannot be used.
    """
    if not options.cache_dir or is_local(dataset):
        return None
    root = Path(options.cache_dir).expanduser()
    return DiskTier(root, budget_bytes=options.cache_bytes, uuid=dataset.uuid, url=dataset.url)


def warn_if_memory_is_short(layout: BlockLayout, options: LoaderSettings, *, stretches: int, lanes: int) -> None:
    """Tell of a budget that has no room for one block of each of the `stretches` that a rank's `lanes` read at once."""
    memory_bytes = options.memory_bytes
    needed = min(stretches * layout.largest_bytes, layout.total_bytes)
    if needed > memory_bytes:
        warnings.warn(
            f"memory_bytes ({format_bytes(memory_bytes)}) cannot hold one block of each of this rank's "
            f"{lanes} lanes ({format_bytes(needed)}): blocks will be fetched again and again. "
            "Raise memory_bytes, use more ranks, or start with fewer lanes.",
            RuntimeWarning,
            stacklevel=6,
        )
