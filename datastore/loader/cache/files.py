"""Shards on this machine: read where they lie, each block's digest checked before its first use.

The page cache of the kernel is the cache, so ranks of a machine share it, and this takes no memory but a few buffers.

Files are mapped, but nothing here ever looks at a map: where the disk cannot read, or the file was cut, that ends the process
by SIGBUS. The kernel looks instead. Blocks are read by `pread` and checked; the rows of a batch are named to `pwritev`, all
at once, which copies them from the maps to a file in memory and says so if it cannot. Then the shard is damaged like any other.
For 2,049 tokens that takes 0.9 us: a plain copy from a map takes 0.5, a `pread` of each row 1.4 (Linux 6.18, tools/bench/loader).
Rows are named by their addresses, which NumPy adds up for all of them: packed rows are several hundred pieces.

A shard is read from one copy, where there are several: that whose blocks were checked. If it fails, another takes its place,
and is checked from the start.
"""

import ctypes
import mmap
import os
import sys
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.segments import Segments
from datastore.digest import DIGEST_BYTES, digest_of
from datastore.errors import CorruptError, MissingError, StorageError
from datastore.loader.cache.blocks import I64, NOWHERE, ZEROS, BlockRange, TokenBlocks, damaged, unreadable
from datastore.storage.base import Storage
from datastore.storage.verified import has_digest

__all__ = ["Copier", "FileBlocks", "map_ahead"]

_MAX_SHARDS = 32_768
"""Shards mapped at a time; half of what Linux allows a process by default (vm.max_map_count)."""

_ROUNDS = 4
"""How often other copies are tried in one hold, before all are taken for damaged."""

_STEP_BYTES = 2**21
"""What a thread reads, or rows are copied through, at a time: a block of the usual size, which stays in the cache."""

_MAX_ROWS = 1_024
"""Pieces that one `pwritev` takes (IOV_MAX of Linux)."""


@dataclass(frozen=True, slots=True)
class _Home:
    """Where a shard is read from."""

    info: ShardInfo
    storage: Storage
    map: memoryview
    """The file, for the kernel to read; nothing, where there is no map."""

    address: int


class FileBlocks(TokenBlocks):
    """The shards of `segments` in `storage`, all of which are files of this machine. One thread holds, others may fetch."""

    lends = True

    def __init__(self, storage: Storage, segments: Segments, *, max_shards: int = _MAX_SHARDS) -> None:
        super().__init__(storage, segments)
        self._max_shards = max_shards
        self._lock = threading.Lock()
        self._homes: dict[int, _Home] = {}
        # Zeroed memory that nobody touches costs nothing, so this is as large as the part that is read.
        self._checked = np.zeros(self.layout.blocks, np.bool_)
        self._addresses = np.zeros(len(segments) + 1, np.int64)
        """Where the map of each shard begins; 0: there is none. The last is `NOWHERE`."""
        self._addresses[NOWHERE] = np.frombuffer(ZEROS, np.uint8).ctypes.data
        self._gone: list[_Home] = []
        """Given up since blocks were held last: a read may be under way."""
        self._changes = self._held = 0
        """How often a shard failed or went on to another copy: by now, and when blocks were held last."""
        self._buffers = threading.local()
        self._copier = Copier()

    @override
    def hold(self, blocks: I64) -> AbstractContextManager[None]:
        self._gone.clear()
        absent = self.absent(blocks)
        self._hits += len(blocks) - len(absent)
        self._misses += len(absent)
        started = time.perf_counter() if absent.size else 0.0
        for _ in range(_ROUNDS):
            changes = self._changes
            for block in absent.tolist():
                self.fetch(block)
            if self._changes == changes:
                break
            absent = self.absent(blocks)  # What was checked before belonged to another copy.
        else:
            place = self.layout.range_of(int(absent[0]))
            raise damaged("no copy of the shard is whole", shard=self._segments.shard(place.shard), block=place)
        if absent.size:
            self._wait_s += time.perf_counter() - started
        self._held = changes
        return nullcontext()  # Nothing is given back.

    @override
    def absent(self, blocks: I64) -> I64:
        there = self._checked[blocks]
        return blocks[:0] if np.count_nonzero(there) == len(there) else np.unique(blocks[~there])

    @override
    def fetch(self, block: int) -> bool:
        if self._checked[block]:
            return True
        place = self.layout.range_of(block)
        home = self._home(place.shard)
        try:
            self._check(home, place)
        except (CorruptError, MissingError, StorageError):
            copy = self._from_another_copy(home, place)
            if copy is None:
                raise
            home = copy
        if home.map:
            map_ahead(home.address + place.start, place.stop - place.start)
        with self._lock:
            self._fills += 1
            self._filled_bytes += place.stop - place.start
            self._checked[block] = self._homes.get(place.shard) is home
        return True

    @override
    def read(self, shards: I64, starts: I64, sizes: I64) -> npt.NDArray[np.uint8]:
        maps = self._addresses[shards]
        if maps.all():  # None was forgotten since.
            found = self._copier.copy(maps + starts, sizes)
            if found is not None and len(found) == int(sizes.sum()) and self._changes == self._held:
                return found
        places = zip(shards.tolist(), starts.tolist(), sizes.tolist(), strict=True)
        parts = [self._read_carefully(*place) if place[0] >= 0 else ZEROS[: place[2]] for place in places]
        return np.frombuffer(bytearray().join(parts), np.uint8)

    @override
    def close(self) -> None:
        with self._lock:
            self._homes.clear()
            self._addresses[:NOWHERE] = 0
            self._checked = np.zeros(self.layout.blocks, np.bool_)
            self._changes += 1

    def _read_carefully(self, shard: int, start: int, size_bytes: int) -> bytes:
        """Read one row through the storage: what it lies in is checked again if that fails, and read from another copy."""
        blocks = self.layout.of_bytes(shard, start, start + size_bytes)
        for _ in range(_ROUNDS):
            for block in blocks:
                self.fetch(block)
            home = self._home(shard)
            target = bytearray(size_bytes)
            try:
                home.storage.read_into(home.info.path, start, target)
            except (MissingError, StorageError):
                self._forget(shard, home)
                continue
            if self._checked[blocks.start : blocks.stop].all() and self._home(shard) is home:
                return bytes(target)
        place = self.layout.range_of(blocks.start)
        raise damaged("a block cannot be read again", shard=self._segments.shard(shard), block=place)

    def _check(self, home: _Home, place: BlockRange) -> None:
        """Read a block and compare its digest."""
        try:
            digest = digest_of(self._pieces(home, place))
        except StorageError as error:
            raise unreadable(error, shard=home.info, block=place) from None
        at = place.index * DIGEST_BYTES
        if digest != home.info.block_digests[at : at + DIGEST_BYTES]:
            raise damaged("a block does not match its digest", shard=home.info, block=place)

    def _pieces(self, home: _Home, place: BlockRange) -> Iterator[memoryview]:
        """Yield the bytes of a block in order; each piece overwrites the one before, and the last one of this thread."""
        buffer: memoryview | None = getattr(self._buffers, "data", None)
        if buffer is None:
            buffer = self._buffers.data = memoryview(bytearray(_STEP_BYTES))
        for at in range(place.start, place.stop, _STEP_BYTES):
            piece = buffer[: min(_STEP_BYTES, place.stop - at)]
            home.storage.read_into(home.info.path, at, piece)
            yield piece

    def _home(self, shard: int) -> _Home:
        with self._lock:
            found = self._homes.get(shard)
            if found is None:
                # First in, first out: a lane stays on a shard for much longer than it takes to open a few thousand.
                while len(self._homes) >= self._max_shards:
                    self._uncheck(next(iter(self._homes)))
                    self._evictions += 1
                found = self._first_home(self._segments.shard(shard))
                self._go_home(shard, found)
            return found

    def _go_home(self, shard: int, home: _Home) -> None:
        self._homes[shard] = home
        self._addresses[shard] = home.address

    def _first_home(self, info: ShardInfo) -> _Home:
        homes = (_home(info, copy) for copy in self._storage.copies(info.path))
        first = next(homes)
        return first if first.map else next((home for home in homes if home.map), first)

    def _from_another_copy(self, home: _Home, place: BlockRange) -> _Home | None:
        """Go on with another copy of the shard, in which the block is right, and return it; None if there is none."""
        copies = self._storage.copies(home.info.path)
        for copy in copies if len(copies) > 1 else ():
            found = _home(home.info, copy)
            try:
                self._check(found, place)
            except (CorruptError, MissingError, StorageError):
                continue
            with self._lock:
                self._uncheck(place.shard)
                self._go_home(place.shard, found)
                self._changes += 1
            self._storage.heal(home.info.path, has_digest(home.info.digest))
            return found
        return None

    def _forget(self, shard: int, home: _Home) -> None:
        """Trust nothing of what was checked of a shard, unless it has gone on to another copy."""
        with self._lock:
            if self._homes.get(shard) is home:
                self._uncheck(shard)
                self._changes += 1

    def _uncheck(self, shard: int) -> None:
        gone = self._homes.pop(shard, None)
        if gone is not None:
            self._gone.append(gone)
        self._addresses[shard] = 0
        blocks = self.layout.of_shard(shard)
        self._checked[blocks.start : blocks.stop] = False


def _home(info: ShardInfo, storage: Storage) -> _Home:
    path = storage.local_path(info.path)
    found, address = memoryview(b""), 0
    with suppress(OSError):  # Reading it says what is wrong.
        if path is not None:
            # Arrow maps the file and lets go of the descriptor; `mmap.mmap` would keep one per map.
            with pa.memory_map(str(path)) as file:
                buffer = file.read_buffer()
                if buffer.size >= info.size_bytes:  # Nobody looks behind the end of it.
                    found, address = memoryview(buffer).cast("B"), buffer.address
    return _Home(info, storage, found, address)


def map_ahead(address: int, size_bytes: int) -> None:
    """Enter pages of a map into the page table at once: 45 ms for a GB, where faults one by one take twice as long."""
    aligned = address - address % mmap.PAGESIZE
    if _MADVISE is not None:
        _MADVISE(ctypes.c_void_p(aligned), ctypes.c_size_t(address + size_bytes - aligned), _POPULATE_READ)


_IS_LINUX = sys.platform == "linux" and sys.maxsize > 2**32

_MADVISE = ctypes.CDLL(None).madvise if _IS_LINUX else None

_PWRITEV = ctypes.CDLL(None).pwritev if _IS_LINUX else None
if _PWRITEV is not None:
    _PWRITEV.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
    _PWRITEV.restype = ctypes.c_ssize_t

_POPULATE_READ = 22
"""MADV_POPULATE_READ: it says what cannot be read. Kernels before Linux 5.14 refuse, and pages come one by one."""


_VECTOR_BYTES = 16
"""What `pwritev` wants to know of a piece: its address and its size."""

_HERE = threading.local()


class Copier:
    """Joins pieces of maps without looking at them: the kernel writes them to a file in memory."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._view = np.empty(0, np.uint8)
        self._vector = np.empty((_MAX_ROWS, 2), np.int64)
        """Address and size of each piece."""

    @staticmethod
    def of_thread() -> "Copier":
        """Return the one of this thread: no two may write to one file."""
        found = getattr(_HERE, "copier", None)
        if found is None or _HERE.pid != os.getpid():  # A fork shares the file.
            found, _HERE.pid = Copier(), os.getpid()
            _HERE.copier = found
        return found

    def join(self, pieces: Sequence[memoryview]) -> npt.NDArray[np.uint8] | None:
        """Return the pieces end to end, until the next call; less, or None, if the kernel cannot read them."""

        def write(file: int, first: int, stop: int) -> int:
            return os.pwritev(file, pieces[first:stop], 0)

        return self._written(list(accumulate(map(len, pieces))), write)

    def copy(self, addresses: I64, sizes: I64) -> npt.NDArray[np.uint8] | None:
        """Return what lies at some addresses end to end, as `join`."""
        if _PWRITEV is None:
            return None
        count = len(addresses)
        if count > len(self._vector):
            self._vector = np.empty((count, 2), np.int64)
        self._vector[:count, 0], self._vector[:count, 1] = addresses, sizes
        begin = self._vector.ctypes.data

        def write(file: int, first: int, stop: int) -> int:
            return int(_PWRITEV(file, begin + first * _VECTOR_BYTES, stop - first, 0))

        return self._written(np.cumsum(sizes), write)

    def _written(
        self, ends: Sequence[int] | I64, write: Callable[[int, int, int], int]
    ) -> npt.NDArray[np.uint8] | None:
        """Return all pieces, which end at `ends`; `write` copies those from one to before another to a file."""
        if not len(ends):
            return self._view[:0]
        total = int(ends[-1])
        try:
            if len(ends) <= _MAX_ROWS and total <= _STEP_BYTES:
                count = write(self._room_for(total), 0, len(ends))
                return None if count < 0 else self._view[:count]
            joined = np.empty(total, np.uint8)
            at = first = 0
            while first < len(ends):
                last = min(first + _MAX_ROWS, len(ends))
                stop = max(first + 1, bisect_right(ends, at + _STEP_BYTES, first, last))
                end = int(ends[stop - 1])
                count = write(self._room_for(end - at), first, stop)
                if count < 0:
                    return None
                joined[at : at + count] = self._view[:count]
                if at + count < end:
                    return joined[: at + count]
                at, first = end, stop
        except (OSError, AttributeError):  # No such files on this system; or a page that is not there.
            return None
        return joined

    def _room_for(self, size_bytes: int) -> int:
        if self._file is None:
            self._file = os.memfd_create("datastore-rows")
            weakref.finalize(self, os.close, self._file)
        if len(self._view) < size_bytes:
            os.ftruncate(self._file, size_bytes)
            self._view = np.frombuffer(mmap.mmap(self._file, size_bytes), np.uint8)
        return self._file
