"""Segments: tables of shards, columnar, so that a million shards open without a million Python objects.

A segment is an Arrow file named by the digest of its bytes: immutable, mapped when it is local, one record batch of
at most 65,536 rows. An append writes a small one and merges the small ones before it (`merge_tail`), so there are
about log4(65,536) = 8 small segments and N / 32,768 large ones at most.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from typing_extensions import Buffer

from datastore.dataset.log.manifest import SegmentRef
from datastore.dataset.shards.info import PLAIN, BatchRange, ColumnLayout, ShardInfo, ShardLayout, frame_ranges
from datastore.digest import DIGEST_BYTES, digest_hex
from datastore.document import decode
from datastore.errors import ConfigError, CorruptError
from datastore.formats.arrays import numbers_of
from datastore.storage.base import check_key

__all__ = [
    "BLOCK_BYTES",
    "MAX_SEGMENT_SHARDS",
    "SEGMENT_SCHEMA",
    "BatchRange",
    "ColumnLayout",
    "Segments",
    "ShardInfo",
    "ShardLayout",
    "decode_segment",
    "encode_segment",
    "frame_ranges",
    "merge_tail",
    "segment_key",
    "segment_of",
    "segment_ref",
]

BLOCK_BYTES = 2 * 2**20
"""The unit of a range read and of a digest."""

MAX_SEGMENT_SHARDS = 65_536

_MERGE_RATIO = 4
"""A segment at the tail is merged into the one after it if it has less than this many times its shards."""

_LARGEST_BLOCK = 2**30
"""Bytes of a block: what a reader has to set aside for one digest."""

_LARGEST_FILE = 2**40

_SIZES = ("size_bytes", "block_bytes", "tokens", "documents", "values_start", "offsets_start")

_CHECKED_AT_ONCE = 8192
"""Rows whose numbers stay in a core's cache, with what is computed from them."""

_ROWS_AT_ONCE = 1024
"""Rows turned into objects at a time when all are visited."""

_BINARY16 = pa.binary(16)
_TYPES: dict[str, pa.DataType] = {
    "uid": _BINARY16,
    "path": pa.string(),
    "kind": pa.string(),
    "dtype": pa.string(),
    "documents": pa.int64(),
    "tokens": pa.int64(),
    "size_bytes": pa.int64(),
    "values_start": pa.int64(),
    "offsets_start": pa.int64(),
    "offsets_dtype": pa.string(),
    "block_bytes": pa.int64(),
    "digest": _BINARY16,
    "docs_path": pa.string(),
    "docs_bytes": pa.int64(),
    "docs_digest": _BINARY16,
    "source_first": pa.string(),
    "source_last": pa.string(),
    # Last in the file: everything before them is small, whatever the size of the shards.
    "layout": pa.binary(),
    "block_digests": pa.binary(),
}

_LATER: frozenset[str] = frozenset({"layout"})
"""Columns that segments did not have at first; where one is missing, all its values are empty."""

SEGMENT_SCHEMA = pa.schema(pa.field(name, kind, nullable=False) for name, kind in _TYPES.items())
"""The columns of a segment: the fields of `ShardInfo`, `uid` as 16 bytes, `layout` as JSON (empty: the default)."""


def segment_key(digest: str) -> str:
    """Return the key of the segment with that digest."""
    return f"_segments/{digest}.arrow"


def segment_of(shards: Sequence[ShardInfo]) -> pa.RecordBatch:
    """Return `shards` as the rows of a segment."""
    columns = {name: [getattr(shard, name) for shard in shards] for name in _TYPES}
    columns["uid"] = [bytes.fromhex(uid) for uid in columns["uid"]]
    columns["layout"] = [b"" if layout == PLAIN else msgspec.json.encode(layout) for layout in columns["layout"]]
    columns["docs_digest"] = [digest or bytes(16) for digest in columns["docs_digest"]]
    return pa.record_batch([pa.array(columns[name], kind) for name, kind in _TYPES.items()], schema=SEGMENT_SCHEMA)


def encode_segment(batch: pa.RecordBatch) -> bytes:
    """Return the file that holds `batch`."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SEGMENT_SCHEMA) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def decode_segment(raw: Buffer | pa.Buffer, *, where: str) -> pa.RecordBatch:
    """Return the rows of a segment as views of `raw`; columns that this version does not know are left out.

    Its digest is the caller's to check first.

    Raises:
        CorruptError: not an Arrow file with one record batch that has the columns of `SEGMENT_SCHEMA`.
    """
    try:
        reader = pa.ipc.open_file(raw if isinstance(raw, pa.Buffer) else pa.py_buffer(raw))
        if reader.num_record_batches != 1:
            raise _not_a_segment("not one record batch", where)
        batch = _completed(reader.get_batch(0)).select(SEGMENT_SCHEMA.names)
        batch.validate()
        if not batch.schema.equals(SEGMENT_SCHEMA):
            raise _not_a_segment("a column has another type", where)
        _check_columns(batch)
        _check_sizes(batch)
    except (pa.ArrowException, OSError, KeyError, ValueError, MemoryError) as error:
        raise _not_a_segment(str(error), where) from None
    return batch


def _check_columns(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid for a null, a number below its least, or a text beyond its column: 0.5 ms for 65,536 rows.

    That texts are UTF-8 is checked where they are read, which takes ten times as long.
    """
    for name, kind in _TYPES.items():
        column = batch.column(name)
        if column.null_count:
            raise pa.ArrowInvalid(f"a null in the column {name}")
        if kind == pa.int64():
            least = 1 if name == "block_bytes" else 0
            if batch.num_rows and int(_numbers(batch, name).min()) < least:
                raise pa.ArrowInvalid(f"a number below {least} in the column {name}")
        elif kind != _BINARY16:
            column.view(pa.binary()).validate(full=True)


def _check_sizes(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid for a shard whose file has no room for what is said to be in it: 1 ms for 65,536 rows.

    So whoever plans with these numbers plans with no more than their digests stand for.
    """
    dtype: Any = batch.column("dtype")
    digests: Any = batch.column("block_digests")
    numbers = [_numbers(batch, name) for name in _SIZES]
    numbers += [numbers_of(pc.binary_length(each)) for each in (dtype, digests)]
    wide = _itemsize(batch) == np.dtype(np.uint32).itemsize
    for start in range(0, batch.num_rows, _CHECKED_AT_ONCE):
        part = slice(start, start + _CHECKED_AT_ONCE)
        if not _sizes_fit([column[part] for column in numbers], wide=wide[part]):
            raise pa.ArrowInvalid("a shard is larger than its file, or has other blocks than its size says")


def _sizes_fit(numbers: Sequence[npt.NDArray[Any]], *, wide: npt.NDArray[np.bool_]) -> bool:
    """Whether shards fit into their files. The limits come first: within them nothing overflows."""
    size, block, tokens, documents, values, offsets, named, digest_bytes = numbers
    if not ((size <= _LARGEST_FILE) & (block <= _LARGEST_BLOCK)).all():
        return False
    if not ((tokens <= size) & (documents <= size) & (values <= size) & (offsets <= size)).all():
        return False
    of_tokens = named > 0
    fits = values + (2 * tokens << wide) <= size
    fits &= np.where(of_tokens, offsets + 4 * documents + 4 <= size, tokens == 0)
    return bool((fits & (digest_bytes == DIGEST_BYTES * -(-size // block))).all())


def _completed(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return `batch` with those of the later columns that it does not have."""
    for name in sorted(_LATER.difference(batch.schema.names)):
        empty = pa.array([b""], _TYPES[name])
        values = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int8()), batch.num_rows), empty)
        batch = batch.append_column(SEGMENT_SCHEMA.field(name), values.cast(_TYPES[name]))
    return batch


def segment_ref(batch: pa.RecordBatch, raw: Buffer) -> SegmentRef:
    """Return how a commit names the segment `batch`, whose file is `raw`."""

    def total(name: str) -> int:
        return int(_numbers(batch, name).sum())

    return SegmentRef(
        digest=digest_hex(raw),
        file_bytes=memoryview(raw).nbytes,
        shards=batch.num_rows,
        documents=total("documents"),
        tokens=total("tokens"),
        size_bytes=total("size_bytes") + total("docs_bytes"),
    )


def merge_tail(segments: Sequence[int], added: int) -> int:
    """Return how many segments at the end of `segments` (their sizes) to merge with `added` new shards.

    Each shard is rewritten a few times on its way into a full segment: every merge of it at least grows its segment
    by a quarter. Large segments are never rewritten for a small append.
    """
    merged, total = 0, added
    for size in reversed(segments):
        if size >= _MERGE_RATIO * total or size + total > MAX_SEGMENT_SHARDS:
            break
        merged, total = merged + 1, total + size
    return merged


class Segments:
    """All shards of a version, in order; immutable, safe for any number of threads.

    Columns are NumPy arrays over all shards: views of the mapped file when there is one segment.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch], *, forget: Callable[[], None] = lambda: None) -> None:
        self._forget = forget
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
        return self._concat([_itemsize(batch) for batch in self.batches], np.dtype(np.int64))

    @cached_property
    def uid64(self) -> npt.NDArray[np.uint64]:
        """First 8 bytes of each shard's uid, big-endian: the number that its first 16 hex digits write."""
        return self._concat([_uid64(batch) for batch in self.batches], np.dtype(np.uint64))

    def digests_of(self, uids: Sequence[str]) -> dict[str, bytes]:
        """Return the digests of those of `uids` that name a shard in here. O(shards), without an object per shard."""
        wanted = pa.array([bytes.fromhex(uid) for uid in uids], _BINARY16)
        found: dict[str, bytes] = {}
        for batch in self.batches:
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
        wanted = pa.array([bytes.fromhex(uid) for uid in uids], _BINARY16)
        found = np.full(len(uids), -1, np.int64)
        for batch, end in zip(self.batches, self._ends, strict=True):
            places: Any = pc.index_in(batch.column("uid"), value_set=wanted)
            which = numbers_of(places.fill_null(-1))
            here = np.flatnonzero(which >= 0)
            found[which[here]] = end - batch.num_rows + here
        return found

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        return self._concat([_numbers(batch, name) for batch in self.batches], np.dtype(np.int64))

    def _concat(self, parts: list[npt.NDArray[Any]], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        if len(parts) == 1:
            return parts[0]
        whole = np.concatenate(parts) if parts else np.empty(0, dtype)
        self._forget()  # What was copied need not stay mapped as well.
        return whole


def _not_a_segment(reason: str, where: str) -> CorruptError:
    return CorruptError(f"not a segment: {reason}", where=where, hint="Restore this file from a copy.")


def _infos(rows: pa.RecordBatch) -> list[ShardInfo]:
    """Return `rows` as objects; their strings are checked here, where they are read, not when the segment is opened."""
    try:
        rows.validate(full=True)
        return [_info(row) for row in rows.to_pylist()]
    except (pa.ArrowInvalid, msgspec.ValidationError) as error:
        raise _not_a_segment(str(error), "a row of it") from None


def _info(row: dict[str, Any]) -> ShardInfo:
    found = msgspec.convert({**row, "uid": row["uid"].hex(), "layout": _layout(row["layout"])}, ShardInfo)
    if {bool(found.dtype), bool(found.offsets_dtype), bool(found.docs_path)} != {found.kind == "tokens"}:
        raise _not_a_segment("a shard of tokens has types and documents, one of records has none", "a row of it")
    for path in (found.path, *filter(None, [found.docs_path])):
        # The places of other datasets are whole URLs or paths: whether they may be named here, the storage knows.
        if not (path.startswith("/") or "://" in path):
            try:
                check_key(path)
            except ConfigError:
                raise _not_a_segment(f"{path!r} leads out of the dataset", "a row of it") from None
    return found


def _layout(raw: bytes) -> ShardLayout:
    return decode(ShardLayout, raw, where="a segment's column layout") if raw else PLAIN


def _numbers(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.int64]:
    return numbers_of(batch.column(name))


def _itemsize(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    found: Any = batch.column("dtype").dictionary_encode()
    sizes = {name: np.dtype(name).itemsize for name in ("uint16", "uint32")}
    of_name = np.array([sizes.get(name, 0) for name in found.dictionary.to_pylist()], np.int64)
    of_shard: npt.NDArray[np.int64] = of_name[numbers_of(found.indices)]
    return of_shard


def _uid64(batch: pa.RecordBatch) -> npt.NDArray[np.uint64]:
    column = batch.column("uid")
    raw = memoryview(cast("pa.Buffer", column.buffers()[1]))[16 * column.offset : 16 * (column.offset + len(column))]
    return np.frombuffer(raw, dtype=">u8")[::2].astype(np.uint64)
