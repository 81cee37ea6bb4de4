"""The bytes of parts: those of this machine, on its disks or in this process, are read each time they are needed, remote objects are fetched once.

Nothing is mapped. A bad sector under a mapping, or a file that is cut while it is mapped, ends the process with SIGBUS,
at whatever moment the page is touched; a read reports it. And a read goes through the storage like any other, which may
have another copy. The price is a copy: to verify 1 GiB takes 50-70 ms instead of 38 (1-2 threads, warm, Linux 6.18, ext4,
chunks of 4 MiB, xxh3_128), of a restore of some 150.
"""

import threading
from collections.abc import Sequence

import numpy as np
import xxhash

from datastore.checkpoint.codec import with_codec
from datastore.checkpoint.format.manifest import Chunk, runs_of
from datastore.checkpoint.steps import reading
from datastore.checkpoint.tensors import Bytes
from datastore.storage.base import Storage
from datastore.threads import each

__all__ = ["Sources"]

_FETCH_BYTES = 16 * 2**20
"""Remote chunks that lie side by side are fetched together up to this size: a request costs some 50 ms."""

_FETCH_THREADS = 16

_STEP_BYTES = 4 * 2**20
"""What is read before it is hashed: a file is opened for each, and 256 KiB at a time take a third longer."""


class Sources:
    """Hands out the bytes of chunks of the parts in `storage`. Thread-safe."""

    def __init__(self, storage: Storage) -> None:
        self._storage = with_codec(storage)
        self._lock = threading.Lock()
        self._near: dict[str, bool] = {}
        self._fetched: dict[tuple[str, int], Bytes] = {}
        self._scratch = threading.local()

    def fetch(self, chunks: Sequence[Chunk]) -> None:
        """Bring the remote ones of `chunks` (sorted) into memory; local ones are read when they are asked for.

        Raises:
            CorruptError: a part is too short or cannot be read there.
            MissingError: a part is gone.
            StorageError: the storage failed.
        """
        runs = [run for run in runs_of(chunks, _FETCH_BYTES) if not self._is_near(run[0].part)]
        each(self._fetch_run, runs, threads=_FETCH_THREADS)

    def check(self, chunks: Sequence[Chunk]) -> None:
        """Raise unless `chunks` are as they were written; what lies side by side is read together.

        Raises:
            CorruptError: one is not, or cannot be read.
        """
        for run in runs_of(chunks, _STEP_BYTES):
            if len(run) == 1 and self._is_near(run[0].part):
                run[0].compare(self._digest(run[0]))
            else:
                start = run[0].start
                data = self._read_run(run) if self._is_near(run[0].part) else self.range_of(run)
                for chunk in run:
                    chunk.check(data[chunk.start - start : chunk.stop - start].data)

    def _digest(self, chunk: Chunk) -> str:
        """Return the digest of a chunk of any size, in memory of bounded size."""
        digest = xxhash.xxh3_128()
        for start in range(chunk.start, chunk.stop, _STEP_BYTES):
            data = self._buffer(min(_STEP_BYTES, chunk.stop - start))
            self._read(chunk.part, start, data)
            digest.update(data.data)
        return digest.hexdigest()

    def _read_run(self, run: Sequence[Chunk]) -> Bytes:
        data = self._buffer(run[-1].stop - run[0].start)
        self._read(run[0].part, run[0].start, data)
        return data

    def range_of(self, chunks: Sequence[Chunk]) -> Bytes:
        """Return the bytes of `chunks`, which follow one another in one part, not verified; not to be written to."""
        first, last = chunks[0], chunks[-1]
        if self._is_near(first.part):
            data = np.empty(last.stop - first.start, dtype=np.uint8)
            self._read(first.part, first.start, data)
            return data
        pieces = [self._fetched[chunk.part, chunk.start] for chunk in chunks]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def copy(self, chunk: Chunk, target: Bytes) -> None:
        """Fill `target` with the bytes of `chunk` and check what has arrived there.

        Raises:
            CorruptError: the bytes are not those that were written, or cannot be read; `target` is overwritten.
        """
        if not self._is_near(chunk.part):
            np.copyto(target, self._fetched[chunk.part, chunk.start])
            chunk.check(target.data)
            return
        digest = xxhash.xxh3_128()
        for at in range(0, len(target), _STEP_BYTES):
            step = target[at : at + _STEP_BYTES]
            self._read(chunk.part, chunk.start + at, step)
            digest.update(step.data)
        chunk.compare(digest.hexdigest())

    def _read(self, part: str, start: int, target: Bytes) -> None:
        with reading(part, start, start + len(target)):
            self._storage.read_into(part, start, target.data)

    def _buffer(self, size_bytes: int) -> Bytes:
        """Return memory of this thread, used again by its next call."""
        held: Bytes | None = getattr(self._scratch, "data", None)
        if held is None or len(held) < size_bytes:
            held = self._scratch.data = np.empty(size_bytes, dtype=np.uint8)
        return held[:size_bytes]

    def _is_near(self, part: str) -> bool:
        with self._lock:
            if part not in self._near:
                in_memory = self._storage.url.startswith("memory://")
                self._near[part] = in_memory or self._storage.local_path(part) is not None
            return self._near[part]

    def _fetch_run(self, run: Sequence[Chunk]) -> None:
        start = run[0].start
        data = np.empty(run[-1].stop - start, dtype=np.uint8)
        self._read(run[0].part, start, data)
        for chunk in run:
            self._fetched[chunk.part, chunk.start] = data[chunk.start - start : chunk.stop - start]
