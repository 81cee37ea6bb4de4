"""One remote shard's place in memory: an anonymous map as large as its file, filled block by block."""

import mmap
from contextlib import suppress

import numpy as np

from datastore.cache.layout import BlockRange
from datastore.dataset.shards.segment_file import ShardInfo
from datastore.digest import DIGEST_BYTES, digest_bytes
from datastore.errors import MissingError, StorageError
from datastore.loader.cache.blocks import damaged
from datastore.storage.base import Storage
from datastore.storage.verified import has_digest

__all__ = ["Region"]

_FETCHES = 2
"""Wrong bytes are fetched once more: the first ones may have been damaged on the way."""


class Region:
    """The bytes of one shard. Blocks are independent: several threads may fill different ones."""

    def __init__(self, storage: Storage, info: ShardInfo) -> None:
        self._storage = storage
        self._info = info
        # Private: pages of a shared map would not go away by MADV_DONTNEED.
        self._map = mmap.mmap(-1, info.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data = memoryview(self._map).toreadonly()
        itemsize = np.dtype(info.dtype).itemsize
        values = self.data[info.values_start : info.values_start + info.tokens * itemsize]
        self.tokens = values.cast("H" if itemsize == 2 else "I")

    def fill(self, block: BlockRange) -> int:
        """Fetch a block and check it; return how many times it had to be fetched again.

        Raises:
            CorruptError: its bytes are wrong each time, or the object is too short.
            MissingError: the object is gone.
            StorageError: the storage failed.
        """
        at = block.index * DIGEST_BYTES
        wanted = self._info.block_digests[at : at + DIGEST_BYTES]
        target = memoryview(self._map)[block.start : block.stop]
        for attempt in range(_FETCHES):
            self._read(block, target)
            if digest_bytes(target) == wanted:
                return attempt
        if self._read_copy(block, target, wanted):
            return _FETCHES
        raise damaged("a block does not match its digest", shard=self._info, block=block, fetched=f"{_FETCHES} times")

    def release(self, block: BlockRange) -> None:
        """Return the memory of a block to the kernel; it reads as zeros from now on."""
        page = mmap.PAGESIZE
        start = -(-block.start // page) * page
        # The rest of the last page is padding. Between blocks, a page that two share must stay.
        last = block.stop == self._info.size_bytes
        stop = -(-block.stop // page) * page if last else block.stop // page * page
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _read(self, block: BlockRange, target: memoryview) -> None:
        try:
            self._storage.read_into(self._info.path, block.start, target)
        except StorageError:
            found = self._storage.stat(self._info.path).size_bytes
            if found < block.stop:
                raise damaged(
                    "the shard's file is cut short", shard=self._info, block=block, size_bytes=found
                ) from None
            raise

    def _read_copy(self, block: BlockRange, target: memoryview, wanted: bytes) -> bool:
        """Fill `target` from the first copy that is right, and have the others healed; return whether there is one."""
        copies = self._storage.copies(self._info.path)
        for copy in copies if len(copies) > 1 else ():
            with suppress(MissingError, StorageError):
                copy.read_into(self._info.path, block.start, target)
                if digest_bytes(target) == wanted:
                    self._storage.heal(self._info.path, has_digest(self._info.digest))
                    return True
        return False
