"""The file of a segment: a table of shards, columnar, so that a million of them open without a million Python objects.

A segment is an Arrow file named by the digest of its bytes: immutable, one record batch of
at most 65,536 rows. A small one is compressed as a whole: it would be names of columns, twice, and little else. An append writes a small one and merges the small ones before it (`merge_tail`), so there are
about log4(65,536) = 8 small segments and N / 32,768 large ones at most.
"""

from collections.abc import Sequence
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import zstandard
from typing_extensions import Buffer

from datastore.dataset.log.manifest import SegmentRef
from datastore.dataset.shards.info import PLAIN, ShardInfo
from datastore.digest import DIGEST_BYTES, digest_hex
from datastore.errors import CorruptError
from datastore.formats.arrow import array_of, numbers_of

__all__ = [
    "BLOCK_BYTES",
    "MAX_SEGMENT_SHARDS",
    "SEGMENT_SCHEMA",
    "decode_segment",
    "encode_segment",
    "segment_of",
    "segment_ref",
]

BLOCK_BYTES = 2 * 2**20
"""The unit of a range read and of a digest."""

MAX_SEGMENT_SHARDS = 65_536

_PACKED_BYTES = 2**16
"""Arrow files up to this size, of some 250 shards, are compressed: 4.1 KB of one shard become 0.8."""

_LEVEL = 6

_MAGIC = b"\x28\xb5\x2f\xfd"
"""What a Zstandard frame begins with. Source: RFC 8878, section 3.1.1."""

_LARGEST_BLOCK = 2**30
"""Bytes of a block: what a reader has to set aside for one digest."""

_LARGEST_FILE = 2**40

_MOST_ROWS = 2**31
"""Rows of a record shard, which may be many more than its bytes: of truth values, of nothing, or compressed."""

_SIZES = ("size_bytes", "block_bytes", "tokens", "documents", "values_start", "offsets_start")

_CHECKED_AT_ONCE = 8192
"""Rows whose numbers stay in a core's cache, with what is computed from them."""

BINARY16 = pa.binary(16)

_TYPES: dict[str, pa.DataType] = {
    "uid": BINARY16,
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
    "digest": BINARY16,
    "docs_path": pa.string(),
    "docs_bytes": pa.int64(),
    "docs_digest": BINARY16,
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


def segment_of(shards: Sequence[ShardInfo]) -> pa.RecordBatch:
    """Return `shards` as the rows of a segment."""
    columns = {name: [getattr(shard, name) for shard in shards] for name in _TYPES}
    columns["uid"] = [bytes.fromhex(uid) for uid in columns["uid"]]
    columns["layout"] = [b"" if layout == PLAIN else msgspec.json.encode(layout) for layout in columns["layout"]]
    columns["docs_digest"] = [digest or bytes(16) for digest in columns["docs_digest"]]
    return pa.record_batch([array_of(columns[name], kind) for name, kind in _TYPES.items()], schema=SEGMENT_SCHEMA)


def encode_segment(batch: pa.RecordBatch) -> bytes:
    """Return the file that holds `batch`; a small one, most of which are names of columns, is compressed."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SEGMENT_SCHEMA) as writer:
        writer.write_batch(batch)
    raw = sink.getvalue().to_pybytes()
    return zstandard.ZstdCompressor(level=_LEVEL).compress(raw) if len(raw) <= _PACKED_BYTES else raw


def decode_segment(raw: Buffer | pa.Buffer, *, where: str) -> pa.RecordBatch:
    """Return the rows of a segment, views of `raw` if it is not compressed; columns not known here are left out.

    Its digest is the caller's to check first.

    Raises:
        CorruptError: not an Arrow file with one record batch that has the columns of `SEGMENT_SCHEMA`.
    """
    try:
        reader = pa.ipc.open_file(_unpacked(raw if isinstance(raw, pa.Buffer) else pa.py_buffer(raw), where))
        if reader.num_record_batches != 1:
            raise not_a_segment("not one record batch", where)
        batch = _completed(reader.get_batch(0)).select(SEGMENT_SCHEMA.names)
        batch.validate()
        if not batch.schema.equals(SEGMENT_SCHEMA):
            raise not_a_segment("a column has another type", where)
        _check_columns(batch)
        _check_sizes(batch)
    except (pa.ArrowException, OSError, KeyError, ValueError, MemoryError) as error:
        raise not_a_segment(str(error), where) from None
    return batch


def _unpacked(raw: pa.Buffer, where: str) -> pa.Buffer:
    """Return the Arrow file that `raw` is, or holds compressed. The size that it says is no more than a small one may have."""
    if raw[: len(_MAGIC)].to_pybytes() != _MAGIC:
        return raw
    frame = memoryview(cast("Any", raw))
    try:
        if not 0 < zstandard.frame_content_size(frame) <= _PACKED_BYTES:
            raise not_a_segment("it is too large to be compressed", where)
        return pa.py_buffer(zstandard.ZstdDecompressor().decompress(frame))
    except zstandard.ZstdError as error:
        raise not_a_segment(str(error), where) from None


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
            if batch.num_rows and int(int64_column(batch, name).min()) < least:
                raise pa.ArrowInvalid(f"a number below {least} in the column {name}")
        elif kind != BINARY16:
            column.view(pa.binary()).validate(full=True)


def _check_sizes(batch: pa.RecordBatch) -> None:
    """Raise ArrowInvalid for a shard whose file has no room for what is said to be in it: 1 ms for 65,536 rows.

    So whoever plans with these numbers plans with no more than their digests stand for.
    """
    dtype: Any = batch.column("dtype")
    digests: Any = batch.column("block_digests")
    numbers = [int64_column(batch, name) for name in _SIZES]
    numbers += [numbers_of(pc.binary_length(each)) for each in (dtype, digests)]
    wide = itemsizes(batch) == np.dtype(np.uint32).itemsize
    for start in range(0, batch.num_rows, _CHECKED_AT_ONCE):
        part = slice(start, start + _CHECKED_AT_ONCE)
        if not _sizes_fit([column[part] for column in numbers], wide=wide[part]):
            raise pa.ArrowInvalid("a shard is larger than its file, or has other blocks than its size says")


def _sizes_fit(numbers: Sequence[npt.NDArray[Any]], *, wide: npt.NDArray[np.bool_]) -> bool:
    """Whether shards fit into their files. The limits come first: within them nothing overflows."""
    size, block, tokens, documents, values, offsets, named, digest_bytes = numbers
    if not ((size <= _LARGEST_FILE) & (block <= _LARGEST_BLOCK)).all():
        return False
    of_tokens = named > 0
    rows = np.where(of_tokens, size, _MOST_ROWS)
    if not ((tokens <= size) & (documents <= rows) & (values <= size) & (offsets <= size)).all():
        return False
    fits = values + (2 * tokens << wide) <= size
    fits &= np.where(of_tokens, offsets + 4 * documents + 4 <= size, tokens == 0)
    return bool((fits & (digest_bytes == DIGEST_BYTES * -(-size // block))).all())


def _completed(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return `batch` with those of the later columns that it does not have."""
    for name in sorted(_LATER.difference(batch.schema.names)):
        empty = array_of([b""], _TYPES[name])
        values = pa.DictionaryArray.from_arrays(array_of(np.zeros(batch.num_rows, np.int8)), empty)
        batch = batch.append_column(SEGMENT_SCHEMA.field(name), values.cast(_TYPES[name]))
    return batch


def segment_ref(batch: pa.RecordBatch, raw: Buffer) -> SegmentRef:
    """Return how a commit names the segment `batch`, whose file is `raw`."""

    def total(name: str) -> int:
        return int(int64_column(batch, name).sum())

    return SegmentRef(
        digest=digest_hex(raw),
        file_bytes=memoryview(raw).nbytes,
        shards=batch.num_rows,
        documents=total("documents"),
        tokens=total("tokens"),
        size_bytes=total("size_bytes") + total("docs_bytes"),
    )


def not_a_segment(reason: str, where: str) -> CorruptError:
    return CorruptError(f"not a segment: {reason}", where=where, hint="Restore this file from a copy.")


def int64_column(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.int64]:
    return numbers_of(batch.column(name))


def itemsizes(batch: pa.RecordBatch) -> npt.NDArray[np.int64]:
    found: Any = batch.column("dtype").dictionary_encode()
    sizes = {name: np.dtype(name).itemsize for name in ("uint16", "uint32")}
    of_name = np.array([sizes.get(name, 0) for name in found.dictionary.to_pylist()], np.int64)
    of_shard: npt.NDArray[np.int64] = of_name[numbers_of(found.indices)]
    return of_shard
