"""The file of samples that MDS and LitData share: a count, the place of each sample, and the samples end to end.

    uint32 samples | uint32 offsets[samples + 1], from the start of the file | (MDS: a JSON header) | samples

All little-endian. It is read in pieces of some megabytes, whatever its size.
"""

import bz2
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import zstandard
from typing_extensions import Buffer

from datastore.errors import ConfigError, CorruptError
from datastore.interop.cells import Cell
from datastore.storage.base import Storage

__all__ = ["MAX_FILE_BYTES", "PackedFile", "SampleShards", "pack", "pack_cells", "unpack_cells"]

MAX_FILE_BYTES = 2**32 - 1
"""What 32-bit offsets can reach."""

_PIECE_BYTES = 8 * 2**20

_UINT32 = np.dtype("<u4")


def pack(samples: Sequence[Cell], *, header: bytes = b"") -> list[Buffer]:
    """Return the file of `samples`, in parts to be laid end to end."""
    sizes = np.fromiter(map(len, samples), np.int64, len(samples))
    offsets = np.full(len(samples) + 1, 4 + 4 * (len(samples) + 1) + len(header), np.int64)
    offsets[1:] += np.cumsum(sizes)
    assert offsets[-1] <= MAX_FILE_BYTES, "shards are cut far below"
    count = np.array([len(samples)], _UINT32)
    return [count.tobytes(), offsets.astype(_UINT32).tobytes(), header, b"".join(samples)]


class PackedFile:
    """One such file in a storage, opened: its head is read and checked."""

    def __init__(self, storage: Storage, key: str, *, codec: str = "", raw_bytes: int = MAX_FILE_BYTES) -> None:
        """Open `key`; if it is compressed by `codec`, it is read as a whole and must not exceed `raw_bytes`.

        Raises:
            CorruptError: the file is not of this form, or ends too early.
            ConfigError: the compression is not supported.
        """
        self.key = key
        self._storage = storage
        self._raw = _decompressed(storage.get(key), codec, raw_bytes, key) if codec else None
        self.size_bytes = len(self._raw) if self._raw is not None else storage.stat(key).size_bytes
        if self.size_bytes < 8:
            raise self.damaged("it ends too early")
        self.samples = int(np.frombuffer(self.read(0, 4), _UINT32)[0])
        self.head_bytes = 8 + 4 * self.samples
        if self.head_bytes > self.size_bytes:
            raise self.damaged("it ends within its offsets")
        self.offsets = np.frombuffer(self.read(4, self.head_bytes), _UINT32).astype(np.int64)
        if (np.diff(self.offsets) < 0).any() or self.offsets[0] < self.head_bytes or self.offsets[-1] > self.size_bytes:
            raise self.damaged("its offsets lead outside")

    def header(self) -> bytes:
        """Return what lies between the offsets and the first sample."""
        return bytes(self.read(self.head_bytes, int(self.offsets[0])))

    def read(self, start: int, stop: int) -> memoryview:
        """Return bytes `[start, stop)` of the file."""
        if self._raw is not None:
            return memoryview(self._raw)[start:stop]
        return memoryview(self._storage.get_ranges(self.key, [(start, stop)])[0])

    def pieces(self) -> Iterator[tuple[int, list[memoryview]]]:
        """Yield the samples in order, some megabytes at a time, each time with the number of the first one."""
        first = 0
        while first < self.samples:
            until = int(np.searchsorted(self.offsets, self.offsets[first] + _PIECE_BYTES))
            last = min(self.samples, max(first + 1, until))
            start = int(self.offsets[first])
            piece = self.read(start, int(self.offsets[last]))
            bounds = (self.offsets[first : last + 1] - start).tolist()
            yield first, [piece[bounds[i] : bounds[i + 1]] for i in range(last - first)]
            first = last

    def damaged(self, reason: str) -> CorruptError:
        """Return the error that says what is wrong with the file."""
        return CorruptError(f"not a file of samples: {reason}", where=self.key, hint="Restore this file from a copy.")


class SampleShards(ABC):
    """Collects samples and stores a file of them whenever the next one would exceed `shard_bytes`."""

    def __init__(self, shard_bytes: int) -> None:
        self.files = 0
        self._shard_bytes = min(shard_bytes, MAX_FILE_BYTES // 2)
        self._samples: list[Cell] = []
        self._bytes = 0

    def add(self, samples: Iterable[Cell]) -> None:
        """Take samples, in order."""
        for sample in samples:
            if self._bytes and self._bytes + len(sample) > self._shard_bytes:
                self.flush()
            self._samples.append(sample)
            self._bytes += len(sample)

    def flush(self) -> None:
        """Store what is left."""
        if self._samples:
            self._store(self.files, self._samples)
            self.files += 1
            self._samples, self._bytes = [], 0

    @abstractmethod
    def _store(self, number: int, samples: Sequence[Cell]) -> None:
        """Store `samples` as file `number`."""


def pack_cells(columns: Sequence[Sequence[Cell]], fixed: Sequence[bool]) -> Iterator[bytes]:
    """Yield the sample of each row: the sizes of all columns that are not `fixed`, then the cells of all."""
    sizes = [list(map(len, column)) for column, is_fixed in zip(columns, fixed, strict=True) if not is_fixed]
    heads = np.array(sizes, _UINT32).T.copy()
    for row, cells in enumerate(zip(*columns, strict=True)):
        yield b"".join((heads[row].tobytes() if sizes else b"", *cells))


def unpack_cells(
    packed: PackedFile, samples: Sequence[memoryview], sizes: Sequence[int | None]
) -> list[list[memoryview]]:
    """Return the cells of each column: a sample is the sizes of those that have no fixed one, then all values.

    Raises:
        CorruptError: the sizes do not add up to the sample.
    """
    columns: list[list[memoryview]] = [[] for _ in sizes]
    head = 4 * sum(size is None for size in sizes)
    for sample in samples:
        if len(sample) < head:
            raise packed.damaged("a sample ends too early")
        given: Iterator[Any] = iter(sample[:head].cast("I") if head else ())
        at = head
        for column, size in zip(columns, sizes, strict=True):
            stop = at + (next(given) if size is None else size)
            column.append(sample[at:stop])
            at = stop
        if at != len(sample):
            raise packed.damaged("the values of a sample do not fill it")
    return columns


def _decompressed(data: bytes, codec: str, limit: int, key: str) -> bytes:
    """Return the data, at most `limit` bytes of it."""
    try:
        if codec in {"zstd", "zst"}:
            with zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True) as reader:
                found = reader.read(limit + 1)
        elif codec in {"gz", "gzip"}:
            found = zlib.decompressobj(wbits=31).decompress(data, limit + 1)
        elif codec == "bz2":
            found = bz2.BZ2Decompressor().decompress(data, limit + 1)
        else:
            raise ConfigError(
                "this compression cannot be read",
                compression=codec,
                file=key,
                hint="Write the source again with zstd, gz, bz2 or without compression.",
            )
    except (zstandard.ZstdError, zlib.error, OSError, EOFError) as error:
        raise CorruptError(f"not {codec}: {error}", where=key, hint="Restore this file from a copy.") from None
    if len(found) > limit:
        raise CorruptError("a compressed file is longer than its index says", where=key, limit=limit)
    return found
