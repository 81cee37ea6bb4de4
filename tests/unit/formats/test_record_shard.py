"""Record shards: any schema, batches of a size that is worth a request."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datastore.errors import ConfigError, CorruptError
from datastore.formats.fitting import check_rows
from datastore.formats.records import BATCH_BYTES, check_format, decode_records, encode_records
from datastore.formats.schema import check_storable, decode_schema, encode_schema, parse_type, record_schema

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


class OursType(pa.ExtensionType):
    def __init__(self) -> None:
        super().__init__(pa.int64(), "ours.number")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""


OURS = OursType()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (OURS, "an extension type that other readers do not know"),
        (pa.list_(OURS), "an extension type that other readers do not know"),
        (pa.string_view(), "a column is a view"),
        (pa.struct({"a": pa.list_view(pa.int8())}), "a column is a view"),
        (pa.struct([("a", pa.int8()), ("a", pa.int8())]), "two columns have the same name"),
    ],
)
def test_types_that_others_could_not_read_are_refused(kind: pa.DataType, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check_storable(pa.schema({"x": kind}))


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.int8(), 0),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
        pa.run_end_encoded(pa.int32(), pa.string()),
        pa.month_day_nano_interval(),
        pa.dictionary(pa.int8(), pa.int64()),
    ],
    ids=str,
)
def test_what_parquet_does_not_give_back_is_refused_with_the_column_s_name(kind: pa.DataType) -> None:
    schema = pa.schema({"fine": pa.int8(), "bad": kind})
    check_format(schema, format="arrow")
    with pytest.raises(ConfigError, match=r"cannot be stored as Parquet.*column='bad'"):
        check_format(schema, format="parquet")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("str", pa.string()),
        ("float32", pa.float32()),
        ("list<string>", pa.list_(pa.string())),
        ("list< struct<role: string, content: string> >", pa.list_(pa.struct({"role": "string", "content": "string"}))),
        ("fixed_size_list<float>[768]", pa.list_(pa.float32(), 768)),
        ("dictionary<string>", pa.dictionary(pa.int32(), pa.string())),
        ("timestamp[us, tz=Europe/Berlin]", pa.timestamp("us", "Europe/Berlin")),
        ("timestamp[ms]", pa.timestamp("ms")),
        ("fixed_size_binary[16]", pa.binary(16)),
        ("extension<arrow.json>", pa.json_()),
        ("map<string, list<int8>>", pa.map_(pa.string(), pa.list_(pa.int8()))),
    ],
)
def test_a_type_is_written_as_people_would(text: str, kind: pa.DataType) -> None:
    assert parse_type(text).equals(kind)


@pytest.mark.parametrize(
    "text",
    ["", "number", "list<", "list<>", "list<int8", "list<int8>>", "struct<int8>", "fixed_size_list<int8>", "image/"],
)
def test_what_is_no_type_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a type"):
        record_schema({"x": text})


def test_a_media_type_makes_a_column_of_bytes_that_says_what_they_are() -> None:
    schema = record_schema({"photo": "image/jpeg not null", "sound": "audio/*"})
    assert schema.field("photo").equals(pa.field("photo", pa.binary(), nullable=False))
    assert schema.field("sound").metadata == {b"media_type": b"audio/*"}
    table = pa.table([[b"x"], [None]], schema=schema)
    for kind in ("arrow", "parquet"):
        back = decode_records(encode_records(table, format=kind).data, format=kind)  # type: ignore[arg-type]
        assert back.schema.equals(schema, check_metadata=True)


def test_the_footer_of_a_parquet_shard_does_not_repeat_its_texts() -> None:
    rows = pa.table(
        {"text": [f"{index}" + "x" * 4000 for index in range(10_000)], "id": [f"id-{i}" for i in range(10_000)]}
    )
    encoded = encode_records(rows, format="parquet", batch_bytes=2**16)
    assert len(encoded.batches) > 5
    assert len(encoded.data) - encoded.batches[-1].stop < 1000 * len(encoded.batches)
    group = pq.read_metadata(pa.BufferReader(pa.py_buffer(encoded.data))).row_group(0)
    assert [group.column(index).is_stats_set for index in range(2)] == [False, True]
