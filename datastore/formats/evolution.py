"""How a schema changes, and how rows of an older schema are read as rows of a newer one: pure functions.

Columns are told apart by number, not by name, so a column that is dropped and added again starts empty. The number of
a column stands in its field's metadata under `PARQUET:field_id`, which Parquet stores in its own way, too. A schema
that was never changed has no numbers: its columns count from 1. So nothing is rewritten, and the price is one cast, or
one column of a default value, for each batch of an old shard that is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa

from datastore.errors import ConfigError, CorruptError
from datastore.formats.fitting import fit_array
from datastore.formats.schema import SchemaLike, parse_field, record_schema

__all__ = [
    "DEFAULT",
    "SchemaChange",
    "adapt",
    "changed",
    "column_ids",
    "is_numbered",
    "schema_id",
    "source_names",
    "without_numbers",
]

FIELD_ID = b"PARQUET:field_id"
DEFAULT = b"datastore:default"
"""Key in a field's metadata: what rows have that are older than the column, as JSON; null if there is none."""

NEXT_ID = b"datastore:next_field_id"
"""Key in a numbered schema's metadata: the number of the next column. Numbers are never used again."""

_WIDER: dict[str, tuple[str, ...]] = {
    "int8": ("int16", "int32", "int64"),
    "int16": ("int32", "int64"),
    "int32": ("int64",),
    "uint8": ("uint16", "uint32", "uint64", "int16", "int32", "int64"),
    "uint16": ("uint32", "uint64", "int32", "int64"),
    "uint32": ("uint64", "int64"),
    "halffloat": ("float", "double"),
    "float": ("double",),
    "string": ("large_string",),
    "binary": ("large_binary",),
}
"""Types that hold every value of another, exactly."""

SCHEMA_ID = b"datastore:schema_id"
"""Key in a numbered schema's metadata: how many changes it is made of. Shards of it are noted with that number."""

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


@dataclass(frozen=True, slots=True)
class SchemaChange:
    """What to do with the columns of a schema: first drop, then rename, then widen, then add."""

    drop: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    widen: Mapping[str, "str | pa.DataType | pa.Field[Any]"] = field(default_factory=dict)
    """New types; a field that may be null lets its column be null, too."""

    add: SchemaLike = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values of added columns in the rows that are there; null where none is given."""


def is_numbered(schema: pa.Schema) -> bool:
    """Return whether the columns of `schema` have numbers of their own."""
    return NEXT_ID in (schema.metadata or {})


def schema_id(schema: pa.Schema) -> int:
    """Return how many changes `schema` is made of."""
    return int((schema.metadata or {}).get(SCHEMA_ID, 0))


def column_ids(schema: pa.Schema) -> list[int]:
    """Return the number of each column.

    Raises:
        CorruptError: they are not different integers.
    """
    if not any(FIELD_ID in (each.metadata or {}) for each in schema):
        return list(range(1, len(schema) + 1))
    try:
        ids = [int((each.metadata or {})[FIELD_ID]) for each in schema]
    except (KeyError, ValueError):
        ids = []
    if len(set(ids)) != len(schema):
        raise CorruptError("the columns of a schema are not numbered right", hint="Restore the file from a copy.")
    return ids


def without_numbers(schema: pa.Schema) -> pa.Schema:
    """Return `schema` as that of a new dataset: what was noted of its changes, here or elsewhere, left out."""
    fields = [_noted(each, {FIELD_ID: None, DEFAULT: None}) for each in schema]
    return pa.schema(fields, metadata=_merged(schema.metadata, {NEXT_ID: None, SCHEMA_ID: None}))


def changed(schema: pa.Schema, change: SchemaChange) -> pa.Schema:
    """Return the schema that `change` makes of `schema`, numbered.

    Raises:
        ConfigError: a column is not there, or there twice; a type does not widen; a default does not fit.
    """
    following = int((schema.metadata or {}).get(NEXT_ID, len(schema) + 1))
    ids = column_ids(schema)
    columns = {each.name: _noted(each, {FIELD_ID: b"%d" % number}) for each, number in zip(schema, ids, strict=True)}
    for name in change.drop:
        _require(name, columns)
        del columns[name]
    columns = _renamed(columns, change.rename)
    for name, kind in change.widen.items():
        columns[name] = _widened(columns[_require(name, columns)], kind)
    for each in record_schema(change.add):
        if each.name in columns:
            raise ConfigError("the column is there already", column=each.name, hint="Drop it first, or name another.")
        columns[each.name] = _added(each, change.defaults, following)
        following += 1
    unused = sorted(set(change.defaults) - {each.name for each in record_schema(change.add)})
    if unused:
        raise ConfigError("a default is given for a column that is not added", columns=unused, hint="Leave it out.")
    if not columns:
        raise ConfigError("no column would be left", hint="Keep one.")
    notes = {NEXT_ID: b"%d" % following, SCHEMA_ID: b"%d" % (schema_id(schema) + 1)}
    return pa.schema(list(columns.values()), metadata=_merged(schema.metadata, notes))


def source_names(stored: pa.Schema, wanted: pa.Schema) -> list[str]:
    """Return the columns of `stored` that rows of `wanted` are made of."""
    if not is_numbered(wanted):
        return [name for name in stored.names if name in set(wanted.names)]
    ids = set(column_ids(wanted))
    return [each.name for each, number in zip(stored, column_ids(stored), strict=True) if number in ids]


def adapt(rows: Rows, schema: pa.Schema, *, stored: pa.Schema | None = None) -> Rows:
    """Return `rows` as rows of `schema`; `stored` is the schema of their file, if they are only some of its columns.

    Raises:
        CorruptError: they do not have that schema, nor one that it was made of.
    """
    if rows.schema.equals(schema, check_metadata=True):
        return rows
    stored = rows.schema if stored is None else stored
    names: list[str | None]
    if is_numbered(schema):
        present = dict(zip(column_ids(stored), stored.names, strict=True))
        names = [present.get(number) for number in column_ids(schema)]
    else:
        names = list(schema.names)
    try:
        columns = [_column(rows, name, each) for name, each in zip(names, schema, strict=True)]
        return type(rows).from_arrays(columns, schema=schema)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise CorruptError(
            f"a shard has another schema than its version: {error}", hint="Restore the dataset from a copy."
        ) from None


def _cast(column: Any, wanted: "pa.Field[Any]") -> Any:
    try:
        return column.cast(wanted.type)
    except pa.ArrowInvalid:
        # pyarrow reads a null list of fixed size from Parquet with null items, and then does not cast it to a type whose
        # items are never null (26.0.1).
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        fitted = [fit_array(chunk, wanted, wanted.name) for chunk in chunks]
        return pa.chunked_array(fitted, type=wanted.type) if isinstance(column, pa.ChunkedArray) else fitted[0]


def _column(rows: pa.Table | pa.RecordBatch, name: str | None, wanted: "pa.Field[Any]") -> Any:
    if name is not None:
        column = rows.column(name)
        # The names of the items of lists and maps, which Parquet changes, are no part of what types are compared by.
        return column if column.type.equals(wanted.type) else _cast(column, wanted)
    note = (wanted.metadata or {}).get(DEFAULT)
    if note is None:
        if not wanted.nullable:
            raise ValueError(f"no column {wanted.name!r}")
        return pa.nulls(rows.num_rows, wanted.type)
    one = _default(json.loads(note), wanted.type)
    return one.take(pa.repeat(pa.scalar(0, pa.int64()), rows.num_rows))


def _renamed(columns: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    for old in names:
        _require(old, columns)
    renamed = {names.get(name, name): each.with_name(names.get(name, name)) for name, each in columns.items()}
    if len(renamed) != len(columns):
        raise ConfigError("two columns would have the same name", rename=dict(names), hint="Name another.")
    return renamed


def _added(column: "pa.Field[Any]", defaults: Mapping[str, Any], number: int) -> "pa.Field[Any]":
    value = defaults.get(column.name)
    if value is None:
        if not column.nullable:
            raise ConfigError(
                "a column that is never null needs a value for the rows that are there",
                column=column.name,
                hint="Give it a default, or let it be null.",
            )
        return _noted(column, {FIELD_ID: b"%d" % number, DEFAULT: None})
    try:
        # Stored as JSON, so it must come back from there as the same value.
        text = json.dumps(_default(value, column.type)[0].as_py(), default=str)
        kept = _default(json.loads(text), column.type).equals(_default(value, column.type))
        reason = "" if kept else "it changes when it is written as JSON"
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        text, reason = "", str(error)
    if reason:
        raise ConfigError(
            f"the default does not fit the column: {reason}",
            column=column.name,
            type=str(column.type),
            default=value,
            hint="Give a value of its type that JSON can write.",
        )
    return _noted(column, {FIELD_ID: b"%d" % number, DEFAULT: text.encode()})


def _default(value: Any, kind: pa.DataType) -> Any:
    """Return an array of that one value; a text is read as what it writes: a date, a decimal number."""
    if isinstance(value, str) and not pa.types.is_string(kind):
        try:
            return pa.array([value], pa.string()).cast(kind)
        except pa.ArrowNotImplementedError:
            pass
    return pa.array([value], kind)


def _widened(old: "pa.Field[Any]", kind: "str | pa.DataType | pa.Field[Any]") -> "pa.Field[Any]":
    new = parse_field(old.name, kind)
    _check_wider(old.type, new.type, old.name)
    relaxed = isinstance(kind, pa.Field) and kind.nullable
    return old.with_type(new.type).with_nullable(old.nullable or relaxed)


def _check_wider(old: Any, new: Any, where: str) -> None:
    """Raise unless every value of `old` is one of `new`."""
    if old.equals(new) or str(new) in _WIDER.get(str(old), ()) or _wider_decimal(old, new):
        return
    if _wider_list(old, new):
        _check_wider_field(old.field(0), new.field(0), f"{where}[]")
    elif pa.types.is_struct(old) and pa.types.is_struct(new) and old.names == new.names:
        for index in range(old.num_fields):
            _check_wider_field(old.field(index), new.field(index), f"{where}.{old.field(index).name}")
    elif pa.types.is_dictionary(old) and pa.types.is_dictionary(new) and old.value_type.equals(new.value_type):
        _check_wider(old.index_type, new.index_type, where)
    else:
        raise ConfigError(
            "a column can only be widened: each value it may hold must be one of the new type",
            column=where,
            old=str(old),
            new=str(new),
            hint="Add a column of that type under another name.",
        )


def _check_wider_field(old: "pa.Field[Any]", new: "pa.Field[Any]", where: str) -> None:
    if old.nullable and not new.nullable:
        raise ConfigError("a column that may be null cannot become one that is not", column=where, hint="Keep it so.")
    _check_wider(old.type, new.type, where)


def _wider_decimal(old: Any, new: Any) -> bool:
    decimals = pa.types.is_decimal(old) and pa.types.is_decimal(new)
    return decimals and bool(
        old.scale == new.scale and old.precision <= new.precision and old.bit_width <= new.bit_width
    )


def _wider_list(old: Any, new: Any) -> bool:
    """Whether lists of `new` can be as long as those of `old`."""
    if pa.types.is_fixed_size_list(old):
        return pa.types.is_fixed_size_list(new) and bool(old.list_size == new.list_size)
    return (pa.types.is_list(old) and (pa.types.is_list(new) or pa.types.is_large_list(new))) or (
        pa.types.is_large_list(old) and pa.types.is_large_list(new)
    )


def _require(name: str, columns: Mapping[str, object]) -> str:
    if name not in columns:
        raise ConfigError("no such column", column=name, columns=list(columns), hint="Name one that is there.")
    return name


def _noted(column: "pa.Field[Any]", notes: Mapping[bytes, bytes | None]) -> "pa.Field[Any]":
    merged = _merged(column.metadata, notes)
    return column.with_metadata(merged) if merged else column.remove_metadata()


def _merged(
    metadata: Mapping[Any, Any] | None, notes: Mapping[bytes, bytes | None]
) -> dict[bytes | str, bytes | str] | None:
    """Return `metadata` with `notes`; those that are None are removed."""
    merged = {key: value for key, value in {**(metadata or {}), **notes}.items() if value is not None}
    return merged or None
