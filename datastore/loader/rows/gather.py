"""Rows taken out of many batches and laid end to end, column by column: by slices of bytes, not of Arrow arrays.

A row mostly comes from a batch of its own, so what a row costs is one small step in Python for each column. Slicing a record batch and
joining the slices costs 1.3 us a row; slicing the bytes of a column, whose offsets are at hand, and joining those costs 0.3.
Columns of plain values, texts and bytes go that way; lists, structs and all others are sliced as before.

The bytes of a column may lie in a map of a file. Nobody here looks at a map, the kernel does: see `loader.cache.files`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.types as pt

from datastore.errors import ConfigError
from datastore.formats.arrow import numbers_of
from datastore.formats.schema import no_rows
from datastore.loader.cache.files import Copier

__all__ = ["Held", "Values", "gathered", "held", "is_bytes", "is_takeable", "joined"]

_TAKEN, _SHORT_BYTES = 16, 512
"""Rows of a batch, and bytes of a row, from which and up to which rows of other columns are taken together."""

_TAKEABLE: tuple[Any, ...] = (
    pt.is_primitive,
    pt.is_decimal,
    pt.is_string,
    pt.is_large_string,
    pt.is_binary,
    pt.is_large_binary,
    pt.is_list,
    pt.is_large_list,
    pt.is_struct,
)

_LARGEST_OFFSET = 2**31 - 1

_FIXED = 8
"""Columns of numbers, above which one slice of all costs less than a step in Python for each."""


@dataclass(frozen=True, slots=True)
class Values:
    """A column of a batch, as bytes."""

    data: memoryview
    """All values, end to end."""

    offsets: memoryview | None
    """Where each starts, and where the last ends; None: each has `width` bytes."""

    width: int = 0
    there: "npt.NDArray[np.bool_] | None" = None
    """Which are not null; None: all."""

    mapped: bool = False
    """Whether `data` is a map of a file."""


@dataclass(frozen=True, slots=True)
class Held:
    """A batch that rows are taken from."""

    columns: Mapping[str, Values]
    """Those that are gathered as bytes."""

    others: pa.RecordBatch | None
    """The other columns, if there are any."""

    size_bytes: int
    """What it takes in memory."""

    @property
    def is_mapped(self) -> bool:
        """Whether a column lies in a map of a file."""
        return any(values.mapped for values in self.columns.values())


def held(batch: pa.RecordBatch) -> Held:
    """Return `batch`, ready for rows to be taken from it. Nothing is copied."""
    fixed = [field.name for field in batch.schema if _width(field.type)]
    if len(fixed) > _FIXED:
        fixed = []
    names = [field.name for field in batch.schema if is_bytes(field.type) or field.name in fixed]
    others = [name for name in batch.schema.names if name not in names]
    columns = {name: _values(batch.column(name)) for name in names}
    return Held(columns, batch.select(others) if others else None, batch.nbytes)


def gathered(sources: list[Held], rows: list[int], schema: pa.Schema) -> pa.RecordBatch | None:
    """Return a row of each of `sources`, by its number there, in memory of their own; None if a map cannot be read.

    Raises:
        ConfigError: they are more than an Arrow array can have.
    """
    if not sources or not schema.names:
        return no_rows(schema)
    first = sources[0]
    others = None if first.others is None else _others(sources, rows)
    arrays: list[Any] = []
    for field in schema:
        if field.name not in first.columns:
            assert others is not None
            arrays.append(others.column(field.name))
            continue
        array = _column([source.columns[field.name] for source in sources], rows, field.type)
        if array is None:
            return None
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def joined(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.RecordBatch:
    """Return the rows of all `batches` in one, copied.

    Raises:
        ConfigError: they are more than an Arrow array can have.
    """
    if not batches:
        return no_rows(schema)
    found = pa.Table.from_batches(batches).combine_chunks().to_batches()
    if len(found) > 1:
        raise _too_large(len(batches))
    return found[0] if found else batches[0]


def is_bytes(kind: Any) -> bool:
    """Return whether values of a type are texts or bytes, of any length."""
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_binary(kind) or pt.is_large_binary(kind))


def is_takeable(kind: Any) -> bool:
    """Return whether pyarrow takes rows of a type: not of all it does."""
    inner = all(is_takeable(kind.field(index).type) for index in range(kind.num_fields))
    return inner and any(is_one(kind) for is_one in _TAKEABLE)


def _width(kind: Any) -> int:
    """Return how many bytes each value of a type has; 0 if that is not how they are stored."""
    if isinstance(kind, pa.BaseExtensionType) or pt.is_boolean(kind) or pt.is_null(kind):
        return 0
    is_fixed = pt.is_primitive(kind) or pt.is_decimal(kind) or pt.is_fixed_size_binary(kind)
    return int(kind.bit_width) // 8 if is_fixed else 0


def _values(column: Any) -> Values:
    there = numbers_of(column.is_valid()) if column.null_count else None
    buffers, start, rows = column.buffers(), column.offset, len(column)
    data = _bytes_of(buffers[-1])
    width = _width(column.type)
    if width:
        return Values(data[start * width : (start + rows) * width], None, width, there)
    large = pt.is_large_string(column.type) or pt.is_large_binary(column.type)
    raw = _bytes_of(buffers[1])
    offsets = (
        raw[start * 8 : (start + rows + 1) * 8].cast("q")
        if large
        else raw[start * 4 : (start + rows + 1) * 4].cast("i")
    )
    return Values(data, offsets, 0, there)


def _bytes_of(buffer: Any) -> memoryview:
    return memoryview(b"") if buffer is None else memoryview(buffer).cast("B")


def _column(sources: list[Values], rows: list[int], kind: Any) -> Any:
    """Return the values number `rows` of `sources` as an array; None if a map cannot be read."""
    count = len(rows)
    offsets: Any = None
    width = sources[0].width
    if width:
        pieces = [source.data[row * width : (row + 1) * width] for source, row in zip(sources, rows, strict=True)]
        size_bytes = count * width
    else:
        pieces = [
            source.data[source.offsets[row] : source.offsets[row + 1]]  # type: ignore[index]
            for source, row in zip(sources, rows, strict=True)
        ]
        ends = np.zeros(count + 1, np.int64)
        np.cumsum(list(map(len, pieces)), out=ends[1:])
        size_bytes = int(ends[-1])
        if not (pt.is_large_string(kind) or pt.is_large_binary(kind)):
            if size_bytes > _LARGEST_OFFSET:
                raise _too_large(count)
            ends = ends.astype(np.int32)
        offsets = pa.py_buffer(ends.data)
    data: Any
    if any(source.mapped for source in sources):
        found = Copier.of_thread().join(pieces)
        if found is None or len(found) != size_bytes:
            return None
        data = found if found.base is None else found.copy()  # What is a view is overwritten by the next call.
    else:
        data = b"".join(pieces)
    there = None
    if any(source.there is not None for source in sources):
        flags = [source.there is None or source.there[row] for source, row in zip(sources, rows, strict=True)]
        there = pa.py_buffer(np.packbits(flags, bitorder="little").data)
    buffers = [there, pa.py_buffer(data)] if width else [there, offsets, pa.py_buffer(data)]
    return pa.Array.from_buffers(kind, count, buffers)


def _others(sources: list[Held], rows: list[int]) -> pa.RecordBatch:
    """Return the rows of those columns that are not gathered as bytes.

    One by one, which costs 1.3 us a row. Where many come from each, and are short, pyarrow takes those of a batch at once, and then
    puts them in order: two copies, and 1.8 times as fast for rows of 100 bytes. From 500 bytes on there is nothing to gain.
    """
    batches: list[Any] = [source.others for source in sources]
    parts = {id(batch): batch for batch in batches}
    schema = batches[0].schema
    if len(rows) >= _TAKEN * len(parts) and all(map(is_takeable, schema.types)):
        count, size_bytes = (sum(getattr(batch, name) for batch in parts.values()) for name in ("num_rows", "nbytes"))
        if size_bytes <= _SHORT_BYTES * count:
            members = np.array(list(map(id, batches)))
            order = np.argsort(members, kind="stable")
            names, starts = np.unique(members[order], return_index=True)
            groups = zip(names.tolist(), np.split(np.array(rows)[order], starts[1:]), strict=True)
            taken = joined([parts[name].take(group) for name, group in groups], schema)
            return taken.take(np.argsort(order))
    return joined([batch.slice(row, 1) for batch, row in zip(batches, rows, strict=True)], schema)


def _too_large(rows: int) -> ConfigError:
    return ConfigError("a batch of rows is larger than an Arrow array can be", rows=rows, hint="Lower global_batch.")
