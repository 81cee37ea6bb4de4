"""Segments: columns over all shards, without an object for each."""

from itertools import pairwise

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import zstandard

from datastore.dataset.shards.info import ColumnLayout, ShardInfo, ShardLayout
from datastore.dataset.shards.segment_file import SEGMENT_SCHEMA, decode_segment, encode_segment, segment_of
from datastore.dataset.shards.segments import Segments
from datastore.errors import CorruptError


def shard(index: int, *, dtype: str = "uint16") -> ShardInfo:
    uid = f"{index * 0x9E3779B97F4A7C15 % 2**128:032x}"
    return ShardInfo(
        uid=uid,
        path=f"shards/{uid[:2]}/{uid}.arrow",
        kind="tokens",
        dtype=dtype,
        documents=index % 7,
        tokens=100 * index,
        size_bytes=10_000 + index,
        values_start=640,
        offsets_start=576,
        offsets_dtype="int32",
        block_bytes=1000 * (1 + index % 3),
        digest=index.to_bytes(16, "big"),
        block_digests=bytes(16) * -(-(10_000 + index) // (1000 * (1 + index % 3))),
        docs_path=f"docs/{uid[:2]}/{uid}.parquet",
        docs_bytes=index,
        docs_digest=index.to_bytes(16, "little"),
        source_first="a",
        source_last="b",
    )


SHARDS = [shard(index, dtype="uint32" if index % 2 else "uint16") for index in range(10)]


@pytest.fixture(params=[[10], [3, 0, 6, 1]], ids=["one segment", "several"])
def segments(request: pytest.FixtureRequest) -> Segments:
    edges = np.cumsum([0, *request.param])
    return Segments([segment_of(SHARDS[a:b]) for a, b in pairwise(edges)])


def test_each_shard_comes_back_as_it_went_in(segments: Segments) -> None:
    assert list(segments) == SHARDS
    assert len(segments) == len(SHARDS)


@pytest.mark.parametrize("index", [-1, 10, 1000])
def test_a_shard_that_is_not_there_is_an_index_error(segments: Segments, index: int) -> None:
    with pytest.raises(IndexError):
        segments.shard(index)


def test_columns_are_the_fields_of_the_shards(segments: Segments) -> None:
    assert segments.tokens.tolist() == [shard.tokens for shard in SHARDS]
    assert segments.documents.tolist() == [shard.documents for shard in SHARDS]
    assert segments.size_bytes.tolist() == [shard.size_bytes for shard in SHARDS]
    assert segments.values_start.tolist() == [shard.values_start for shard in SHARDS]
    assert segments.itemsize.tolist() == [np.dtype(shard.dtype).itemsize for shard in SHARDS]


def test_uid64_is_the_number_that_the_first_16_digits_write(segments: Segments) -> None:
    assert segments.uid64.dtype == np.uint64
    assert segments.uid64.tolist() == [int(shard.uid[:16], 16) for shard in SHARDS]


def test_the_columns_of_a_slice_are_those_of_its_shards() -> None:
    segments = Segments([segment_of(SHARDS).slice(2, 5)])
    assert segments.uid64.tolist() == [int(shard.uid[:16], 16) for shard in SHARDS[2:7]]
    assert segments.tokens.tolist() == [shard.tokens for shard in SHARDS[2:7]]
    assert list(segments) == SHARDS[2:7]


def test_known_uids_are_found_with_their_digests(segments: Segments) -> None:
    wanted = [SHARDS[0].uid, SHARDS[9].uid, "f" * 32]
    assert segments.digests_of(wanted) == {shard.uid: shard.digest for shard in (SHARDS[0], SHARDS[9])}


def test_no_shards_have_empty_columns() -> None:
    empty = Segments([])
    assert len(empty) == 0
    assert empty.tokens.size == empty.uid64.size == empty.itemsize.size == 0
    assert empty.digests_of([SHARDS[0].uid]) == {}


MANY = [msgspec.structs.replace(SHARDS[0], uid=f"{number:032x}") for number in range(400)]


def test_the_columns_of_a_mapped_segment_are_views_of_it() -> None:
    raw = pa.py_buffer(encode_segment(segment_of(MANY)))
    tokens = Segments([decode_segment(raw, where="here")]).tokens
    assert raw.address < tokens.ctypes.data < raw.address + raw.size


@pytest.mark.parametrize("shards", [1, 10, 100, 400])
def test_a_small_segment_is_compressed_and_reads_the_same(shards: int) -> None:
    raw = encode_segment(segment_of(MANY[:shards]))
    assert (raw[:4] == bytes.fromhex("28b52ffd")) == (shards < 400)
    assert len(raw) < 1000 + 60 * shards or shards == 400
    assert list(Segments([decode_segment(raw, where="here")])) == MANY[:shards]


def plain(shards: list[ShardInfo]) -> bytes:
    return zstandard.decompress(encode_segment(segment_of(shards)))


@pytest.mark.parametrize(
    "raw",
    [
        zstandard.compress(bytes(65_537)),
        zstandard.ZstdCompressor(write_content_size=False).compress(plain(MANY[:1])),
        zstandard.compress(plain(MANY[:1]))[:-9],
        zstandard.compress(plain(MANY[:1])[:-9]),
        zstandard.compress(zstandard.compress(plain(MANY[:1]))),
        bytes.fromhex("28b52ffd"),
    ],
    ids=["too large", "of unknown size", "cut", "of a cut file", "twice", "magic alone"],
)
def test_what_is_compressed_and_no_small_segment_is_refused(raw: bytes) -> None:
    with pytest.raises(CorruptError, match="not a segment"):
        decode_segment(raw, where="here")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"ARROW1",
        encode_segment(segment_of(SHARDS))[:-100],
        b"no arrow at all",
    ],
    ids=["nothing", "magic", "cut", "text"],
)
def test_what_is_not_a_segment_is_said_to_be_none(raw: bytes) -> None:
    with pytest.raises(CorruptError, match="not a segment"):
        decode_segment(raw, where="here")


def file_of(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("column", sorted({*SEGMENT_SCHEMA.names} - {"layout"}))
def test_a_missing_column_is_no_segment(column: str) -> None:
    batch = segment_of(SHARDS).select([name for name in SEGMENT_SCHEMA.names if name != column])
    with pytest.raises(CorruptError, match="not a segment"):
        decode_segment(file_of(batch), where="here")


@pytest.mark.parametrize("column", SEGMENT_SCHEMA.names)
def test_a_column_of_another_type_is_no_segment(column: str) -> None:
    table = pa.Table.from_batches([segment_of(SHARDS)])
    place = table.column_names.index(column)
    other = table.set_column(place, column, pa.array([0.5] * len(SHARDS)))
    with pytest.raises(CorruptError, match="not a segment"):
        decode_segment(file_of(other.to_batches()[0]), where="here")


def test_columns_of_a_later_version_are_left_out() -> None:
    table = pa.Table.from_batches([segment_of(SHARDS)]).add_column(3, "later", pa.array([1] * len(SHARDS)))
    batch = decode_segment(file_of(table.to_batches()[0]), where="here")
    assert list(Segments([batch])) == SHARDS


def test_a_segment_from_before_layouts_reads_as_shards_without_one() -> None:
    batch = segment_of(SHARDS).select([name for name in SEGMENT_SCHEMA.names if name != "layout"])
    assert list(Segments([decode_segment(file_of(batch), where="here")])) == SHARDS


def test_a_layout_comes_back_as_it_went_in() -> None:
    mask = ColumnLayout(name="loss_mask", dtype="uint8", values_start=4096)
    shards = [msgspec.structs.replace(SHARDS[0], layout=ShardLayout(columns=(mask,))), SHARDS[1]]
    assert list(Segments([decode_segment(encode_segment(segment_of(shards)), where="here")])) == shards


def test_a_layout_that_is_none_is_damage() -> None:
    table = pa.Table.from_batches([segment_of(SHARDS[:1])])
    place = table.column_names.index("layout")
    other = table.set_column(place, SEGMENT_SCHEMA.field("layout"), pa.array([b"{"], pa.binary()))
    segments = Segments([decode_segment(file_of(other.to_batches()[0]), where="here")])
    with pytest.raises(CorruptError, match="ShardLayout"):
        segments.shard(0)
