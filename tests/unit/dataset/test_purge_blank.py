"""Blank rows: nothing of them is left in the file, whatever its columns are; all other rows are what they were."""

import datetime as dt
import decimal
import uuid

import numpy as np
import pyarrow as pa
import pytest

from datastore.dataset.operations.purge.blank import blank_name, blank_shard, is_blank
from datastore.dataset.shards.files import read_documents, read_record_shard, read_token_shard, write_record_shard
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_shard

UID = "ab" * 16
ROWS = np.array([1, 3], np.int32)
SECRET = "SECRETSECRET"
NUMBER = 0x5345435245545345
"""`SECRETSE` as bytes."""

COLUMNS = {
    "text": (pa.string(), ["a", SECRET, "b", SECRET, None]),
    "large": (pa.large_string(), ["a", SECRET, "b", SECRET, None]),
    "view": (pa.string_view(), ["a", SECRET * 3, "b", SECRET * 2, None]),
    "bytes": (pa.binary(), [b"a", SECRET.encode(), b"", SECRET.encode(), None]),
    "fixed bytes": (pa.binary(12), [b"a" * 12, SECRET.encode(), b"b" * 12, SECRET.encode(), None]),
    "number": (pa.int64(), [1, NUMBER, -1, NUMBER, None]),
    "flag": (pa.bool_(), [True, True, False, True, None]),
    "nan": (pa.float64(), [float("nan"), 1.0, 0.0, float("nan"), None]),
    "price": (
        pa.decimal128(12, 2),
        [decimal.Decimal("1.25"), decimal.Decimal("99.99"), None, decimal.Decimal(7), None],
    ),
    "moment": (pa.timestamp("ns", "UTC"), [1, NUMBER, 3, NUMBER, None]),
    "day": (pa.date32(), [dt.date(2020, 1, 2), dt.date(1999, 9, 9), None, dt.date(2000, 1, 1), None]),
    "hour": (pa.time64("us"), [1, 2, 3, 4, None]),
    "span": (pa.duration("s"), [1, NUMBER, 3, 4, None]),
    "list": (pa.list_(pa.string()), [["a"], [SECRET, "x"], [], [SECRET], None]),
    "embedding": (pa.list_(pa.int64(), 2), [[1, 2], [NUMBER, 3], [4, 5], [NUMBER, NUMBER], None]),
    "chat": (
        pa.list_(pa.struct({"role": pa.string(), "parts": pa.list_(pa.binary())})),
        [[{"role": "u", "parts": [b"x"]}], [{"role": SECRET, "parts": [SECRET.encode()]}], [], [None], None],
    ),
    "struct": (
        pa.struct({"a": pa.string(), "b": pa.int64()}),
        [{"a": "x", "b": 1}, {"a": SECRET, "b": NUMBER}] * 2 + [None],
    ),
    "map": (pa.map_(pa.string(), pa.string()), [[("a", "b")], [(SECRET, "c")], [], [("d", SECRET)], None]),
    "dictionary": (pa.dictionary(pa.int8(), pa.string()), ["a", SECRET, "b", SECRET, None]),
    "uuid": (
        pa.uuid(),
        [bytes(range(16)), SECRET.encode() + b"1234", bytes(range(16)), SECRET.encode() + b"5678", None],
    ),
    "nothing": (pa.null(), [None] * 5),
}


def column_of(name: str, *, required: bool) -> pa.Table:
    kind, values = COLUMNS[name]
    given = [*values[:-1], values[0]] if required else values
    if required:
        given = [values[0] if value is None else value for value in given]
    storable = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    array = pa.array(given, storable)
    array = pa.ExtensionArray.from_storage(kind, array) if storable is not kind else array
    return pa.table([array], schema=pa.schema([pa.field(name, kind, nullable=not required, metadata={"k": "v"})]))


@pytest.mark.parametrize("required", [False, True], ids=["nullable", "required"])
@pytest.mark.parametrize("name", COLUMNS)
def test_nothing_of_a_blank_record_is_left(name: str, required: bool) -> None:  # noqa: FBT001 - a parameter of pytest
    if required and name == "nothing":
        pytest.skip("a column of nulls is nullable")
    storage = MemoryStorage(uuid.uuid4().hex)
    table = column_of(name, required=required)
    shard = write_record_shard(storage, uid=UID, table=table)
    blanked = blank_shard(storage, shard, ROWS, end_of_text=0)
    after = read_record_shard(storage, blanked.shard)
    assert after.schema.equals(table.schema, check_metadata=True)
    for row in (0, 2, 4):
        assert str(after.slice(row, 1).to_pylist()) == str(table.slice(row, 1).to_pylist())
    raw = storage.get(blanked.shard.path)
    assert b"SECRETSE" not in raw
    assert NUMBER.to_bytes(8, "little") not in raw
    if required:
        assert after.column(0).null_count == 0
    else:
        assert after.column(0).slice(1, 1).null_count == after.column(0).slice(3, 1).null_count == 1
    assert (blanked.documents, blanked.shard.documents, blanked.shard.uid) == (0 if name == "nothing" else 2, 5, UID)
    assert is_blank(storage, blanked.shard, ROWS, end_of_text=0)
    assert not is_blank(storage, shard, ROWS, end_of_text=0)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_what_is_blank_already_is_not_counted_again_and_keeps_its_format(form: str) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    table = pa.table({"id": ["a", "b", "c"], "text": ["x", "y", "z"]})
    shard = write_record_shard(storage, uid=UID, table=table, format=form)  # type: ignore[arg-type]
    once = blank_shard(storage, shard, np.array([1], np.int32), end_of_text=0)
    twice = blank_shard(storage, once.shard, np.array([0, 1], np.int32), end_of_text=0)
    assert (once.ids, twice.ids, once.documents, twice.documents) == (("b",), ("a",), 1, 1)
    assert read_record_shard(storage, twice.shard).to_pylist() == [{"id": None, "text": None}] * 2 + [
        {"id": "c", "text": "z"}
    ]
    assert twice.shard.layout.format == form
    assert twice.shard.path.endswith(form)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_the_tokens_of_blank_documents_are_end_of_text_and_all_others_stay(dtype: str) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    shard = make_shard(storage, UID, lengths=[3, 4, 0, 5, 2], dtype=dtype, block_bytes=64)
    before, offsets = read_token_shard(storage, shard)
    blanked = blank_shard(storage, shard, ROWS, end_of_text=7)
    after, same = read_token_shard(storage, blanked.shard)
    assert same.tolist() == offsets.tolist()
    assert after.tolist() == [*before[:3].tolist(), *[7] * 4, *[7] * 5, *before[12:].tolist()]
    documents = read_documents(storage, blanked.shard)
    assert documents.column("tokens").to_pylist() == [3, 4, 0, 5, 2]
    assert documents.column("id").to_pylist() == ["abababab-0", "", "abababab-2", "", "abababab-4"]
    assert [value == bytes(16) for value in documents.column("digest").to_pylist()] == [False, True, False, True, False]
    assert (blanked.ids, blanked.documents, blanked.tokens) == (("abababab-1", "abababab-3"), 2, 9)
    assert blanked.shard.path == f"shards/ab/{blank_name(UID, ROWS)}.arrow"
    assert is_blank(storage, blanked.shard, ROWS, end_of_text=7)
    again = blank_shard(storage, shard, ROWS, end_of_text=7)
    assert again == blanked


def test_a_shard_whose_documents_are_all_blank_names_no_source() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    shard = make_shard(storage, UID, lengths=[1, 2])
    blanked = blank_shard(storage, shard, np.array([0, 1], np.int32), end_of_text=0).shard
    assert (blanked.source_first, blanked.source_last) == ("", "")
    assert is_blank(storage, blanked, np.array([0, 1], np.int32), end_of_text=0)
    assert not is_blank(storage, blanked, np.array([0], np.int32), end_of_text=0)
