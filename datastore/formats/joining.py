"""Rows put together and taken apart, whatever their types: where one array or one file cannot hold them all, they stay apart.

Lists of 32-bit offsets have at most 2^31 items together; a dictionary has at most as many values as its indices number; of
some types pyarrow takes no rows at all.
"""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datastore.errors import ConfigError
from datastore.formats.arrow import array_of

__all__ = ["cut_to_fit", "fit_together", "join_chunks", "keep_rows"]

Rows = TypeVar("Rows", pa.Table, pa.RecordBatch)


def cut_to_fit(table: pa.Table) -> list[pa.Table]:
    """Return the rows of `table` in as few tables as it takes for each to be one shard: mostly one.

    A file has one dictionary for each column, so the values of all its rows must be within the reach of one index.
    """
    if fit_together(table):
        return [table]
    parts: list[pa.Table] = []
    for batch in table.to_batches():
        rows = pa.Table.from_batches([batch])
        if parts and fit_together(pa.concat_tables([parts[-1], rows])):
            parts[-1] = pa.concat_tables([parts[-1], rows])
        else:
            parts.append(rows)
    return parts


def fit_together(table: pa.Table) -> bool:
    """Return whether one dictionary does for each column. No row is looked at: arrays of none have theirs, too."""
    try:
        for column in table.columns:
            if _has_dictionary(column.type):
                pa.concat_arrays([chunk.slice(0, 0) for chunk in column.chunks])
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _has_dictionary(kind: Any) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    inner = (kind.field(index).type for index in range(kind.num_fields))
    return bool(pa.types.is_dictionary(kind)) or any(map(_has_dictionary, inner))


def join_chunks(table: pa.Table) -> pa.Table:
    """Return `table` with one chunk in each column, except where lists together have more items than an array can number."""
    columns = []
    for field, column in zip(table.schema, table.columns, strict=True):
        try:
            columns.append(pa.table([column], schema=pa.schema([field])).combine_chunks().column(0))
        except pa.ArrowInvalid:
            if not _has_dictionary(field.type):
                columns.append(column)
                continue
            raise ConfigError(
                "a dictionary has more values than its indices can number",
                column=field.name,
                type=str(field.type),
                hint="Use a wider index type: dictionary<string>, whose indices are int32.",
            ) from None
    return pa.Table.from_arrays(columns, schema=table.schema)


def keep_rows(rows: Rows, live: "npt.NDArray[np.bool_]") -> Rows:
    """Return those of `rows` that are `live`, of columns of any type."""
    try:
        return rows.filter(array_of(live))
    except pa.ArrowNotImplementedError:  # Of run ends pyarrow takes no rows, but it makes slices (26.0.1).
        found: Rows = _slices(rows, live)
        return found


def _slices(rows: Any, live: "npt.NDArray[np.bool_]") -> Any:
    borders = np.flatnonzero(np.diff(np.concatenate([[False], live, [False]]).astype(np.int8))).reshape(-1, 2)
    pieces = [rows.slice(0, 0), *(rows.slice(start, stop - start) for start, stop in borders.tolist())]
    if isinstance(rows, pa.Table):
        return pa.concat_tables(pieces)
    arrays = [pa.concat_arrays(chunks) for chunks in zip(*(piece.columns for piece in pieces), strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=rows.schema)
