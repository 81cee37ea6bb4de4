"""Record shards: any schema, batches of a size that is worth a request."""

import pyarrow as pa
import pytest

from datastore.errors import ConfigError, CorruptError
from datastore.formats.records import BATCH_BYTES, decode_records, encode_records
from datastore.formats.schema import check_rows, decode_schema, encode_schema

NESTED = pa.schema(
    {
        "text": pa.string(),
        "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "image": pa.binary(),
        "vector": pa.list_(pa.float32(), 4),
    }
)


def test_rows_of_any_schema_come_back() -> None:
    row = {"text": "ä", "messages": [{"role": "user", "content": None}], "image": b"\0\1", "vector": [0.5, 1, 2, 3]}
    table = pa.Table.from_pylist([row, dict.fromkeys(NESTED.names)], schema=NESTED)
    assert decode_records(encode_records(table).data).equals(table)


def test_an_empty_shard_keeps_its_schema() -> None:
    assert decode_records(encode_records(NESTED.empty_table()).data).schema.equals(NESTED)


def test_batches_are_a_few_megabytes_each_and_rows_keep_their_order() -> None:
    rows = pa.table({"text": [f"{index:06d}" + "x" * 1000 for index in range(20_000)]})
    raw = encode_records(rows).data
    reader = pa.ipc.open_file(pa.py_buffer(raw))
    sizes = [reader.get_batch(index).nbytes for index in range(reader.num_record_batches)]
    assert all(BATCH_BYTES / 2 < size < 2 * BATCH_BYTES for size in sizes)
    assert decode_records(raw).equals(rows)


def test_one_row_larger_than_a_batch_does_not_make_the_others_small() -> None:
    rows = pa.table({"text": ["x" * 8 * BATCH_BYTES] + ["y"] * 1000})
    reader = pa.ipc.open_file(pa.py_buffer(encode_records(rows).data))
    assert reader.num_record_batches < 15


def test_a_slice_stores_its_own_rows_only() -> None:
    rows = pa.table({"text": ["x" * 1000] * 1000})
    assert len(encode_records(rows.slice(10, 2)).data) < 10_000


def test_a_schema_survives_its_bytes() -> None:
    assert decode_schema(encode_schema(NESTED)).equals(NESTED)


@pytest.mark.parametrize("raw", [b"", b"ARROW1", b"x" * 100])
def test_what_is_not_a_record_shard_is_said_to_be_none(raw: bytes) -> None:
    with pytest.raises(CorruptError, match="not a record shard"):
        decode_records(raw)
    with pytest.raises(CorruptError, match="not an Arrow schema"):
        decode_schema(raw)


def test_rows_of_another_schema_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit the schema"):
        check_rows(pa.table({"n": ["no number"]}), pa.schema({"n": pa.int64()}))
    with pytest.raises(ConfigError, match="do not fit the schema"):
        check_rows(pa.table({"m": [1]}), pa.schema({"n": pa.int64()}))


def test_columns_in_another_order_are_brought_into_the_schema_s() -> None:
    schema = pa.schema({"a": pa.int64(), "b": pa.string()})
    assert check_rows(pa.table({"b": ["x"], "a": [1]}), schema).schema.equals(schema)
