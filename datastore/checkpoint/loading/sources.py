"""The bytes of parts: local files are mapped to be looked at and read to be copied, remote objects are fetched once.

Mapping spares a copy: hashing mapped pages takes 49 ms of CPU per GB, reading them first and hashing then 100. To copy,
`preadv` is faster by a tenth (two cores, Linux 6.18, ext4). The danger of mapping is that a bad sector or a truncated
file kills the process with SIGBUS at the first touch; so pages are brought in by `madvise`, which reports an error
instead, before anybody looks at them.
"""

import errno
import mmap
import os
import threading
import weakref
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import xxhash

from datastore.checkpoint.format.manifest import Chunk
from datastore.checkpoint.tensors import Bytes
from datastore.errors import CorruptError, MissingError
from datastore.storage.base import Storage
from datastore.threads import each

__all__ = ["Sources"]

_FETCH_BYTES = 16 * 2**20
"""Remote chunks that lie side by side are fetched together up to this size: a request costs some 50 ms."""

_FETCH_THREADS = 16

_STEP_BYTES = 2**20
"""What is copied before it is hashed; it fits a core's second cache."""

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14: map pages in and report what goes wrong. Source: madvise(2)."""


class Sources:
    """Hands out the bytes of chunks of the parts in `storage`. Thread-safe."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._lock = threading.Lock()
        self._maps: dict[str, _Mapped | None] = {}
        self._fetched: dict[tuple[str, int], Bytes] = {}

    def fetch(self, chunks: Sequence[Chunk]) -> None:
        """Bring the remote ones of `chunks` (sorted) into memory; local ones are mapped when they are asked for."""
        runs = [run for run in _runs(chunks) if self._map_of(run[0].part) is None]
        each(self._fetch_run, runs, threads=_FETCH_THREADS)

    def bytes_of(self, chunk: Chunk) -> Bytes:
        """Return the bytes of `chunk`, not verified; not to be written to.

        Raises:
            CorruptError: the part is missing, too short or cannot be read there.
            StorageError: the storage failed.
        """
        return self.range_of([chunk])

    def range_of(self, chunks: Sequence[Chunk]) -> Bytes:
        """Return the bytes of `chunks`, which follow one another in one part."""
        first, last = chunks[0], chunks[-1]
        mapped = self._map_of(first.part)
        if mapped is not None:
            return mapped.range(first.start, last.stop)
        pieces = [self._fetched[chunk.part, chunk.start] for chunk in chunks]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def copy(self, chunk: Chunk, target: Bytes) -> None:
        """Fill `target` with the bytes of `chunk` and check what has arrived there.

        Raises:
            CorruptError: the bytes are not those that were written, or cannot be read; `target` is overwritten.
        """
        mapped = self._map_of(chunk.part)
        if mapped is None:
            np.copyto(target, self._fetched[chunk.part, chunk.start])
            chunk.check(target.data)
        else:
            chunk.compare(mapped.read(chunk.start, target))

    def _map_of(self, part: str) -> "_Mapped | None":
        with self._lock:
            if part not in self._maps:
                path = self._storage.local_path(part)
                self._maps[part] = None if path is None else _Mapped(part, os.fspath(path))
            return self._maps[part]

    def _fetch_run(self, run: Sequence[Chunk]) -> None:
        start = run[0].start
        data = np.empty(run[-1].stop - start, dtype=np.uint8)
        self._storage.read_into(run[0].part, start, data.data)
        for chunk in run:
            self._fetched[chunk.part, chunk.start] = data[chunk.start - start : chunk.stop - start]


class _Mapped:
    """A local file in memory. A private mapping: nothing that is done to it can reach the file."""

    def __init__(self, part: str, path: str) -> None:
        self._part = part
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingError("no such key", key=part, hint="Check the URL and the name.") from None
        weakref.finalize(self, os.close, fd)
        self._fd = fd
        try:
            self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
        except ValueError:  # What Python says of an empty file.
            raise self._unreadable(0, 0, "the file is empty") from None
        self._bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)

    def range(self, start: int, stop: int) -> Bytes:
        """Return the bytes, which are in memory now."""
        if stop > len(self._bytes):
            raise self._unreadable(start, stop, "the file ends before")
        floor = start // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(_POPULATE_READ, floor, stop - floor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # An older kernel has no such advice.
                raise self._unreadable(start, stop, os.strerror(error.errno or 0)) from None
        return self._bytes[start:stop]

    def read(self, start: int, target: Bytes) -> str:
        """Fill `target` with the bytes from `start` on; return their digest, taken while they are in the cache."""
        digest = xxhash.xxh3_128()
        for at in range(0, len(target), _STEP_BYTES):
            step = target[at : at + _STEP_BYTES]
            self._fill(start + at, step)
            digest.update(step.data)
        return digest.hexdigest()

    def _fill(self, start: int, rest: Bytes) -> None:
        while len(rest):
            try:
                count = os.preadv(self._fd, [rest.data], start)
            except OSError as error:
                raise self._unreadable(start, start + len(rest), os.strerror(error.errno or 0)) from None
            if not count:
                raise self._unreadable(start, start + len(rest), "the file ends before")
            start, rest = start + count, rest[count:]

    def _unreadable(self, start: int, stop: int, reason: str) -> CorruptError:
        hint = "Check the disk; restore this part from a copy, or use an earlier step."
        return CorruptError(f"a part cannot be read: {reason}", part=self._part, start=start, stop=stop, hint=hint)


def _runs(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Return neighbouring chunks together, up to the size of one request."""
    runs: list[list[Chunk]] = []
    for _, group in groupby(chunks, key=lambda chunk: chunk.part):
        run: list[Chunk] = []
        for chunk in group:
            if not run or chunk.start != run[-1].stop or chunk.stop - run[0].start > _FETCH_BYTES:
                run = []
                runs.append(run)
            run.append(chunk)
    return runs
