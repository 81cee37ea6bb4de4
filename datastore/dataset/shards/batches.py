"""Reading records batch by batch: one batch of a remote shard is one range read, and nothing more is fetched.

Each batch has a digest of its own, and so has the frame around them (schema, dictionaries, footer), which is read
once. Blocks of a fixed size would do for checking, but a batch of 2 MiB lies across two or three of those: a reader
would fetch twice what it needs. The price is some fifty bytes more per batch in the manifest.

A batch is decoded where it lies in an image of its file, of which only the frame and the batch are filled in: memory that
nobody touches costs nothing. No file is mapped, for the reason that `storage.verified` gives.
"""

import mmap
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
from typing_extensions import Buffer

from datastore.dataset.shards.files import read_record_shard
from datastore.dataset.shards.info import ShardInfo, frame_ranges
from datastore.dataset.shards.segments import Segments
from datastore.digest import check_digest, digest_of, require_digest
from datastore.errors import ConfigError, CorruptError, StorageError
from datastore.formats.arrow import types_within
from datastore.formats.evolution import adapt, source_names
from datastore.formats.records import decode_batch, decode_message, read_frame
from datastore.storage.base import Storage
from datastore.storage.verified import first_sound, has_digest
from datastore.threads import in_parallel

__all__ = ["BatchReader", "InPlace"]

T = TypeVar("T")
Frame = list[tuple[int, bytes]]
"""The pieces of a file that belong to no batch, each with its place."""

_FRAMES = 64
"""Shards whose frame is kept: some kilobytes each."""

_BUFFER_BYTES = 2**23
"""What a thread keeps to read into; larger batches get memory of their own."""

_READERS = 2
_REMOTE_READERS = 4
"""Threads that read ahead, each at most two batches."""


class InPlace(NamedTuple):
    """A batch, and where the bytes that it was decoded from lie: what is at `address + n` in memory is at `n` in the file."""

    rows: pa.RecordBatch
    address: int
    path: Path
    """The only copy of the shard, a file of this machine."""

    size_bytes: int
    """Of the file."""


class BatchReader:
    """Reads batches of the shards of one version, as rows of `schema`; safe for any number of threads.

    Shards that were written before batches had ranges are read whole.
    """

    def __init__(self, storage: Storage, segments: Segments, *, schema: pa.Schema) -> None:
        self.schema = schema
        self._storage = storage
        self._segments = segments
        self._lock = threading.Lock()
        self._shards: dict[int, _Shard] = {}

    def read(self, shard: int, batch: int, *, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Return one batch of a shard, deleted rows too.

        Raises:
            IndexError: there is no such shard, or no such batch.
            ConfigError: there is no such column.
            MissingError: the file is gone.
            CorruptError: the file is damaged.
        """
        wanted = self._wanted(columns)
        found = self._shard(shard)
        if batch < 0:
            raise IndexError(batch)
        if not found.info.layout.batches:
            return list(self._whole(found.info, wanted))[batch]
        return found.read(batch, wanted)

    def info(self, shard: int) -> ShardInfo:
        """Return what the manifest says of a shard."""
        return self._shard(shard).info

    def read_in_place(self, shard: int, batch: int, *, columns: Sequence[str] | None = None) -> InPlace | None:
        """Return one batch of a shard as `read` does, and where it lies in a file; None if there is not one such file.

        Its rows are good until this thread reads the next one: they lie in a buffer that is filled again and again.

        Raises:
            ConfigError, MissingError, CorruptError: as `read`.
        """
        found = self._shard(shard)
        info = found.info
        if info.layout.format != "arrow" or not 0 <= batch < len(info.layout.batches):
            return None
        path = self._storage.local_path(info.path)
        if path is None or len(list(self._storage.copies(info.path))) > 1:
            return None
        return found.borrowed(batch, self._wanted(columns), path)

    def each(self, *, columns: Sequence[str] | None = None) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """Yield all batches in order, each with its shard and the number of its first row there; a few are read ahead.

        Raises:
            ConfigError: there is no such column.
            MissingError, CorruptError: as `read`.
        """
        wanted = self._wanted(columns)

        def read(what: tuple[int, int | None]) -> list[pa.RecordBatch]:
            shard = self._shard(what[0])
            return [shard.read(what[1], wanted)] if what[1] is not None else list(self._whole(shard.info, wanted))

        local = len(self._segments) > 0 and self._storage.local_path(self._segments.shard(0).path) is not None
        places = self._places()
        shard, row = -1, 0
        for (number, _), batches in in_parallel(
            lambda what: (what, read(what)), places, threads=_READERS if local else _REMOTE_READERS
        ):
            row = row if number == shard else 0
            shard = number
            for batch in batches:
                yield shard, row, batch
                row += batch.num_rows

    def _places(self) -> Iterator[tuple[int, int | None]]:
        """Yield shard and batch of everything that is to be read; None for a shard that is read whole."""
        for index, shard in enumerate(self._segments):
            if shard.layout.batches:
                yield from ((index, batch) for batch in range(len(shard.layout.batches)))
            elif shard.documents:
                yield index, None

    def _whole(self, shard: ShardInfo, wanted: pa.Schema) -> Iterator[pa.RecordBatch]:
        for batch in read_record_shard(self._storage, shard).to_batches():
            yield adapt(batch, wanted)

    def _wanted(self, columns: Sequence[str] | None) -> pa.Schema:
        if columns is None:
            return self.schema
        unknown = sorted(set(columns) - set(self.schema.names))
        if unknown:
            raise ConfigError("no such column", columns=unknown, hint=f"There are: {', '.join(self.schema.names)}.")
        metadata: Any = self.schema.metadata
        return pa.schema([self.schema.field(name) for name in columns], metadata=metadata)

    def _shard(self, index: int) -> "_Shard":
        with self._lock:
            found = self._shards.get(index)
            if found is None:
                if len(self._shards) >= _FRAMES:
                    del self._shards[next(iter(self._shards))]
                found = self._shards[index] = _Shard(self._storage, self._segments.shard(index))
            return found


class _Shard:
    """A shard with ranges of batches, and its frame once that was read."""

    def __init__(self, storage: Storage, info: ShardInfo) -> None:
        self.info = info
        self._storage = storage
        self._lock = threading.Lock()
        self._frame: tuple[Frame, pa.Schema] | None = None

    def read(self, batch: int, wanted: pa.Schema) -> pa.RecordBatch:
        """Return one batch as rows of `wanted`."""
        span = self.info.layout.batches[batch]
        frame, stored = self._framed()
        names = source_names(stored, wanted)
        if not names:
            return adapt(pa.record_batch([pa.nulls(span.rows)], names=["-"]), wanted, stored=stored)
        image = self._sound(lambda place: self._filled(place, frame, batch))
        rows = decode_batch(image, batch, format=self.info.layout.format, columns=names)
        return self._checked(rows, batch, wanted)

    def borrowed(self, batch: int, wanted: pa.Schema, path: Path) -> InPlace | None:
        """Return one batch as rows of `wanted` that lie in the buffer of this thread, or None if it takes more to decode it."""
        span = self.info.layout.batches[batch]
        _, stored = self._framed()
        names = source_names(stored, wanted)
        if not names or any(pa.types.is_dictionary(kind) for each in stored for kind in types_within(each.type)):
            return None
        buffer = _buffer_of_thread(span.stop - span.start)

        def fill(place: Storage) -> None:
            place.read_into(self.info.path, span.start, buffer)
            check_digest(buffer, span.digest, where=f"{self.info.path}, batch {batch}")

        self._sound(fill)
        raw = pa.py_buffer(buffer)
        rows = self._checked(decode_message(raw, stored, columns=names), batch, wanted)
        return InPlace(rows, raw.address - span.start, path, self.info.size_bytes)

    def _checked(self, rows: pa.RecordBatch, batch: int, wanted: pa.Schema) -> pa.RecordBatch:
        """Return what was decoded of a batch as rows of `wanted`, if they are as many as there should be."""
        span, (_, stored) = self.info.layout.batches[batch], self._framed()
        if rows.num_rows != span.rows:
            raise CorruptError(
                "a batch has another number of rows than its manifest says",
                where=f"{self.info.path}, batch {batch}",
                expected=span.rows,
                found=rows.num_rows,
                hint="Restore this file from a copy.",
            )
        return adapt(rows, wanted, stored=stored)

    def _framed(self) -> tuple[Frame, pa.Schema]:
        """Return the pieces of the frame with their places, checked, and the schema in them."""
        with self._lock:
            if self._frame is None:
                frame = self._sound(self._read_frame)
                self._frame = frame, read_frame(_image(self.info, frame), format=self.info.layout.format)
            return self._frame

    def _read_frame(self, place: Storage) -> Frame:
        info = self.info
        ranges = frame_ranges(info.layout.batches, info.size_bytes)
        pieces = place.get_ranges(info.path, ranges)
        require_digest(digest_of(pieces), info.layout.frame_digest, where=f"{info.path}, its frame")
        return [(start, piece) for (start, _), piece in zip(ranges, pieces, strict=True)]

    def _filled(self, place: Storage, frame: Frame, batch: int) -> Buffer:
        """Return an image of the file, in which the frame and this batch are right."""
        span = self.info.layout.batches[batch]
        image = _image(self.info, frame)
        with memoryview(image) as whole, whole[span.start : span.stop] as target:
            place.read_into(self.info.path, span.start, target)
            check_digest(target, span.digest, where=f"{self.info.path}, batch {batch}")
        return image

    def _sound(self, read: Callable[[Storage], T]) -> T:
        """Return what `read` makes of the shard; a file that is too short is a damaged one."""
        info = self.info
        try:
            return first_sound(self._storage, info.path, read, is_good=has_digest(info.digest))
        except StorageError:
            found_bytes = self._storage.stat(info.path).size_bytes
            if found_bytes == info.size_bytes:
                raise
            raise CorruptError(
                "file has another size than its manifest says",
                where=info.path,
                expected=info.size_bytes,
                found=found_bytes,
                hint="Restore this file from a copy.",
            ) from None


def _image(info: ShardInfo, frame: Frame) -> mmap.mmap:
    """Return the file of a shard with its frame, and otherwise zeros."""
    image = _zeros(info.size_bytes)
    for start, piece in frame:
        image[start : start + len(piece)] = piece
    return image


_HERE = threading.local()


def _buffer_of_thread(size_bytes: int) -> memoryview:
    """Return memory that this thread fills again and again: new memory costs as much as what is read into it."""
    if size_bytes > _BUFFER_BYTES:
        return memoryview(_zeros(size_bytes))
    found = getattr(_HERE, "buffer", None)
    if found is None or len(found) < size_bytes:
        found = _HERE.buffer = memoryview(_zeros(size_bytes))
    return memoryview(found)[:size_bytes]


def _zeros(size_bytes: int) -> mmap.mmap:
    """Return memory that takes room only where it is written."""
    if sys.platform == "win32":
        return mmap.mmap(-1, size_bytes)
    # The default is shared memory, which is slower to fill and counts against another limit.
    return mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
