"""What is written comes back equal, at any depth, or is refused."""

import datetime as dt
import math
import uuid
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError
from datastore.formats.fitting import check_rows
from datastore.formats.plain import table_of_rows
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.memory import MemoryStorage

NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats() | st.sampled_from([0, 1, 255, 2**53 + 1, 0.1, 1e300, -0.0])
OTHERS = st.sampled_from(
    ["007", "a", b"a", True, None, Decimal("0.10"), dt.date(2020, 1, 1), dt.datetime(2020, 1, 1, 5), dt.time(1)]  # noqa: DTZ001
)
LEAVES = [
    pa.int8(), pa.uint8(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.bool_(), pa.string(),
    pa.binary(), pa.large_string(), pa.decimal128(9, 2), pa.decimal128(38, 10), pa.date32(), pa.date64(), pa.time32("s"),
    pa.timestamp("s"), pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.dictionary(pa.int8(), pa.string()), pa.null(),
]  # fmt: skip
WRAPPERS = [
    lambda kind: kind,
    pa.list_,
    pa.large_list,
    lambda kind: pa.list_(kind, 2),
    lambda kind: pa.struct([("x", kind)]),
    lambda kind: pa.struct([("x", kind), ("y", pa.int8())]),
    lambda kind: pa.map_(pa.string(), kind),
    lambda kind: pa.list_(pa.field("item", kind, nullable=kind == pa.null())),
]
TYPES = st.builds(lambda wrap, kind: wrap(kind), st.sampled_from(WRAPPERS), st.sampled_from(LEAVES))


SHAPES = [
    lambda value: value,
    lambda value: [value, value],
    lambda value: {"x": value},
    lambda value: {"x": value, "y": 1},
    lambda value: [("k", value)],
]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, list):  # A map.
        one = list(one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return (type(one) is type(other) and one == other) or (one == other and not isinstance(one, bool | dt.date))


def is_no_map(values: list[Any], kind: pa.DataType) -> bool:
    """Whether a list stands for a map that is none: pyarrow does not survive all of those."""
    pairs = [pair for value in values if isinstance(value, list) for pair in value]
    return pa.types.is_map(kind) and not all(isinstance(pair, tuple) for pair in pairs)


def listed(column: Any) -> list[Any] | None:
    try:
        return column.to_pylist()
    except (OverflowError, ValueError):  # Times that Python has no value for.
        return None


def arrays(values: list[Any], kind: pa.DataType) -> pa.Array | None:
    if is_no_map(values, kind):
        return None
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None


@given(st.lists(NUMBERS | OTHERS, max_size=4), TYPES, TYPES)
@settings(deadline=None, max_examples=400)
def test_a_table_fits_another_schema_with_every_value_or_not_at_all(
    values: list[Any], given_kind: pa.DataType, wanted: pa.DataType
) -> None:
    for wrap in SHAPES:
        array = arrays([wrap(value) for value in values], given_kind)
        if array is None:
            continue
        before = pa.table({"c": array})
        try:
            after = check_rows(before, pa.schema([("c", wanted)]))
        except ConfigError:
            continue
        assert after.schema.field("c").type == wanted
        assert listed(before["c"]) is None or same(listed(before["c"]), listed(after["c"]))


@given(st.lists(NUMBERS | OTHERS, min_size=1, max_size=3), TYPES)
@settings(deadline=None, max_examples=300)
def test_rows_of_python_values_come_back_equal_or_are_refused(values: list[Any], kind: pa.DataType) -> None:
    for wrap in SHAPES:
        rows = [{"c": wrap(value)} for value in values]
        if is_no_map([row["c"] for row in rows], kind):
            continue
        for schema in (pa.schema([("c", kind)]), None):
            try:
                table = table_of_rows(rows, schema)
            except ConfigError:
                continue
            found = listed(table["c"])
            assert found is None or same([row["c"] for row in rows], found)


@pytest.mark.parametrize(
    ("rows", "schema", "path", "value"),
    [
        ([{"m": [{"a": 1}]}, {"m": [{"a": 1, "b": 2}]}], None, "m[]", ["a"]),
        ([{"m": {"a": {"b": 0.1}}}], {"m": "struct<a: struct<b: float>>"}, "m.a.b", 0.1),
        ([{"m": {"k": dt.datetime(2020, 1, 1, 5)}}], {"m": "struct<k: date32[day]>"}, "m.k", None),  # noqa: DTZ001
        ([{"m": b"text"}], {"m": "string"}, "m", b"text"),
        ([{"m": [1, 2]}, {"m": [True]}], {"m": "list<int64>"}, "m", None),
    ],
)
def test_what_would_change_is_named_by_path_and_value(
    rows: list[dict[str, Any]], schema: dict[str, str] | None, path: str, value: Any
) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    with (
        pytest.raises(ConfigError, match="rows do not fit the schema") as caught,
        record_writer(storage, schema=schema) as out,
    ):
        out.write(rows)
    assert caught.value.values["column"] == path
    if value is not None:
        assert caught.value.values["value"] == value


def test_an_empty_list_and_a_null_widen_to_any_type_at_any_depth() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    kind = pa.struct([("a", pa.list_(pa.struct([("b", pa.decimal128(9, 2))]))), ("c", pa.map_(pa.string(), pa.int8()))])
    with record_writer(storage, schema=pa.schema([("m", kind)])) as out:
        out.write(pa.table({"m": [{"a": [], "c": None}, {"a": None, "c": None}, None]}))
        out.write(pa.table({"m": pa.nulls(2)}))
    assert [row["m"] for row in open_dataset(storage).iter_records()] == [
        {"a": [], "c": None}, {"a": None, "c": None}, None, None, None,
    ]  # fmt: skip


def test_views_slices_and_null_lists_of_fixed_size_fit() -> None:
    view = pa.array([["x"], None, ["y", "z"]], pa.list_view(pa.string_view()))[1:]
    assert check_rows(pa.table({"c": view}), pa.schema([("c", pa.list_(pa.string()))]))["c"].to_pylist() == [
        None,
        ["y", "z"],
    ]
    fixed = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2))[1:]
    wanted = pa.list_(pa.field("item", pa.int32(), nullable=False), 2)
    found = check_rows(pa.table({"c": fixed}), pa.schema([("c", wanted)]))
    found.validate(full=True)
    assert found["c"].to_pylist() == [None, [3, 4]]


def test_a_struct_without_a_value_hides_no_index_that_a_reader_refuses() -> None:
    kind = pa.struct([("a", pa.struct([("b", pa.dictionary(pa.int8(), pa.string()))]))])
    storage = MemoryStorage(uuid.uuid4().hex)
    with record_writer(storage, schema=pa.schema([("m", kind)])) as out:
        out.write([{"m": {"a": None}}])
    assert [row["m"] for row in open_dataset(storage).iter_records()] == [{"a": None}]


def test_numpy_values_are_what_they_stand_for() -> None:
    rows = [
        {
            "n": np.int64(3),
            "x": np.float32(0.1),
            "v": np.arange(3),
            "t": np.datetime64("2020-01-01T05", "us"),
            "b": np.bool_(1),
        }
    ]
    table = table_of_rows(rows, None)
    assert table.to_pylist() == [
        {"n": 3, "x": float(np.float32(0.1)), "v": [0, 1, 2], "t": dt.datetime(2020, 1, 1, 5), "b": True}  # noqa: DTZ001
    ]


@pytest.mark.parametrize("entry", [("k", 1, 2), "pair"])
def test_an_entry_of_a_map_that_is_no_pair_is_refused(entry: Any) -> None:
    schema = pa.schema([("m", pa.list_(pa.struct([("x", pa.map_(pa.string(), pa.int64()))])))])
    with pytest.raises(ConfigError, match="an entry of a map is no pair") as caught:
        table_of_rows([{"m": [{"x": [("k", 1)]}, {"x": [entry]}]}], schema)
    assert caught.value.values["column"] == "m[].x"
