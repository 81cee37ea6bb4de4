"""The bytes of one shard that lies elsewhere: from the disk under the memory, or fetched, and checked before anyone reads them.

Blocks that lie end to end are fetched by one request. If that fails, or one of them is wrong, it is fetched once more by itself,
and then from other copies of the shard: so an error names the one block that it is about.
"""

import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from datastore.dataset.shards.info import ShardInfo
from datastore.digest import DIGEST_BYTES, digest_bytes
from datastore.errors import MissingError, StorageError
from datastore.loader.cache.blocks import BlockRange, damaged, unreadable
from datastore.loader.cache.disk import DiskTier, block_name
from datastore.storage.base import Storage
from datastore.storage.errors import is_damage
from datastore.storage.verified import has_digest

__all__ = ["Filled", "Region"]

_FETCHES = 2
"""Wrong bytes are fetched once more: the first ones may have been damaged on the way."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A block that is there and right, and what that took."""

    block: BlockRange
    requests: int = 0
    """Requests that were made for it; those of several blocks count for the first of them."""

    refetches: int = 0
    fetched_bytes: int = 0
    """0 if it came from the disk."""


class Region:
    """The bytes of one shard. Blocks are independent: several threads may fill different ones."""

    def __init__(self, storage: Storage, info: ShardInfo, *, disk: DiskTier | None = None) -> None:
        self._storage = storage
        self._info = info
        self._disk = disk
        # Private: pages of a shared map would not go away by MADV_DONTNEED.
        self._map = mmap.mmap(-1, info.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.data = memoryview(self._map).toreadonly()

    def fill(self, blocks: Sequence[BlockRange]) -> Iterator[Filled]:
        """Bring `blocks`, in ascending order; yield each as soon as it is there.

        Raises:
            CorruptError: the bytes of one are wrong each time, or the object is too short.
            MissingError: the object is gone.
            StorageError: the storage failed.
        """
        missing = []
        for block in blocks:
            if self._disk is not None and self._disk.read(
                self._name(block), self._target(block), digest=self._digest(block)
            ):
                yield Filled(block)
            else:
                missing.append(block)
        for stretch in _stretches(missing):
            yield from self._fetch_together(stretch)

    def release(self, block: BlockRange) -> None:
        """Return the memory of a block to the kernel; it reads as zeros from now on."""
        page = mmap.PAGESIZE
        start = -(-block.start // page) * page
        # The rest of the last page is padding. Between blocks, a page that two share must stay.
        last = block.stop == self._info.size_bytes
        stop = -(-block.stop // page) * page if last else block.stop // page * page
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _fetch_together(self, blocks: Sequence[BlockRange]) -> Iterator[Filled]:
        """Fetch blocks that lie end to end, by one request if that is enough."""
        whole = BlockRange(blocks[0].shard, blocks[0].index, blocks[0].start, blocks[-1].stop)
        try:
            self._read(whole)
        except StorageError as error:
            if len(blocks) == 1 or not is_damage(error):
                raise unreadable(error, shard=self._info, block=blocks[0]) from None
            together = False
        else:
            together = True
        for number, block in enumerate(blocks):
            requests = 1 if not number else 0
            fetched = block.stop - block.start
            if not (together and self._is_right(block)):
                refetches = self._fetch_again(block, tried=together)
                yield self._kept(Filled(block, requests + refetches, refetches, fetched * (together + refetches)))
            else:
                yield self._kept(Filled(block, requests, 0, fetched))

    def _fetch_again(self, block: BlockRange, *, tried: bool) -> int:
        """Fetch one block by itself, until it is right; return how many more requests that took."""
        for attempt in range(1, _FETCHES + (not tried)):
            try:
                self._read(block)
            except StorageError as error:
                raise unreadable(error, shard=self._info, block=block) from None
            if self._is_right(block):
                return attempt
        if self._read_copy(block):
            return _FETCHES
        raise damaged("a block does not match its digest", shard=self._info, block=block, fetched=f"{_FETCHES} times")

    def _read(self, block: BlockRange) -> None:
        self._storage.read_into(self._info.path, block.start, self._target(block))

    def _read_copy(self, block: BlockRange) -> bool:
        """Take a block from the first copy that is right, and have the others healed; return whether there is one."""
        copies = self._storage.copies(self._info.path)
        for copy in copies if len(copies) > 1 else ():
            with suppress(MissingError, StorageError):
                copy.read_into(self._info.path, block.start, self._target(block))
                if self._is_right(block):
                    self._storage.heal(self._info.path, has_digest(self._info.digest))
                    return True
        return False

    def _kept(self, filled: Filled) -> Filled:
        if self._disk is not None:
            self._disk.write(self._name(filled.block), self._target(filled.block))
        return filled

    def _is_right(self, block: BlockRange) -> bool:
        return digest_bytes(self._target(block)) == self._digest(block)

    def _target(self, block: BlockRange) -> memoryview:
        return memoryview(self._map)[block.start : block.stop]

    def _digest(self, block: BlockRange) -> bytes:
        at = block.index * DIGEST_BYTES
        return self._info.block_digests[at : at + DIGEST_BYTES]

    def _name(self, block: BlockRange) -> str:
        return block_name(self._info.uid, block.index)


def _stretches(blocks: Sequence[BlockRange]) -> Iterator[list[BlockRange]]:
    """Yield the blocks in groups that lie end to end."""
    group: list[BlockRange] = []
    for block in blocks:
        if group and group[-1].stop != block.start:
            yield group
            group = []
        group.append(block)
    if group:
        yield group
