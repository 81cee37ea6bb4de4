"""Rows of any schema come back from both formats: whole, batch by batch, and after the schema has changed."""

import datetime as dt
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.durability.verify import verify
from datastore.dataset.operations.evolve import evolve
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError
from datastore.formats.evolution import SchemaChange, adapt, changed
from datastore.formats.fitting import without_hidden_indices
from datastore.formats.records import RecordFormat, check_format, decode_batch, decode_records, encode_records
from datastore.formats.schema import check_storable, decode_schema, encode_schema, parse_type
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.memory import MemoryStorage

NAMES = st.sampled_from(["a", "b", "text", "x_1", "Ä"])
FORMATS = st.sampled_from(["arrow", "parquet"])
EPOCH = dt.datetime(1970, 1, 1)  # noqa: DTZ001 - Arrow's timestamps without a zone
SECONDS = st.integers(0, 2**31).map(lambda seconds: EPOCH + dt.timedelta(seconds=seconds))
DATES = st.dates(dt.date(1900, 1, 1), dt.date(2200, 1, 1))

TEXTS = st.text(st.characters(codec="utf-8"), max_size=12)
LEAVES: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.int8(): st.integers(-128, 127),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float32(): st.floats(allow_nan=False, width=32),
    pa.float64(): st.floats(allow_nan=False),
    pa.bool_(): st.booleans(),
    pa.string(): TEXTS,
    pa.large_string(): TEXTS,
    pa.binary(): st.binary(max_size=12),
    pa.large_binary(): st.binary(max_size=12),
    pa.binary(3): st.binary(min_size=3, max_size=3),
    pa.date32(): DATES,
    pa.date64(): DATES,
    pa.timestamp("s"): SECONDS,
    pa.timestamp("us"): SECONDS,
    pa.time32("s"): st.times().map(lambda time: time.replace(microsecond=0)),
    pa.time64("us"): st.times(),
    pa.duration("ms"): st.integers(0, 2**31).map(lambda count: dt.timedelta(milliseconds=count)),
    pa.decimal128(9, 2): st.integers(-(10**8), 10**8).map(lambda count: Decimal(count).scaleb(-2)),
    pa.null(): st.none(),
    pa.dictionary(pa.int8(), pa.string()): st.sampled_from(["cat", "dog", ""]),
    pa.dictionary(pa.int32(), pa.large_string()): st.sampled_from(["cat", "dog", ""]),
}
EXTENSIONS: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.json_(): st.sampled_from(["{}", '{"a": 1}']),
    pa.uuid(): st.binary(min_size=16, max_size=16),
}


def nested(inner: st.SearchStrategy[pa.DataType]) -> st.SearchStrategy[pa.DataType]:
    item = st.builds(
        lambda kind, null: pa.field("item", kind, nullable=null or kind == pa.null()), inner, st.booleans()
    )
    named = st.builds(pa.field, NAMES, inner)
    return st.one_of(
        st.builds(pa.list_, item),
        st.builds(pa.large_list, item),
        st.builds(pa.list_, item, st.integers(0, 3)),
        st.builds(pa.struct, st.lists(named, min_size=1, max_size=3, unique_by=lambda field: field.name)),
        st.builds(lambda kind: pa.map_(pa.string(), kind), inner),
    )


TYPES = st.one_of(st.recursive(st.sampled_from(list(LEAVES)), nested, max_leaves=4), st.sampled_from(list(EXTENSIONS)))


def values_of(kind: Any, *, nullable: bool = True) -> st.SearchStrategy[Any]:
    if kind in LEAVES or kind in EXTENSIONS:
        found = (LEAVES | EXTENSIONS)[kind]
    elif pa.types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        found = st.fixed_dictionaries({field.name: values_of(field.type, nullable=field.nullable) for field in fields})
    elif pa.types.is_map(kind):
        found = st.lists(st.tuples(TEXTS, values_of(kind.item_type)), max_size=3)
    else:
        item = values_of(kind.value_type, nullable=kind.value_field.nullable)
        sizes = (kind.list_size, kind.list_size) if pa.types.is_fixed_size_list(kind) else (0, 3)
        found = st.lists(item, min_size=sizes[0], max_size=sizes[1])
    return st.none() | found if nullable else found


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Rows of some schema, often a slice of more rows."""
    names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
    kinds = [draw(TYPES) for _ in names]
    fields = [
        pa.field(name, kind, nullable=kind == pa.null() or draw(st.booleans()))
        for name, kind in zip(names, kinds, strict=True)
    ]
    rows = draw(st.integers(0, 8))
    columns = [
        pa.array([draw(values_of(field.type, nullable=field.nullable)) for _ in range(rows)], field.type)
        for field in fields
    ]
    start = draw(st.integers(0, rows))
    return pa.table(columns, schema=pa.schema(fields)).slice(start, draw(st.integers(0, rows)))


def storable(schema: pa.Schema, kind: RecordFormat) -> bool:
    check_storable(schema)
    try:
        check_format(schema, format=kind)
    except ConfigError:
        assert kind == "parquet"
        return False
    return True


@given(tables(), FORMATS, st.integers(1, 200))
@settings(deadline=None, max_examples=300)
def test_rows_of_any_schema_come_back_whole_and_batch_by_batch(
    table: pa.Table, kind: RecordFormat, batch_bytes: int
) -> None:
    if not storable(table.schema, kind):
        return
    encoded = encode_records(table, format=kind, batch_bytes=batch_bytes)
    back = adapt(decode_records(encoded.data, format=kind), table.schema)
    back.validate(full=True)
    assert back.schema.equals(table.schema, check_metadata=True)
    assert back.equals(table)
    batches = [decode_batch(encoded.data, index, format=kind) for index in range(len(encoded.batches))]
    assert [batch.num_rows for batch in batches] == [span.rows for span in encoded.batches]
    again = pa.Table.from_batches([adapt(batch, table.schema) for batch in batches], table.schema)
    assert again.equals(table)


@given(tables(), FORMATS, st.integers(1, 200))
@settings(deadline=None, max_examples=100)
def test_batches_lie_in_the_file_one_after_the_other_and_each_reaches_its_size_only_with_its_last_row(
    table: pa.Table, kind: RecordFormat, batch_bytes: int
) -> None:
    if not storable(table.schema, kind):
        return
    encoded = encode_records(table, format=kind, batch_bytes=batch_bytes)
    at = 0
    for span in encoded.batches:
        assert at <= span.start < span.stop <= len(encoded.data)
        at = span.stop
    if kind == "arrow":
        start = 0
        shared = table.combine_chunks().slice(0, 0).nbytes
        for span in encoded.batches:
            if span.rows > 1:
                assert table.combine_chunks().slice(start, span.rows - 1).nbytes - shared < batch_bytes
            start += span.rows


@given(TYPES)
def test_a_type_is_read_from_the_text_that_arrow_prints(kind: pa.DataType) -> None:
    assert parse_type(str(kind)).equals(kind)


@given(tables())
@settings(deadline=None)
def test_a_schema_survives_its_bytes(table: pa.Table) -> None:
    assert decode_schema(encode_schema(table.schema)).equals(table.schema, check_metadata=True)


@given(st.lists(st.tuples(tables(), FORMATS), min_size=1, max_size=3))
@settings(deadline=None, max_examples=60)
def test_a_dataset_gives_back_what_was_written_in_either_format(parts: list[tuple[pa.Table, RecordFormat]]) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    schema = parts[0][0].schema
    expected = []
    for table, kind in parts:
        if table.schema.equals(schema) and storable(schema, kind):
            with record_writer(storage, schema=schema, format=kind) as out:
                out.write(table)
            expected += table.to_pylist()
    if not expected:
        return
    dataset = open_dataset(storage)
    assert list(dataset.iter_records()) == expected
    assert dataset.to_arrow().to_pylist() == expected
    name = schema.names[-1]
    assert list(dataset.iter_records(columns=[name])) == [{name: row[name]} for row in expected]
    assert verify(dataset).ok


Row = dict[str, Any]
Step = Callable[[MemoryStorage, list[Row]], list[Row]]


def add(name: str, default: int | None) -> Step:
    def step(storage: MemoryStorage, rows: list[Row]) -> list[Row]:
        evolve(storage, add={name: "int32"}, defaults={} if default is None else {name: default})
        return [row | {name: default} for row in rows]

    return step


def drop(name: str) -> Step:
    def step(storage: MemoryStorage, rows: list[Row]) -> list[Row]:
        evolve(storage, drop=[name])
        return [{key: value for key, value in row.items() if key != name} for row in rows]

    return step


def rename(old: str, new: str) -> Step:
    def step(storage: MemoryStorage, rows: list[Row]) -> list[Row]:
        evolve(storage, rename={old: new})
        return [{new if key == old else key: value for key, value in row.items()} for row in rows]

    return step


def widen(name: str) -> Step:
    def step(storage: MemoryStorage, rows: list[Row]) -> list[Row]:
        evolve(storage, widen={name: "int64"})
        return rows

    return step


def append(value: int, kind: RecordFormat) -> Step:
    def step(storage: MemoryStorage, rows: list[Row]) -> list[Row]:
        row = dict.fromkeys(open_dataset(storage).schema.names, value)
        with record_writer(storage, format=kind) as out:
            out.write(row)
        return [*rows, row]

    return step


LETTERS = st.sampled_from("abcd")
STEPS = st.one_of(
    st.builds(add, LETTERS, st.none() | st.integers(0, 9)),
    st.builds(drop, LETTERS),
    st.builds(rename, LETTERS, LETTERS),
    st.builds(widen, LETTERS),
    st.builds(append, st.integers(10, 99), FORMATS),
)


@given(st.lists(STEPS, max_size=8))
@settings(deadline=None, max_examples=100)
def test_after_any_changes_every_version_reads_as_if_all_its_rows_had_been_written_with_its_schema(
    steps: list[Step],
) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    with record_writer(storage, schema={"a": "int32", "b": "int16"}) as out:
        out.write({"a": 1, "b": 2})
    rows: list[Row] = [{"a": 1, "b": 2}]
    history = [rows]
    for step in steps:
        before = open_dataset(storage).version
        try:
            changed = step(storage, rows)
        except ConfigError:  # No such column, or there already: the dataset is what it was.
            continue
        if open_dataset(storage).version == before:  # The last change of columns given again, which is done already.
            continue
        rows = changed
        history.append(rows)
    assert open_dataset(storage).version == len(history)
    for version, expected in enumerate(history, 1):
        dataset = open_dataset(storage, version=version)
        assert list(dataset.iter_records()) == expected
        assert dataset.to_arrow().to_pylist() == expected
        for name in dataset.schema.names:
            assert [row[name] for row in dataset.iter_records(columns=[name])] == [row[name] for row in expected]


@given(tables(), st.data())
@settings(deadline=None, max_examples=100)
def test_columns_of_any_type_can_be_added_to_dropped_from_and_renamed_in_rows_of_any_schema(
    table: pa.Table, data: st.DataObject
) -> None:
    table = without_hidden_indices(table)
    kind = data.draw(TYPES, label="type of the added column")
    name = data.draw(st.sampled_from(table.column_names), label="renamed")
    schema = changed(table.schema, SchemaChange(rename={name: "new name"}, add={"added": kind}))
    new = adapt(table, schema)
    new.validate(full=True)
    assert new.schema.equals(schema, check_metadata=True)
    assert new.drop_columns(["added"]).equals(table.rename_columns({name: "new name"}))
    assert new.column("added").null_count == table.num_rows
    less = changed(schema, SchemaChange(drop=["added"], rename={"new name": name}))
    assert adapt(new, less).equals(table)


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_values_that_rows_share_are_no_reason_for_small_batches(kind: RecordFormat) -> None:
    labels = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 10_000]))
    encoded = encode_records(pa.table({"label": labels}), format=kind, batch_bytes=1000)
    assert len(encoded.batches) < 10
