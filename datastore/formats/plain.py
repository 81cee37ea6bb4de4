"""Rows of Python values as Arrow, refused unless they read back as they were given.

Arrow takes many things for others without a word: a datetime for a date, a Decimal for a float, bytes for text, a dict with
a key too many for a struct. So what it made is read back and compared. Equal lists are found by one comparison in C; only
where that says no is each value looked at, by the rules below.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from datastore.errors import ConfigError
from datastore.formats.fitting import fit_array

__all__ = ["python_rows", "python_values", "same_values", "table_of_rows"]

_HINT = "Write values that the column's type holds, or choose another type."


@dataclass(frozen=True, slots=True)
class _Change:
    """The first value that did not come back."""

    row: int
    path: str
    """Below the column: `.role`, `[]`, `{}`; empty for the column's own value."""

    given: Any
    stored: Any


def python_values(column: Any, *, name: str) -> list[Any]:
    """Return the values of the array `column`, called `name`, as Python has them.

    Raises:
        ConfigError: Python has no form of one: a year past 9999, a time of day finer than a microsecond.
    """
    try:
        if pa.types.is_time64(column.type) and column.type.unit == "ns":
            column = column.cast(pa.time64("us"))  # Python would leave out the nanoseconds without a word.
        return list(column.to_pylist())
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise ConfigError(
            f"a value has no form in Python: {str(error).splitlines()[0]}",
            column=name,
            type=str(column.type),
            hint="Leave out the column, or read Arrow: `iter_batches`.",
        ) from None


def python_rows(rows: "pa.RecordBatch | pa.Table") -> list[dict[str, Any]]:
    """Return `rows` as dicts.

    Raises:
        ConfigError: as `python_values`.
    """
    names = rows.schema.names
    if not names:
        return [{} for _ in range(rows.num_rows)]
    columns = [python_values(column, name=name) for name, column in zip(names, rows.columns, strict=True)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def table_of_rows(rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None) -> pa.Table:
    """Return `rows` as a table of `schema`, or of the types that their values have.

    Raises:
        ConfigError: a row lacks a key or has one too many, at any depth; or a value would not read back as it was given.
    """
    names = list(rows[0] if schema is None else schema.names)
    for number, row in enumerate(rows):
        # Arrow would fill a missing column with nulls and drop an unknown one, both without a word.
        if row.keys() != set(names):
            raise ConfigError(
                "a row has other columns than the schema",
                row=number,
                columns=sorted(row),
                schema=sorted(names),
                hint="Give each row every column; None stands for no value.",
            )
    columns = {name: [row[name] for row in rows] for name in names}
    fields = [None if schema is None else schema.field(name) for name in names]
    arrays = [_from_values(columns[name], name, field) for name, field in zip(names, fields, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema) if schema else pa.Table.from_arrays(arrays, names=names)


def same_values(given: Sequence[Any], array: Any) -> _Change | None:
    """Return the first of `given` that `array` does not give back, or None if all are there.

    Numbers are compared by value, NaN with NaN; a list may have come as a tuple or a NumPy array, a map as pairs or a
    mapping, a number as NumPy's.
    """
    try:
        stored = array.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):
        stored = [_shown(value) for value in array]  # Times that Python's own types cannot hold.
    try:
        if stored == list(given) and not _has_bool_for_number(given, array.type):
            return None
    except ValueError:
        pass  # NumPy does not say of arrays whether they are equal.
    for row, (one, other) in enumerate(zip(given, stored, strict=True)):
        found = _difference(one, other)
        if found is not None:
            return _Change(row, *found)
    return None


def _from_values(values: list[Any], path: str, field: "pa.Field[Any] | None") -> Any:
    """Return Python values as an array that gives them back."""
    if field is not None and _has_map(field.type):
        _check_maps(values, field.type, path)
    try:
        array: Any = pa.array(values, type=field.type if field is not None else None)
        array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ConfigError(f"rows do not fit the schema: {error}", column=path, hint=_HINT) from None
    if field is not None:
        array = fit_array(array, field, path)
    changed = same_values(values, array)
    if changed is not None:
        raise ConfigError(
            "rows do not fit the schema: a value would not read back as it was given",
            column=f"{path}{changed.path}",
            row=changed.row,
            value=_text(changed.given),
            stored=_text(changed.stored),
            type=str(array.type),
            hint="Give each struct the same keys, None for no value; write values that the column's type holds.",
        )
    return array


def _text(value: Any) -> Any:
    """Return what an error can show of `value`."""
    return f"a {value.type} that Python has no value for" if isinstance(value, pa.Scalar) else value


def _shown(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (pa.ArrowException, ValueError, OverflowError):
        return scalar


def _has_map(kind: Any) -> bool:
    return pa.types.is_map(kind) or any(_has_map(kind.field(index).type) for index in range(kind.num_fields))


def _check_maps(values: Any, kind: Any, path: str) -> None:
    """Refuse entries of maps that are no pairs, or have no key: pyarrow does not look at them before it relies on it."""
    if pa.types.is_map(kind):
        for value in values:
            pairs = value.items() if isinstance(value, Mapping) else value
            entries = list(pairs) if isinstance(pairs, Iterable) and not isinstance(pairs, str | bytes) else []
            wrong = [e for e in entries if not isinstance(e, tuple | list) or len(e) != 2 or e[0] is None]
            if wrong:
                raise ConfigError(
                    "an entry of a map is no pair", column=path, value=wrong[0], hint="Give key and value."
                )
            _check_maps([entry[1] for entry in entries], kind.item_type, f"{path}{{}}")
    elif pa.types.is_struct(kind):
        for field in (kind.field(index) for index in range(kind.num_fields)):
            below = [value[field.name] for value in values if isinstance(value, Mapping) and field.name in value]
            _check_maps(below, field.type, f"{path}.{field.name}")
    elif kind.num_fields == 1:
        items = [item for value in values if isinstance(value, list | tuple | np.ndarray) for item in value]
        _check_maps(items, kind.field(0).type, f"{path}[]")


def _has_bool_for_number(given: Iterable[Any], kind: Any) -> bool:
    """Return whether a True may have been taken for a 1, which Python calls equal."""
    if kind.num_fields == 0:
        number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
        return number and any(isinstance(value, bool) for value in given)
    return any(map(_holds_bool, given))


def _holds_bool(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_bool, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_bool, value))
    return isinstance(value, bool)


def _difference(given: Any, stored: Any) -> tuple[str, Any, Any] | None:
    """Return path, given and stored of the first difference."""
    if isinstance(given, np.generic):
        given = given.item() if not isinstance(given, np.datetime64 | np.timedelta64) else given
    if isinstance(given, np.ndarray):
        given = given.tolist()
    if isinstance(stored, list):
        return _in_list(given, stored)
    if isinstance(stored, dict):
        return _in_struct(given, stored)
    return None if _is_same(given, stored) else ("", given, stored)


def _in_list(given: Any, stored: list[Any]) -> tuple[str, Any, Any] | None:
    if isinstance(given, Mapping):  # A map, which comes back as pairs.
        given = list(given.items())
    if isinstance(given, pa.Array | pa.ChunkedArray):
        given = given.to_pylist()
    if isinstance(given, str | bytes | AbstractSet) or not hasattr(given, "__len__") or len(given) != len(stored):
        return "", given, stored
    for one, other in zip(given, stored, strict=True):
        pair = isinstance(other, tuple) and isinstance(one, tuple | list) and len(one) == 2
        parts = zip(one, other, strict=True) if pair else [(one, other)]
        found = next(filter(None, (_difference(*part) for part in parts)), None)
        if found is not None:
            return f"{'{}' if isinstance(other, tuple) else '[]'}{found[0]}", found[1], found[2]
    return None


def _in_struct(given: Any, stored: dict[str, Any]) -> tuple[str, Any, Any] | None:
    if not isinstance(given, Mapping):
        return "", given, stored
    if given.keys() != stored.keys():
        return "", sorted(map(str, given)), sorted(stored)
    for name, value in stored.items():
        found = _difference(given[name], value)
        if found is not None:
            return f".{name}{found[0]}", found[1], found[2]
    return None


def _is_same(given: Any, stored: Any) -> bool:
    if given is None or stored is None:
        return given is stored
    if isinstance(given, pa.Scalar):
        given = _shown(given)
    if isinstance(stored, pa.Scalar) or isinstance(given, np.datetime64 | np.timedelta64):
        return _is_same_in_arrow(given, stored)
    if isinstance(given, bool) is not isinstance(stored, bool):
        return False
    if isinstance(given, date) and isinstance(given, datetime) is not isinstance(stored, datetime):
        return False
    both_nan = isinstance(given, float) and isinstance(stored, float) and math.isnan(given) and math.isnan(stored)
    return both_nan or bool((bytes(given) if isinstance(given, bytearray | memoryview) else given) == stored)


def _is_same_in_arrow(given: Any, stored: Any) -> bool:
    """Compare what Python's own types do not hold: Arrow has to say."""
    try:
        wanted = pa.scalar(given)
        found = stored if isinstance(stored, pa.Scalar) else pa.scalar(stored)
        return bool(wanted.cast(found.type).equals(found) and found.cast(wanted.type).equals(wanted))
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
