"""Rows made to fit a schema, or refused: what is stored reads back equal to what was given, at any depth.

A column may change its representation (a wider integer, a large list, a dictionary, another unit of time) where each of its
values stays what it is, which is tried and not assumed: it is cast there and back. Whatever would change a value is
refused with its path and the value: a double that no float holds, text that looks like a number, a moment without its day, a
key that the schema lacks, a null where it says `not null`. A column of nulls fits any type that allows them.

Cost: a column that has its type already is handed on without a copy.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from datastore.errors import ConfigError
from datastore.formats.huggingface import check_features, is_hf_array

__all__ = ["check_rows", "fit_array", "without_hidden_indices"]

_HINT = "Write values that the column's type holds, or choose another type."


def check_rows(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return `table` with exactly the columns of `schema`, in its order, each value what it was.

    Raises:
        ConfigError: a column or a field of a struct is missing or unexpected, a null stands where none may, a value
            would not stay what it is, or its class label another one; the message names path, row and value.
    """
    check_features(table.schema, schema)
    missing = sorted(set(schema.names) - set(table.column_names))
    unexpected = sorted(set(table.column_names) - set(schema.names))
    if missing or unexpected or len(table.column_names) != len(schema.names):
        raise ConfigError(
            "rows do not fit the schema: they have other columns",
            missing=missing,
            unexpected=unexpected,
            hint="Write rows of the dataset's schema.",
        )
    return pa.Table.from_arrays([_column(table.column(field.name), field) for field in schema], schema=schema)


def fit_array(array: Any, field: "pa.Field[Any]", path: str) -> Any:
    """Return `array` as the type of `field`; `path` is what errors call it.

    Raises:
        ConfigError: as `check_rows`.
    """
    found = _fit(array, field.type, path)
    if not field.nullable and found.null_count:
        raise _misfit("a value is missing", path, array, int(np.flatnonzero(_nulls(found))[0]))
    return found


def _column(column: Any, field: "pa.Field[Any]") -> Any:
    if column.type.equals(field.type) and field.nullable and _is_plain(field.type):
        return column
    chunks = [fit_array(chunk, field, field.name) for chunk in column.chunks]
    return pa.chunked_array(chunks, type=field.type)


def without_hidden_indices(table: pa.Table) -> pa.Table:
    """Return `table` with nothing below a null that a reader would refuse: its values are the same.

    pyarrow makes an index of 0 into an empty dictionary below a struct that is null, and calls the array invalid when it
    reads it (26.0.1).
    """
    columns = [
        pa.chunked_array([_fit(chunk, chunk.type, field.name) for chunk in column.chunks], type=field.type)
        if _hides_dictionary(field.type)
        else column
        for column, field in zip(table.columns, table.schema, strict=True)
    ]
    return pa.Table.from_arrays(columns, schema=table.schema)


def _is_plain(kind: Any) -> bool:
    """Return whether there is nothing to look at in an array of that type: nulls are allowed anywhere below it."""
    nullable = all(field.nullable and _is_plain(field.type) for field in _children(kind))
    return nullable and not _hides_dictionary(kind)


def _hides_dictionary(kind: Any) -> bool:
    """Return whether a dictionary stands below another type, where a null may hide its indices."""
    return any(kinds.is_dictionary(field.type) or _hides_dictionary(field.type) for field in _children(kind))


def _children(kind: Any) -> "list[pa.Field[Any]]":
    """Return the fields that a type is made of; the keys of a map, which are never null, do not count."""
    return [kind.item_field] if kinds.is_map(kind) else [kind.field(index) for index in range(kind.num_fields)]


def _fit(array: Any, kind: Any, path: str) -> Any:
    if array.type.equals(kind) and _is_plain(kind):
        return array
    if kinds.is_null(array.type):
        return pa.nulls(len(array), kind)
    if kinds.is_dictionary(array.type) and kinds.is_dictionary(kind) and array.type.value_type.equals(kind.value_type):
        renumbered = _renumbered(array, kind)
        if renumbered is not None:
            return renumbered
    decode = _decoder_of(array.type)
    if decode is not None and not array.type.equals(kind):
        return _fit(decode(array), kind, path)
    for concerns, fit in _PARTS:
        if concerns(array.type, kind):
            found = fit(array, kind, path)
            return array if array.type.equals(kind) and not _hides_dictionary(kind) else found
    return array if array.type.equals(kind) else _fit_values(array, kind, path)


def _decoder_of(kind: Any) -> Callable[[Any], Any] | None:
    """Return how to turn an encoding of values into those values, None where they are plain."""
    if kinds.is_dictionary(kind):
        return lambda array: array.dictionary_decode()
    if kinds.is_run_end_encoded(kind):
        return lambda array: pc.call_function("run_end_decode", [array])
    if kinds.is_string_view(kind):
        return lambda array: array.cast(pa.large_string())
    if kinds.is_binary_view(kind):
        return lambda array: array.cast(pa.large_binary())
    if is_hf_array(kind):
        return lambda array: array.storage
    return None


def _fit_extension(array: Any, kind: Any, path: str) -> Any:
    if not isinstance(kind, pa.BaseExtensionType):
        if array.type.extension_name == "arrow.json" and _is_text(kind):  # JSON reads back as its text.
            return _fit(array.storage, kind, path)
        raise _other_type(path, array.type, kind)
    if not isinstance(array.type, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, _fit(array, kind.storage_type, path))
    if array.type.extension_name != kind.extension_name:
        raise _other_type(path, array.type, kind)
    return pa.ExtensionArray.from_storage(kind, _fit(array.storage, kind.storage_type, path))


def _fit_dictionary(array: Any, kind: Any, path: str) -> Any:
    encoded = _fit(array, kind.value_type, path).dictionary_encode()
    try:
        indices = encoded.indices.cast(kind.index_type)
    except pa.ArrowInvalid:
        raise ConfigError(
            "a dictionary has more values than its indices can number",
            column=path,
            values=len(encoded.dictionary),
            type=str(kind),
            hint="Store the column as its values, or use a wider index type.",
        ) from None
    return pa.DictionaryArray.from_arrays(indices, encoded.dictionary, ordered=kind.ordered)


def _renumbered(array: Any, kind: Any) -> Any:
    """Return the same dictionary, its order and its unused values too, under other indices; None if they do not reach."""
    try:
        indices = array.indices.cast(kind.index_type)
    except pa.ArrowInvalid:
        return None
    return pa.DictionaryArray.from_arrays(indices, array.dictionary, ordered=kind.ordered)


def _fit_struct(array: Any, kind: Any, path: str) -> Any:
    wanted = [kind.field(index) for index in range(kind.num_fields)]
    there = [array.type.field(index).name for index in range(array.type.num_fields)]
    names = [field.name for field in wanted]
    if sorted(there) != sorted(names):
        raise ConfigError(
            "rows do not fit the schema: a struct has other fields",
            column=path,
            missing=sorted(set(names) - set(there)),
            unexpected=sorted(set(there) - set(names)),
            hint="Give each struct every field; None stands for no value. Or make a schema that has them all.",
        )
    absent = _nulls(array)
    children = []
    for field in wanted:
        child, below = array.field(there.index(field.name)), f"{path}.{field.name}"
        lost = _nulls(child) & ~absent
        if not field.nullable and lost.any():
            raise _misfit("a value is missing", below, child, int(np.flatnonzero(lost)[0]))
        if absent.any() and not (child.type.equals(field.type) and _is_plain(pa.struct([field]))):
            child = _blanked(child, absent)  # What stands below a null may be anything.
        children.append(_fit(child, field.type, below))
    return pa.StructArray.from_arrays(children, fields=wanted, mask=pa.array(absent))


def _fit_list(array: Any, kind: Any, path: str) -> Any:
    values, lengths, absent = _lists(array)
    items = fit_array(values, kind.value_field, f"{path}[]")
    if kinds.is_fixed_size_list(kind):
        wrong = np.flatnonzero((lengths != kind.list_size) & ~absent)
        if wrong.size:
            raise _misfit(f"a list has not {kind.list_size} items", path, array, int(wrong[0]))
        if absent.any() and kind.list_size:
            # Below a null list may be any items; the first one is at hand, and no null, which they may not allow.
            places = np.zeros((len(lengths), kind.list_size), np.int64)
            places[~absent] = np.arange(len(items)).reshape(-1, kind.list_size)
            items = items.take(pa.array(places.reshape(-1))) if len(items) else _zeros(places.size, items.type)
        there = pa.array(~absent).buffers()[1] if absent.any() else None
        return pa.Array.from_buffers(kind, len(lengths), [there], children=[items])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    wide = kinds.is_large_list(kind)
    if not wide and offsets[-1] >= 2**31:
        raise ConfigError("lists have too many items", column=path, items=int(offsets[-1]), hint="Use large_list.")
    made: Any = pa.LargeListArray if wide else pa.ListArray
    return made.from_arrays(
        pa.array(offsets, pa.int64() if wide else pa.int32()), items, type=kind, mask=pa.array(absent)
    )


def _fit_map(array: Any, kind: Any, path: str) -> Any:
    absent = _nulls(array)
    starts = np.asarray(array.offsets)
    lengths = np.where(absent, 0, np.diff(starts))
    keys = fit_array(_gathered(array.keys, starts[:-1], lengths), kind.key_field, f"{path}{{key}}")
    items = fit_array(_gathered(array.items, starts[:-1], lengths), kind.item_field, f"{path}{{}}")
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    made: Any = pa.MapArray
    return made.from_arrays(offsets, keys, items, kind, mask=pa.array(absent))


def _zeros(count: int, kind: Any) -> Any:
    """Return so many values that stand for nothing, none of them null if the type allows that."""
    try:
        return pa.array(np.zeros(count, np.int8)).cast(kind)
    except pa.ArrowException:
        return pa.nulls(count, kind)


_PARTS: list[tuple[Callable[[Any, Any], bool], Callable[[Any, Any, str], Any]]] = [
    (
        lambda one, other: isinstance(one, pa.BaseExtensionType) or isinstance(other, pa.BaseExtensionType),
        _fit_extension,
    ),
    (lambda _, kind: bool(kinds.is_dictionary(kind)), _fit_dictionary),
    (lambda one, other: bool(kinds.is_struct(one) and kinds.is_struct(other)), _fit_struct),
    (lambda one, other: bool(kinds.is_map(one) and kinds.is_map(other)), _fit_map),
    (lambda one, other: _is_list(one) and _is_list(other), _fit_list),
]
"""Types that are made of others, and how they are fitted part by part."""


def _gathered(values: Any, starts: Any, sizes: Any) -> Any:
    """Return the items of lists that begin at `starts` and have `sizes` items, end to end."""
    ends = np.cumsum(sizes)
    if not len(ends) or not ends[-1]:
        return values.slice(0, 0)
    first = int(starts[np.flatnonzero(sizes)[0]])
    if np.array_equal((starts - first)[sizes > 0], (ends - sizes)[sizes > 0]):
        return values.slice(first, int(ends[-1]))
    try:
        return values.take(pa.array(np.repeat(starts - (ends - sizes), sizes) + np.arange(ends[-1]), pa.int64()))
    except pa.ArrowNotImplementedError:  # Of views pyarrow takes none (26.0.1).
        return pa.concat_arrays([values.slice(int(at), int(size)) for at, size in zip(starts, sizes, strict=True)])


def _lists(array: Any) -> tuple[Any, Any, Any]:
    """Return the items of all lists end to end, the length of each list (0 where it is null), and which are null."""
    absent = _nulls(array)
    if kinds.is_list_view(array.type) or kinds.is_large_list_view(array.type):
        sizes = np.where(absent, 0, np.asarray(array.sizes))
        return _gathered(array.values, np.asarray(array.offsets), sizes), sizes, absent
    lengths = np.where(absent, 0, pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False))
    return array.flatten(), lengths, absent


def _fit_values(array: Any, kind: Any, path: str) -> Any:
    """Cast plain values there and back; refuse the first that is not what it was."""
    if _family(array.type) != _family(kind) and (_family(array.type), _family(kind)) not in _RELATED:
        raise _other_type(path, array.type, kind)
    try:
        found = array.cast(kind)
        changed = _differs(found.cast(array.type), array)
    except (pa.ArrowException, ValueError, OverflowError):
        raise _misfit(f"a value is no {kind}", path, array, _first_that_fails(array, kind)) from None
    if changed.any():
        raise _misfit(f"a value would change as {kind}", path, array, int(np.flatnonzero(changed)[0]))
    return found


_RELATED = {("integer", "floating"), ("floating", "integer"), ("integer", "decimal"), ("decimal", "integer")}
"""Families whose values may be equal; all others never are: text is no number, and an instant is no date."""


def _family(kind: Any) -> str:
    tests: dict[str, Callable[[Any], Any]] = {
        "integer": kinds.is_integer,
        "floating": kinds.is_floating,
        "decimal": kinds.is_decimal,
        "text": _is_text,
        "bytes": _is_bytes,
        "date": kinds.is_date,
        "time": kinds.is_time,
        "duration": kinds.is_duration,
        "instant": lambda kind: kinds.is_timestamp(kind) and kind.tz is not None,
        "local time": lambda kind: kinds.is_timestamp(kind) and kind.tz is None,
    }
    return next((name for name, is_one in tests.items() if is_one(kind)), str(kind))


def _differs(one: Any, other: Any) -> Any:
    """Return which values of two arrays of one type differ; a NaN is equal to a NaN, and 0.0 is not -0.0."""
    if not kinds.is_floating(one.type):
        return ~pc.fill_null(pc.equal(one, other), True).to_numpy(zero_copy_only=False) | (_nulls(one) != _nulls(other))
    width = f"i{one.type.bit_width // 8}"
    values = [array.fill_null(0).to_numpy(zero_copy_only=False) for array in (one, other)]
    both_nan = np.isnan(values[0]) & np.isnan(values[1])
    return (values[0].view(width) != values[1].view(width)) & ~both_nan


def _first_that_fails(array: Any, kind: Any) -> int:
    """Return the place of the first value that cannot be cast, found by halving."""
    start, stop = 0, len(array)
    while stop - start > 1:
        middle = (start + stop) // 2
        try:
            array[start:middle].cast(kind)
        except (pa.ArrowException, ValueError, OverflowError):
            stop = middle
        else:
            start = middle
    return start


def _blanked(array: Any, absent: Any) -> Any:
    return array.take(pa.array(np.arange(len(array)), mask=absent))


def _nulls(array: Any) -> Any:
    return array.is_null().to_numpy(zero_copy_only=False)


def _is_list(kind: Any) -> bool:
    lists = (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list, kinds.is_list_view, kinds.is_large_list_view)
    return any(is_one(kind) for is_one in lists)


def _is_text(kind: Any) -> bool:
    return bool(kinds.is_string(kind) or kinds.is_large_string(kind))


def _is_bytes(kind: Any) -> bool:
    return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_fixed_size_binary(kind))


def _other_type(path: str, given: Any, wanted: Any) -> ConfigError:
    return ConfigError(
        "rows do not fit the schema: a column has another type",
        column=path,
        given=str(given),
        schema=str(wanted),
        hint="Convert it before, or choose another type.",
    )


def _misfit(fact: str, path: str, array: Any, place: int) -> ConfigError:
    try:
        value = array[place].as_py()
    except (pa.ArrowException, ValueError, OverflowError):
        value = str(array[place : place + 1])  # A time that Python has no value for.
    return ConfigError(f"rows do not fit the schema: {fact}", column=path, row=place, value=value, hint=_HINT)
