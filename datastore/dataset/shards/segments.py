"""All shards of a version as columns: its segments, loaded."""

import bisect
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.log.keys import INFO_KEY, segment_key
from datastore.dataset.log.manifest import Commit, SegmentRef
from datastore.dataset.shards.info import PLAIN, ColumnLayout, ShardInfo, ShardLayout
from datastore.dataset.shards.segment_file import (
    BINARY16,
    decode_segment,
    encode_segment,
    int64_column,
    itemsizes,
    not_a_segment,
    segment_of,
)
from datastore.document import decode
from datastore.errors import ConfigError, CorruptError
from datastore.formats.arrow import array_of, numbers_of, scalar_of
from datastore.storage.base import Storage, check_key
from datastore.storage.verified import read_checked
from datastore.threads import in_parallel

__all__ = ["Loaded", "Segments", "checked_shards", "load_segment", "load_segments"]

Loaded = dict[str, pa.RecordBatch]
"""Segments by their digest, which stands for their bytes: one read once need not be read again."""


def checked_shards(shards: Sequence[ShardInfo], *, where: str) -> list[ShardInfo]:
    """Return `shards`, which `where` describes, if they would be sound in a segment.

    Raises:
        CorruptError: a number does not fit its file, or a path leads out of the dataset.
    """
    try:
        raw = encode_segment(segment_of(shards))
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise not_a_segment(str(error), where) from None
    return list(Segments([decode_segment(raw, where=where)]))


_AT_ONCE_BYTES = 2**20
"""Segments of this machine that are together smaller are read one after the other: threads take longer to start."""

_ROWS_AT_ONCE = 1024
"""Rows turned into objects at a time when all are visited."""


class Segments:
    """All shards of a version, in order; immutable, safe for any number of threads.

    Columns are NumPy arrays over all shards: views of the file's bytes when there is one segment.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.batches = tuple(batch for batch in batches if batch.num_rows)
        ends = np.cumsum([batch.num_rows for batch in self.batches], dtype=np.int64)
        self._ends: list[int] = ends.tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[ShardInfo]:
        for batch in self.batches:
            for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
                yield from _infos(batch.slice(start, _ROWS_AT_ONCE))

    def shard(self, index: int) -> ShardInfo:
        """Return shard `index`.

        Raises:
            IndexError: there is no such shard.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self._ends, index)
        batch = self.batches[place]
        return _infos(batch.slice(index - self._ends[place] + batch.num_rows, 1))[0]

    @cached_property
    def documents(self) -> npt.NDArray[np.int64]:
        """Documents of each shard."""
        return self._column("documents")

    @cached_property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of each shard."""
        return self._column("tokens")

    @cached_property
    def size_bytes(self) -> npt.NDArray[np.int64]:
        """Size of each shard's file."""
        return self._column("size_bytes")

    @cached_property
    def values_start(self) -> npt.NDArray[np.int64]:
        """Byte position of each shard's first token."""
        return self._column("values_start")

    @cached_property
    def block_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes per block of each shard's file; the last block may be shorter."""
        return self._column("block_bytes")

    @cached_property
    def itemsize(self) -> npt.NDArray[np.int64]:
        """Bytes per token of each shard: 2 or 4 (0 for records)."""
        return self._concat([itemsizes(batch) for batch in self.batches], np.dtype(np.int64))

    @cached_property
    def uid64(self) -> npt.NDArray[np.uint64]:
        """First 8 bytes of each shard's uid, big-endian: the number that its first 16 hex digits write."""
        return self._concat([_uid64(batch) for batch in self.batches], np.dtype(np.uint64))

    def digests_of(self, uids: Sequence[str]) -> dict[str, bytes]:
        """Return the digests of those of `uids` that name a shard in here. O(shards), without an object per shard."""
        wanted = array_of([bytes.fromhex(uid) for uid in uids], BINARY16)
        found: dict[str, bytes] = {}
        heads = np.array([int(uid[:16], 16) for uid in uids], np.uint64)
        for batch in self.batches:
            if not np.isin(_uid64(batch), heads).any():  # A tenth of the time of the next line, and mostly all of it.
                continue
            mask = pc.is_in(batch.column("uid"), value_set=wanted)
            for row in batch.select(["uid", "digest"]).filter(mask).to_pylist():
                found[row["uid"].hex()] = row["digest"]
        return found

    @cached_property
    def columns(self) -> tuple[ColumnLayout, ...]:
        """The columns that all token shards have beside `tokens`; where they start is that of the first shard's."""
        return self.shard(0).layout.columns if len(self) else ()

    def column_start(self, name: str) -> npt.NDArray[np.int64]:
        """Return the byte position of the first value of column `name` in each shard's file. O(shards), 1 us each.

        Raises:
            CorruptError: a shard does not have it.
        """
        starts = np.empty(len(self), np.int64)
        at = 0
        for batch in self.batches:
            for raw in cast("list[bytes]", batch.column("layout").to_pylist()):
                found = next((column for column in _layout(raw).columns if column.name == name), None)
                if found is None:
                    raise CorruptError("a shard lacks a column of the dataset", shard=self.shard(at).path, column=name)
                # In whole numbers of Python, which do not overflow.
                value_bytes = int(self.tokens[at]) * found.width * np.dtype(found.dtype).itemsize
                if found.values_start + value_bytes > int(self.size_bytes[at]):
                    raise CorruptError("a column is larger than its file", shard=self.shard(at).path, column=name)
                starts[at] = found.values_start
                at += 1
        return starts

    def find(self, uids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the index of the shard that each of `uids` names, -1 where there is none. O(shards), without objects."""
        wanted = array_of([bytes.fromhex(uid) for uid in uids], BINARY16)
        found = np.full(len(uids), -1, np.int64)
        for batch, end in zip(self.batches, self._ends, strict=True):
            places: Any = pc.index_in(batch.column("uid"), value_set=wanted)
            which = numbers_of(places.fill_null(scalar_of(-1, pa.int32())))
            here = np.flatnonzero(which >= 0)
            found[which[here]] = end - batch.num_rows + here
        return found

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        return self._concat([int64_column(batch, name) for batch in self.batches], np.dtype(np.int64))

    def _concat(self, parts: list[npt.NDArray[Any]], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype)


def _infos(rows: pa.RecordBatch) -> list[ShardInfo]:
    """Return `rows` as objects; their strings are checked here, where they are read, not when the segment is opened."""
    try:
        rows.validate(full=True)
        return [_info(row) for row in rows.to_pylist()]
    except (pa.ArrowInvalid, msgspec.ValidationError) as error:
        raise not_a_segment(str(error), "a row of it") from None


def _info(row: dict[str, Any]) -> ShardInfo:
    found = msgspec.convert({**row, "uid": row["uid"].hex(), "layout": _layout(row["layout"])}, ShardInfo)
    if {bool(found.dtype), bool(found.offsets_dtype), bool(found.docs_path)} != {found.kind == "tokens"}:
        raise not_a_segment("a shard of tokens has types and documents, one of records has none", "a row of it")
    for path in (found.path, *filter(None, [found.docs_path])):
        # The places of other datasets are whole URLs or paths: whether they may be named here, the storage knows.
        if not (path.startswith("/") or "://" in path):
            try:
                check_key(path)
            except ConfigError:
                raise not_a_segment(f"{path!r} leads out of the dataset", "a row of it") from None
    return found


def _layout(raw: bytes) -> ShardLayout:
    return decode(ShardLayout, raw, where="a segment's column layout") if raw else PLAIN


def _uid64(batch: pa.RecordBatch) -> npt.NDArray[np.uint64]:
    column = batch.column("uid")
    raw = memoryview(cast("pa.Buffer", column.buffers()[1]))[16 * column.offset : 16 * (column.offset + len(column))]
    return np.frombuffer(raw, dtype=">u8")[::2].astype(np.uint64)


def load_segments(storage: Storage, commit: Commit, *, loaded: Loaded | None = None) -> Segments:
    """Return the shards of `commit`; segments that are `loaded` are not read again, and others are added to them.

    Raises:
        MissingError: a segment is gone.
        CorruptError: a segment is damaged, or does not hold what the commit says.
    """
    load = partial(load_segment, storage, loaded=loaded)
    small = sum(ref.file_bytes for ref in commit.segments) < _AT_ONCE_BYTES
    if len(commit.segments) < 2 or (small and storage.local_path(INFO_KEY) is not None):
        return Segments([load(ref) for ref in commit.segments])
    return Segments(list(in_parallel(load, commit.segments)))


def load_segment(storage: Storage, ref: SegmentRef, *, loaded: Loaded | None = None) -> pa.RecordBatch:
    """Return the rows of one segment, those `loaded` before if they are there."""
    found = loaded.get(ref.digest) if loaded is not None else None
    if found is not None:
        return found
    key = segment_key(ref.digest)
    batch = decode_segment(read_checked(storage, key, size_bytes=ref.file_bytes, digest=ref.digest), where=key)
    if batch.num_rows != ref.shards:
        raise CorruptError(
            "a segment has another number of shards than its commit says",
            where=key,
            expected=ref.shards,
            found=batch.num_rows,
            hint="Restore this file from a copy.",
        )
    if loaded is not None:
        loaded[ref.digest] = batch
    return batch
