"""Rows of Python values as a table: exactly what they say, or an error that says which value does not fit.

Arrow converts some values in silence: into a column of whole numbers 1.5 goes as 1 (also with pyarrow 26, 2026-11-28), a
truth value into a column of numbers as 1.0, 1e300 into float32 as infinity, and keys that a struct has not are dropped. All
of that is refused here. A NumPy number is the number that it is. The price is a look at each value of such a column.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds

__all__ = ["RowError", "rows_to_table"]

_NOT_ARROW = (pa.ArrowException, TypeError, ValueError, OverflowError)

_LARGEST = {"halffloat": 65_504.0, "float": float(np.finfo(np.float32).max)}


class RowError(ValueError):
    """A row does not fit; `row` is its index."""

    def __init__(self, reason: str, *, row: int) -> None:
        super().__init__(reason)
        self.row = row


def rows_to_table(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return `rows` in the columns `schema`. A column that a row lacks is null in it; one that `schema` lacks is no error.

    Raises:
        RowError: a value is not of the type of its column, and cannot become it without loss.
    """
    columns = []
    for field in schema:
        values = [_plain(row.get(field.name)) for row in rows]
        for index, value in enumerate(values if _is_suspect(values, field.type) else ()):
            reason = _misfit(value, field.type)
            if reason:
                raise RowError(f"column {field.name}: {reason}", row=index)
        columns.append(_array(values, field))
    return pa.Table.from_arrays(columns, schema=schema)


def _array(values: list[Any], field: Any) -> Any:
    try:
        return pa.array(values, field.type)
    except _NOT_ARROW as error:
        for index, value in enumerate(values):  # Which one it is, Arrow does not say.
            try:
                pa.array([value], field.type)
            except _NOT_ARROW as reason:
                raise RowError(f"column {field.name}: {reason}", row=index) from None
        raise RowError(f"column {field.name}: {error}", row=0) from None


def _plain(value: Any) -> Any:
    """Return a NumPy number as the Python one; times stay, for Arrow knows their unit."""
    return value.item() if isinstance(value, np.generic) and value.dtype.kind in "biuf" else value


def _is_suspect(values: Any, kind: Any) -> bool:
    """Return whether Arrow might change one of `values` in silence, by their types alone: most columns need no look."""
    if kinds.is_nested(kind):
        return True
    if not (kinds.is_integer(kind) or kinds.is_floating(kind) or kinds.is_temporal(kind)):
        return False
    numbers = {int, float} if kinds.is_float64(kind) else {int}
    if isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iuf":
        return values.dtype.kind == "f" and float not in numbers
    return not set(map(type, values)) <= {*numbers, type(None)}


def _misfit(value: Any, kind: Any) -> str:
    """Return why `value` would be changed, or nothing."""
    value = _plain(value)
    if isinstance(value, bool):
        return f"{value} is no number" if kinds.is_floating(kind) else ""
    if isinstance(value, float | Decimal):
        return _misfit_of_number(value, kind)
    if isinstance(value, Mapping) and kinds.is_struct(kind):
        fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        unknown = sorted(str(name) for name in value if name not in fields)
        inner = (_misfit(each, fields[name]) for name, each in value.items() if name in fields)
        return f"it has no key {unknown[0]!r}" if unknown else next(filter(None, inner), "")
    if isinstance(value, list | tuple | np.ndarray) and _is_list(kind) and _is_suspect(value, kind.value_type):
        return next(filter(None, (_misfit(each, kind.value_type) for each in value)), "")
    return ""


def _misfit_of_number(value: float | Decimal, kind: Any) -> str:
    if not math.isfinite(value):
        return ""
    if (kinds.is_integer(kind) or kinds.is_temporal(kind)) and value != int(value):
        return f"{value} is no whole number"
    largest: float = _LARGEST.get(str(kind), math.inf)
    return f"{value} is too large for {kind}" if abs(float(value)) > largest else ""


def _is_list(kind: Any) -> bool:
    return bool(
        kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind) or kinds.is_list_view(kind)
    )
