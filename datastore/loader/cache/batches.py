"""Batches of record shards that lie elsewhere, kept on the disk of a cache: each is fetched once for all ranks and runs of a machine.

A dataset reads a batch by one range of its storage. Here a storage stands in between that knows which batch is about to be read,
and what its digest is: so it looks on the disk first, and keeps what was fetched and is right. What else is read of a shard, its
frame of a few kilobytes, is fetched by each process.
"""

from collections.abc import Sequence

import pyarrow as pa
from typing_extensions import Buffer, override

from datastore.dataset.shards.batches import BatchReader
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.snapshot import Dataset
from datastore.digest import digest_bytes
from datastore.loader.cache.disk import DiskTier, batch_name
from datastore.storage.base import Storage
from datastore.storage.wrappers import WrappedStorage

__all__ = ["CachedBatches"]


class CachedBatches:
    """The batches of `dataset`, through `disk`. Thread-safe."""

    def __init__(self, dataset: Dataset, disk: DiskTier) -> None:
        self.disk = disk
        self._segments = dataset.segments
        self._storage = _ThroughDisk(dataset.storage, disk)
        self._reader = BatchReader(self._storage, dataset.segments, schema=dataset.schema)

    def read(self, shard: int, batch: int, *, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Return one batch of a shard, deleted rows too; as `Dataset.read_batch`, with its errors."""
        self._storage.expect(self._segments.shard(shard), batch)
        return self._reader.read(shard, batch, columns=columns)


class _ThroughDisk(WrappedStorage):
    """A storage that reads batches from the disk of a cache, where it has them, and puts them there."""

    def __init__(self, inner: Storage, disk: DiskTier) -> None:
        super().__init__(inner)
        self._disk = disk
        self._expected: dict[tuple[str, int], tuple[str, bytes]] = {}
        """By file and first byte: what a batch is called on the disk, and its digest."""

    def expect(self, info: ShardInfo, batch: int) -> None:
        """Know the batch, should it be read next."""
        span = info.layout.batches[batch]
        self._expected[info.path, span.start] = batch_name(info.uid, batch), span.digest

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        expected = self._expected.pop((key, start), None)
        if expected is None:
            super().read_into(key, start, target)
            return
        name, digest = expected
        view = memoryview(target).cast("B")
        if self._disk.read(name, view, digest=digest):
            return
        super().read_into(key, start, target)
        if digest_bytes(view) == digest:
            self._disk.write(name, view)
