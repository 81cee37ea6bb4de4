"""A column as one piece of bytes per row, which is how row-wise formats store it, and back.

Numbers and lists of numbers are their little-endian bytes, text is UTF-8, and whatever has no such form (structs, lists
of text, dates) is JSON. The bytes of a column are cut, never built value by value.
"""

import datetime as dt
import decimal
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as kinds

from datastore.errors import ConfigError, CorruptError
from datastore.formats.arrow import array_of, numbers_of

__all__ = ["Cell", "from_cells", "is_binary", "is_text", "json_cells", "json_rows", "number_of", "to_cells"]

Cell = bytes | memoryview


def is_text(kind: pa.DataType) -> bool:
    """Return whether values of `kind` are text."""
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind)


def is_binary(kind: pa.DataType) -> bool:
    """Return whether values of `kind` are bytes."""
    return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_fixed_size_binary(kind)


def number_of(kind: pa.DataType) -> np.dtype[Any] | None:
    """Return the NumPy type of a number, or of the numbers in a list; None for anything else."""
    inner: Any = kind.field(0).type if _is_list(kind) else kind
    if kinds.is_integer(inner) or kinds.is_floating(inner):
        return np.dtype(inner.to_pandas_dtype())
    return None


def to_cells(column: "pa.ChunkedArray[Any]", *, name: str, where: str) -> Sequence[Cell]:
    """Return the bytes of each row of the column `name`; `where` is the format that takes no nulls.

    Raises:
        ConfigError: a value is null, and the column is not one that becomes JSON.
    """
    array: Any = column.combine_chunks()
    kind = array.type
    if isinstance(array, pa.ChunkedArray):  # Several chunks of more than 2 GiB of text.
        return [cell for chunk in array.chunks for cell in to_cells(pa.chunked_array([chunk]), name=name, where=where)]
    number = number_of(kind)
    if number is None and not (is_text(kind) or is_binary(kind) or kinds.is_boolean(kind)):
        return json_cells(column, name=name)
    if array.null_count:
        raise ConfigError(
            f"{where} has no null",
            column=name,
            nulls=array.null_count,
            hint="Leave out the column, or export to parquet, hf or jsonl.",
        )
    if is_text(kind) or is_binary(kind):
        offsets, values = _binary_parts(array)
        return [values[start:stop] for start, stop in pairwise(offsets)]
    if kinds.is_boolean(kind):
        return _cut(numbers_of(array).astype(np.uint8), np.arange(len(array) + 1))
    if not _is_list(kind):
        return _cut(numbers_of(array), np.arange(len(array) + 1))
    lists = array.cast(pa.list_(kind.value_type)) if kinds.is_fixed_size_list(kind) else array
    bounds = numbers_of(lists.offsets)
    inside = lists.values.slice(int(bounds[0]), int(bounds[-1] - bounds[0]))
    if inside.null_count:
        raise ConfigError(f"{where} has no null", column=name, hint="Leave out the column, or fill its nulls.")
    return _cut(numbers_of(inside), bounds - bounds[0])


def from_cells(cells: Sequence[Cell], kind: pa.DataType, *, where: str) -> "pa.Array[Any]":
    """Return the column whose rows have the bytes `cells`.

    Raises:
        CorruptError: text is no UTF-8, or the bytes do not make whole numbers.
    """
    number = number_of(kind)
    if number is None and not kinds.is_boolean(kind):
        found = array_of([bytes(cell) for cell in cells], pa.binary())
        try:
            return found.cast(kind)
        except pa.ArrowInvalid as error:
            raise CorruptError(f"not text: {error}", where=where, hint="Restore this file from a copy.") from None
    number = number or np.dtype(np.uint8)
    sizes = np.fromiter(map(len, cells), np.int64, len(cells))
    if (sizes % number.itemsize).any() or (not _is_list(kind) and (sizes != number.itemsize).any()):
        raise CorruptError("a value has another size", where=where, hint="Restore this file from a copy.")
    values = np.frombuffer(b"".join(cells), number.newbyteorder("<")).astype(number, copy=False)
    if kinds.is_boolean(kind):
        return array_of(values.astype(np.bool_))
    if not _is_list(kind):
        return array_of(values, kind)
    offsets = np.zeros(len(cells) + 1, np.int32)
    np.cumsum(sizes // number.itemsize, out=offsets[1:])
    lists: Any = pa.ListArray
    made: pa.Array[Any] = lists.from_arrays(array_of(offsets), array_of(values), type=kind)
    return made


def json_cells(column: "pa.ChunkedArray[Any]", *, name: str) -> list[bytes]:
    """Return each row of the column `name` as JSON: bytes as base64 text, times as ISO 8601 text.

    Raises:
        ConfigError: a value has no JSON form: it is NaN or infinite, beyond the year 9999, or finer than a microsecond; or JSON has none
            of its type.
    """
    try:
        return [_as_json(value) for value in _values(column)]
    except (pa.ArrowException, ValueError, OverflowError, TypeError) as error:
        raise ConfigError(
            f"a value has no JSON form: {str(error).splitlines()[0]}",
            column=name,
            type=str(column.type),
            hint="Leave out the column, or export to parquet or hf.",
        ) from None


def json_rows(rows: pa.Table) -> list[bytes]:
    """Return each row as a JSON object.

    Raises:
        ConfigError: as `json_cells`.
    """
    heads = [orjson.dumps(name) + b":" for name in rows.column_names]
    columns = [json_cells(column, name=name) for name, column in zip(rows.column_names, rows.columns, strict=True)]
    cells = zip(*columns, strict=True) if columns else [()] * rows.num_rows
    return [b"{" + b",".join(map(b"".join, zip(heads, row, strict=True))) + b"}" for row in cells]


def _values(column: Any) -> list[Any]:
    """Return values as Python has them, alike with and without pandas: without it, there are no nanoseconds."""
    for chunk in column.chunks:
        _check_finite(chunk)
    kind = _in_microseconds(column.type)
    return list((column if kind.equals(column.type) else column.cast(kind)).to_pylist())


def _in_microseconds(kind: Any) -> Any:
    if kinds.is_struct(kind):
        return pa.struct([_coarser(kind.field(index)) for index in range(kind.num_fields)])
    if kinds.is_map(kind):
        return pa.map_(_in_microseconds(kind.key_type), _coarser(kind.item_field))
    if _is_list(kind):
        make = pa.large_list if kinds.is_large_list(kind) else pa.list_
        sizes = [kind.list_size] if kinds.is_fixed_size_list(kind) else []
        return make(_coarser(kind.value_field), *sizes)
    if getattr(kind, "unit", "") != "ns":
        return kind
    if kinds.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if kinds.is_duration(kind) else pa.time64("us")


def _coarser(field: Any) -> Any:
    return field.with_type(_in_microseconds(field.type))


def _check_finite(array: Any) -> None:
    """Raise ValueError for a number that JSON does not have, at any depth; it would be written as null."""
    kind = array.type
    if kinds.is_floating(kind):
        if not pc.all(pc.is_finite(array)).as_py() and len(array) > array.null_count:
            raise ValueError("NaN or infinity")
    elif kinds.is_struct(kind):
        for field in array.flatten():
            _check_finite(field)
    elif kinds.is_map(kind):
        _check_finite(array.items)
    elif _is_list(kind):
        _check_finite(array.flatten())


def _as_json(value: object) -> bytes:
    return orjson.dumps(value, default=_plain, option=orjson.OPT_NON_STR_KEYS)


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        import base64  # noqa: PLC0415 - rare

        return base64.b64encode(value).decode()
    if isinstance(value, decimal.Decimal | dt.timedelta):
        return str(value)
    raise TypeError(type(value).__name__)


def _is_list(kind: pa.DataType) -> bool:
    return kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)


def _binary_parts(array: Any) -> tuple[list[int], memoryview]:
    """Return the offsets of all values and the buffer that they are in."""
    plain = array.cast(pa.large_binary())
    offsets = np.frombuffer(plain.buffers()[1], np.int64)[plain.offset : plain.offset + len(plain) + 1]
    return offsets.tolist(), memoryview(plain.buffers()[2] or b"")


def _cut(values: Any, bounds: Any) -> list[memoryview]:
    raw = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).data.cast("B")
    return [raw[start:stop] for start, stop in pairwise((bounds * values.dtype.itemsize).tolist())]
