"""A token shard: where its buffers lie, what its bytes depend on, what it refuses."""

import numpy as np
import pyarrow as pa
import pytest

from datastore.digest import digest_hex
from datastore.errors import ConfigError, CorruptError
from datastore.formats.arrow import Int, Structs, Table, encode_flatbuffer
from datastore.formats.tokens import (
    ColumnType,
    decode_token_table,
    decode_tokens,
    encode_tokens,
    narrow_tokens,
    token_dtype,
    token_schema,
)


def ascending(lengths: list[int], dtype: str = "uint16") -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(offsets[-1], dtype=dtype), offsets


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("lengths", [[1], [3, 0, 5], [1000] * 17, []])
def test_both_buffers_lie_aligned_where_the_layout_says(lengths: list[int], dtype: str) -> None:
    values, offsets = ascending(lengths, dtype)
    shard = encode_tokens(values, offsets)
    layout = shard.layout
    assert layout.values_start % 64 == layout.offsets_start % 64 == 0
    assert (layout.documents, layout.tokens, layout.dtype) == (len(lengths), values.size, dtype)
    stored = np.frombuffer(shard.data, dtype, values.size, layout.values_start)
    index = np.frombuffer(shard.data, layout.offsets_dtype, len(lengths) + 1, layout.offsets_start)
    assert np.array_equal(stored, values)
    assert np.array_equal(index, offsets)


def test_arrow_finds_the_buffers_at_the_same_places() -> None:
    shard = encode_tokens(*ascending([7, 0, 300]))
    whole = pa.py_buffer(shard.data)
    column = pa.ipc.open_file(whole).get_batch(0).column(0)
    _, offsets, _, values = column.buffers()
    assert offsets.address - whole.address == shard.layout.offsets_start
    assert values.address - whole.address == shard.layout.values_start


def test_the_bytes_are_frozen() -> None:
    # A change of this digest means that shards written before and after differ, so a resumed ingest would too.
    assert digest_hex(encode_tokens(*ascending([5, 0, 60])).data) == "11c44c3edd6479d5d6c9cee330905490"
    assert digest_hex(encode_tokens(*ascending([5, 0, 60], "uint32")).data) == "6d325394948f127a75703de7657bfdb1"


def test_reading_copies_no_tokens() -> None:
    shard = encode_tokens(*ascending([100, 200]))
    values, _ = decode_tokens(shard.data)
    start = np.frombuffer(shard.data, np.uint8).ctypes.data
    assert values.ctypes.data == start + shard.layout.values_start


def test_a_strided_view_is_stored_like_its_copy() -> None:
    values, offsets = ascending([10, 20])
    doubled = np.repeat(values, 2)[::2]
    assert encode_tokens(doubled, offsets).data == encode_tokens(values, offsets).data


@pytest.mark.parametrize(
    "offsets",
    [[0, 3], [0, 6], [1, 5], [0, 4, 3, 5], [], [[0, 5]], [0.0, 5.0]],
    ids=["stop short", "go past the end", "start late", "step back", "none", "not flat", "no integers"],
)
def test_offsets_that_do_not_cut_up_the_tokens_are_refused(offsets: list) -> None:
    with pytest.raises(ConfigError, match="offsets"):
        encode_tokens(np.arange(5, dtype=np.uint16), np.array(offsets))


@pytest.mark.parametrize("values", [np.arange(5), np.zeros((2, 2), np.uint16), np.zeros(4, np.int16)])
def test_only_flat_uint16_and_uint32_are_tokens(values: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="flat array of uint16 or uint32"):
        encode_tokens(values, np.array([0, values.size]))


@pytest.mark.parametrize(
    ("ids", "dtype"), [([70_000], "uint16"), ([-1], "uint16"), ([2**32], "uint32"), ([-5], "uint32")]
)
def test_an_id_that_does_not_fit_is_refused_never_wrapped(ids: list[int], dtype: str) -> None:
    with pytest.raises(ConfigError, match="token id out of range"):
        narrow_tokens(np.array(ids), dtype)


def test_ids_at_the_edge_of_the_range_fit() -> None:
    assert narrow_tokens(np.array([0, 65_535]), "uint16").tolist() == [0, 65_535]
    assert narrow_tokens(np.array([0, 2**32 - 1]), "uint32").tolist() == [0, 2**32 - 1]
    assert narrow_tokens(np.array([], np.int64), "uint16").size == 0


def test_the_dtype_follows_from_the_vocabulary() -> None:
    assert [token_dtype(size) for size in (1, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


def test_a_shard_with_columns_has_frozen_bytes_too() -> None:
    values, offsets = ascending([5, 0, 60])
    columns = {"loss_mask": values % 2 == 0, "logits": np.arange(260, dtype=np.float16).reshape(65, 4)}
    encoded = encode_tokens(values, offsets, columns=columns).data
    assert digest_hex(encoded) == "57c5475317fe8aaa582620653bd49856"
    assert encode_tokens(values, offsets, columns=dict(reversed(columns.items()))).data == encoded


def test_bools_are_stored_as_bytes_of_0_and_1() -> None:
    values, offsets = ascending([4])
    mask = np.array([True, False, True, True])
    found = decode_token_table(encode_tokens(values, offsets, columns={"loss_mask": mask}).data).columns["loss_mask"]
    assert found.dtype == np.uint8
    assert np.array_equal(found, mask)


@pytest.mark.parametrize(
    ("column", "fact"),
    [
        ({"w": np.zeros(3)}, "does not go with the tokens"),
        ({"w": np.zeros((4, 2, 2))}, "does not go with the tokens"),
        ({"w": np.zeros(4, np.complex64)}, "not a type for a column"),
        ({"w": np.zeros((4, 0))}, "not a type for a column"),
        ({"w": np.array(["a"] * 4)}, "not a type for a column"),
        ({"tokens": np.zeros(4)}, "not a name for a column"),
        ({"a b": np.zeros(4)}, "not a name for a column"),
        ({"loss_mask": np.zeros(4, np.float32)}, "one bool for each token"),
        ({"loss_mask": np.full(4, 2, np.uint8)}, "holds 0 and 1"),
    ],
)
def test_a_column_that_does_not_go_with_the_tokens_is_refused(column: dict[str, np.ndarray], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        encode_tokens(*ascending([4]), columns=column)


def test_a_column_that_is_cut_up_otherwise_than_the_tokens_is_damage() -> None:
    schema = token_schema("uint16", columns=[ColumnType("w", "float32")])
    batch = pa.record_batch([pa.array([[1], [2, 3]], schema.field(0).type), [[0.5, 1.5], [2.5]]], schema=schema)
    with pytest.raises(CorruptError, match="its column w is cut up otherwise"):
        decode_tokens(arrow_file(batch))


def arrow_file(*batches: pa.RecordBatch, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def batch_of(*documents: list[int] | None, schema: pa.Schema | None = None) -> pa.RecordBatch:
    schema = schema or token_schema("uint16")
    return pa.record_batch([pa.array(documents, schema.field(0).type)], schema=schema)


def test_a_shard_that_pyarrow_wrote_reads_the_same() -> None:
    values, offsets = decode_tokens(arrow_file(batch_of([1, 2], [], [3])))
    assert (values.tolist(), offsets.tolist()) == ([1, 2, 3], [0, 2, 2, 3])


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"ARROW1",
        b"no arrow at all",
        arrow_file(batch_of([1]), batch_of([2])),
        arrow_file(pa.record_batch({"tokens": pa.array([1, 2])})),
        arrow_file(batch_of([1], schema=pa.schema([pa.field("text", pa.list_(pa.uint16()))]))),
        arrow_file(batch_of([1], None, schema=pa.schema([pa.field("tokens", pa.list_(pa.uint16()))]))),
    ],
    ids=["nothing", "magic", "text", "two batches", "no lists", "other name", "nulls"],
)
def test_what_is_not_a_token_shard_is_said_to_be_none(raw: bytes) -> None:
    with pytest.raises(CorruptError, match="not a token shard"):
        decode_tokens(raw)


def test_a_compressed_shard_still_reads() -> None:
    values, _ = decode_tokens(arrow_file(batch_of([5] * 1000), compression="zstd"))
    assert values.tolist() == [5] * 1000


def test_flatbuffer_fields_are_found_through_the_vtable() -> None:
    raw = encode_flatbuffer(Table((Int("h", 7), None, Structs((b"12345678",)), Int("q", -3))))
    root = int.from_bytes(raw[:4], "little")
    vtable = root - int.from_bytes(raw[root : root + 4], "little", signed=True)
    slots = [int.from_bytes(raw[vtable + 4 + 2 * k : vtable + 6 + 2 * k], "little") for k in range(4)]
    assert slots[1] == 0
    assert int.from_bytes(raw[root + slots[3] : root + slots[3] + 8], "little", signed=True) == -3
    vector = root + slots[2] + int.from_bytes(raw[root + slots[2] : root + slots[2] + 4], "little")
    assert raw[vector : vector + 4] == b"\1\0\0\0"
    assert (vector + 4) % 8 == 0
