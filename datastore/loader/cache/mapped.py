"""Shards on this machine: mapped into memory, each block's digest checked when it is first touched.

The page cache of the kernel is the cache, so nothing is copied and ranks of a machine share it. The price of a check
is one pass over the bytes (25 GB/s) per process, in which the pages get mapped, too. A map holds no file descriptor;
the number of maps is bounded, since a kernel allows some 65,000 of them per process.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from typing_extensions import override

from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.segments import Segments
from datastore.digest import DIGEST_BYTES, digest_bytes
from datastore.errors import CorruptError, MissingError, StorageError
from datastore.loader.cache.blocks import I64, BlockRange, TokenBlocks, damaged
from datastore.storage.base import Storage
from datastore.storage.verified import has_digest

__all__ = ["MAX_MAPS", "MappedBlocks"]

MAX_MAPS = 32_768
"""Maps kept; half of what Linux allows a process by default (vm.max_map_count)."""

_ROUNDS = 4
"""How often other copies are mapped in one hold, before all are taken for damaged."""


@dataclass(frozen=True, slots=True)
class _Map:
    info: ShardInfo
    data: memoryview
    """The whole file; shorter than `info` says if it was cut."""

    tokens: memoryview


class MappedBlocks(TokenBlocks):
    """The shards of `segments` in `storage`, all of which are files of this machine."""

    def __init__(self, storage: Storage, segments: Segments, *, max_maps: int = MAX_MAPS) -> None:
        super().__init__(storage, segments)
        self._max_maps = max_maps
        self._lock = threading.Lock()
        self._maps: dict[int, _Map] = {}
        # Zeroed memory that nobody touches costs nothing, so this is as large as the part that is read.
        self._checked = np.zeros(self.layout.blocks, np.bool_)
        self._changes = 0
        """How often another copy of a shard was mapped in place of one that is damaged."""

    @override
    @contextmanager
    def hold(self, blocks: I64) -> Iterator[None]:
        absent = self.absent(blocks)
        self._hits += len(blocks) - len(absent)
        for _ in range(_ROUNDS):
            changes = self._changes
            for block in absent.tolist():
                self.fetch(block)
            if self._changes == changes:
                break
            absent = self.absent(blocks)  # Another copy of a shard was mapped, and is to be checked from the start.
        else:
            place = self.layout.range_of(int(absent[0]))
            raise damaged("no copy of the shard is whole", shard=self._segments.shard(place.shard), block=place)
        yield  # Nothing is given back: a map that is dropped lives on in the views that were handed out.

    @override
    def absent(self, blocks: I64) -> I64:
        there = self._checked[blocks]
        return blocks[:0] if there.all() else np.unique(blocks[~there])

    @override
    def fetch(self, block: int) -> bool:
        if self._checked[block]:
            return True
        place = self.layout.range_of(block)
        shard = self._map(place.shard)
        try:
            data = _checked(shard, place)
        except CorruptError:
            copy = self._from_another_copy(shard.info, place)
            if copy is None:
                raise
            data = copy
        with self._lock:
            self._fills += 1
            self._filled_bytes += len(data)
            self._checked[block] = place.shard in self._maps
        return True

    @override
    def tokens(self, shard: int) -> memoryview:
        found = self._maps.get(shard)
        return found.tokens if found is not None else self._map(shard).tokens

    @override
    def data(self, shard: int) -> memoryview:
        found = self._maps.get(shard)
        return (found if found is not None else self._map(shard)).data

    @override
    def close(self) -> None:
        with self._lock:
            self._maps.clear()
            self._checked = np.zeros(self.layout.blocks, np.bool_)

    def _from_another_copy(self, info: ShardInfo, place: BlockRange) -> memoryview | None:
        """Map another copy of the shard, in which the block is right, and return it; None if there is none."""
        copies = self._storage.copies(info.path)
        for copy in copies if len(copies) > 1 else ():
            try:
                found = _open(copy, info)
                data = _checked(found, place)
            except (CorruptError, MissingError, StorageError):
                continue
            with self._lock:
                self._maps[place.shard] = found
                blocks = self.layout.of_shard(place.shard)
                self._checked[blocks.start : blocks.stop] = False
                self._changes += 1
            self._storage.heal(info.path, has_digest(info.digest))
            return data
        return None

    def _map(self, shard: int) -> _Map:
        with self._lock:
            found = self._maps.get(shard)
            if found is None:
                # First in, first out: a lane stays on a shard for much longer than it takes to open a few thousand.
                while len(self._maps) >= self._max_maps:
                    oldest = next(iter(self._maps))
                    del self._maps[oldest]
                    self._evictions += 1
                    blocks = self.layout.of_shard(oldest)
                    self._checked[blocks.start : blocks.stop] = False
                found = self._maps[shard] = _open(self._storage, self._segments.shard(shard))
            return found


def _checked(shard: _Map, place: BlockRange) -> memoryview:
    """Return a block of `shard` that has its digest."""
    data = shard.data[place.start : place.stop]
    if len(data) < place.stop - place.start:
        raise damaged("the shard's file is cut short", shard=shard.info, block=place, size_bytes=len(shard.data))
    at = place.index * DIGEST_BYTES
    if digest_bytes(data) != shard.info.block_digests[at : at + DIGEST_BYTES]:
        raise damaged("a block does not match its digest", shard=shard.info, block=place)
    return data


def _open(storage: Storage, info: ShardInfo) -> _Map:
    path = storage.local_path(info.path)
    if path is None:
        storage.stat(info.path)  # Says that it is missing, in the backend's words.
        raise MissingError("the shard is not a file", shard=info.path, hint="Restore this file from a copy.")
    try:
        # Arrow maps the file and lets go of the descriptor; `mmap.mmap` would keep one per map.
        with pa.memory_map(str(path)) as file:
            data = memoryview(file.read_buffer()).cast("B")
    except OSError as error:
        if not path.stat().st_size:
            data = memoryview(b"")  # An empty file cannot be mapped; its blocks are missed when they are touched.
        else:
            raise StorageError(
                "the shard cannot be mapped", shard=info.path, reason=str(error), hint="Check its owner and mode."
            ) from None
    itemsize = np.dtype(info.dtype).itemsize
    stop = min(info.tokens, max(0, len(data) - info.values_start) // itemsize) * itemsize + info.values_start
    return _Map(info, data, data[info.values_start : stop].cast("H" if itemsize == 2 else "I"))
