"""Arrow without pandas and without pyarrow's freedoms: arrays as NumPy views and back, and a writer of files of lists.

`pa.array`, `pa.scalar`, `pa.Array.to_numpy`, `np.asarray`, `fill_null` with a plain value and `pq.read_table` import pandas where
it is installed, to ask whether a value is one of its own: 0.3 s and 40 MB for whoever wants to open a dataset (pyarrow 26,
pandas 3.1, 2026-11-25). What we made ourselves needs no asking: it goes through `array_of`, `scalar_of` and `numbers_of`.

pyarrow cannot place buffers (it aligns them to 8 bytes) and its bytes may change between releases; a token shard
promises 64-byte alignment and the same bytes for the same tokens, so its frame is written here. The price is
these two hundred lines. Reading is left to pyarrow, which also checks in the tests that what is written here is valid.

Every table field takes a slot of eight bytes, so that alignment needs no thought; tables come before what they
point to, because flatbuffer references are unsigned.

Source: https://flatbuffers.dev/internals, https://arrow.apache.org/docs/format/Columnar.html (metadata version V5)
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = [
    "ALIGNMENT_BYTES",
    "Int",
    "ListColumn",
    "Structs",
    "Table",
    "Value",
    "array_of",
    "encode_flatbuffer",
    "encode_lists",
    "numbers_of",
    "scalar_of",
    "table_of",
    "types_within",
]


def types_within(kind: Any) -> Iterator[Any]:
    """Yield a type and all that it is made of."""
    yield kind
    for index in range(kind.num_fields):
        yield from types_within(kind.field(index).type)


def array_of(values: Sequence[Any] | npt.NDArray[Any], kind: pa.DataType | None = None) -> "pa.Array[Any]":
    """Return `values`, none of which is null, as an array of `kind`; of an ndarray's own type by default.

    They are numbers, truth values, texts, bytes, or lists of them. Numbers of an ndarray are not copied if their type is that of `kind`.

    Raises:
        ArrowInvalid: a number has no place in `kind`, or bytes have another length than it says.

    >>> array_of(["a", "bc"], pa.string()).to_pylist()
    ['a', 'bc']
    """
    if isinstance(values, np.ndarray):
        return _array_of_numbers(values, kind)
    assert kind is not None, "only an ndarray says what it holds"
    if pa.types.is_string(kind):
        return _array_of_bytes([value.encode() for value in values], kind)
    if pa.types.is_binary(kind):
        return _array_of_bytes(values, kind)
    if pa.types.is_fixed_size_binary(kind):
        if any(len(value) != kind.byte_width for value in values):
            raise pa.ArrowInvalid(f"bytes of another length than {kind.byte_width}")
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(b"".join(values))])
    if pa.types.is_list(kind):
        return _array_of_lists(values, kind)
    return _array_of_numbers(np.array(values, kind.to_pandas_dtype()), kind)


def _array_of_numbers(values: npt.NDArray[Any], kind: pa.DataType | None) -> "pa.Array[Any]":
    if values.dtype == np.bool_:
        raw = pa.py_buffer(np.packbits(values, bitorder="little").data)
    else:
        values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
        raw = pa.py_buffer(values.data)
    made: pa.Array[Any] = pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), values.size, [None, raw])
    return made if kind is None or made.type == kind else made.cast(kind)


def _array_of_bytes(values: Sequence[bytes], kind: pa.DataType) -> "pa.Array[Any]":
    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in values], out=ends[1:])
    if ends[-1] > _LARGEST_OFFSET:
        return pa.array(values, kind)  # It makes several chunks.
    offsets, joined = pa.py_buffer(ends.astype(np.int32).data), pa.py_buffer(b"".join(values))
    return pa.Array.from_buffers(kind, len(values), [None, offsets, joined])


def _array_of_lists(values: Sequence[Any], kind: Any) -> "pa.Array[Any]":
    ends = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=ends[1:])
    arrays = len(values) > 0 and all(isinstance(value, np.ndarray) for value in values)
    flat: Any = np.concatenate(values) if arrays else list(chain.from_iterable(values))
    lists: Any = pa.ListArray
    made: pa.Array[Any] = lists.from_arrays(array_of(ends), array_of(flat, kind.value_type), type=kind)
    return made


def table_of(columns: Iterable[Any], schema: pa.Schema) -> pa.Table:
    """Return the table of `columns` in the order of `schema`, each an Arrow array or as `array_of` takes them."""
    arrays = [
        column if isinstance(column, pa.Array | pa.ChunkedArray) else array_of(column, field.type)
        for field, column in zip(schema, columns, strict=True)
    ]
    return pa.table(arrays, schema=schema)


def scalar_of(value: object, kind: pa.DataType) -> "pa.Scalar[Any]":
    """Return `value`, as `array_of` takes them, as a scalar."""
    made: pa.Scalar[Any] = array_of([value], kind)[0]
    return made


def numbers_of(array: "pa.Array[Any] | pa.ChunkedArray[Any]") -> npt.NDArray[Any]:
    """Return a view of integers or floats; of truth values, which Arrow packs, and of several chunks, a copy.

    Raises:
        ArrowInvalid: some are null.

    >>> numbers_of(pa.array([1, 2, 3], pa.int32())[1:])
    array([2, 3], dtype=int32)
    """
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks else pa.nulls(0, array.type)
    if array.null_count:
        raise pa.ArrowInvalid(f"{array.null_count} of the values are null")
    if pa.types.is_boolean(array.type):
        return numbers_of(array.cast(pa.uint8())).astype(np.bool_)
    dtype = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.empty(0, dtype)
    raw = memoryview(cast("pa.Buffer", array.buffers()[1]))
    return np.frombuffer(raw, dtype, len(array), array.offset * dtype.itemsize)


ALIGNMENT_BYTES = 64
"""Start of the buffers of an Arrow file, and their padded length: a cache line, and what Arrow recommends."""

_LARGEST_OFFSET = 2**31 - 1
"""Bytes that one array of texts or bytes has room for."""

_MAGIC = b"ARROW1"

_CONTINUES = b"\xff\xff\xff\xff"


@dataclass(frozen=True, slots=True)
class Int:
    """An integer of the given `struct` code: `B` u8, `h` i16, `i` i32, `q` i64."""

    code: str
    value: int


@dataclass(frozen=True, slots=True)
class Structs:
    """A vector of fixed-size structs whose members are all aligned to at most 8 bytes."""

    packed: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table's fields in the order of their ids; None stands for an absent field."""

    fields: tuple["Value | None", ...]


Value = Int | Structs | Table | str | list[Table]

_V5 = Int("h", 4)

_SCHEMA, _BATCH = Int("B", 1), Int("B", 3)

_INT, _FLOAT, _LIST, _FIXED_LIST = Int("B", 2), Int("B", 3), Int("B", 12), Int("B", 16)

_FLOAT_PRECISION = {2: 0, 4: 1, 8: 2}


@dataclass(frozen=True, slots=True)
class ListColumn:
    """A column of lists of numbers, or of `width` numbers each; nothing is null."""

    name: str
    kind: str
    """Of a number: `u` unsigned, `i` signed, `f` floating-point."""

    item_bytes: int
    """Of a number."""

    width: int
    offsets: memoryview
    """The bytes of the int32 offsets: one more than there are rows."""

    values: memoryview
    """The bytes of all numbers, end to end."""


def encode_lists(columns: Sequence[ListColumn], *, rows: int) -> tuple[bytes, list[tuple[int, int]]]:
    """Return an Arrow file of one record batch, and where in it the offsets and the values of each column start."""
    schema = Table((Int("h", 0), [_field_of(column) for column in columns]))
    nodes: list[bytes] = []
    ranges: list[tuple[int, int]] = []
    parts: list[bytes | memoryview] = []
    places: list[tuple[int, int]] = []
    at = 0
    for column in columns:
        items = len(column.values) // (column.item_bytes * column.width)
        widths = (1,) if column.width == 1 else (1, column.width)
        nodes += [struct.pack("<qq", count, 0) for count in (rows, *(items * width for width in widths))]
        values_at = at + _padded(len(column.offsets))
        # Validity of the lists, offsets, validity of what is in them, values. Nothing is null, so validity is empty.
        ranges += [(at, 0), (at, len(column.offsets)), *[(values_at, 0)] * len(widths)]
        ranges.append((values_at, len(column.values)))
        for buffer in (column.offsets, column.values):
            parts += [buffer, bytes(_padded(len(buffer)) - len(buffer))]
        places.append((at, values_at))
        at = values_at + _padded(len(column.values))
    buffers = Structs(tuple(struct.pack("<qq", start, size) for start, size in ranges))
    head = _MAGIC + b"\0\0" + _message(_SCHEMA, schema)
    frame = _message(_BATCH, Table((Int("q", rows), Structs(tuple(nodes)), buffers)), start=len(head), body_bytes=at)
    block = struct.pack("<qi4xq", len(head), len(frame), at)
    footer = encode_flatbuffer(Table((_V5, schema, Structs(()), Structs((block,)))))
    tail = (_CONTINUES, bytes(4), footer, struct.pack("<i", len(footer)), _MAGIC)
    body = len(head) + len(frame)
    return b"".join((head, frame, *parts, *tail)), [(body + offsets, body + values) for offsets, values in places]


def _field_of(column: ListColumn) -> Table:
    if column.kind == "f":
        item = _field("item", _FLOAT, Table((Int("h", _FLOAT_PRECISION[column.item_bytes]),)))
    else:
        item = _field("item", _INT, Table((Int("i", column.item_bytes * 8), Int("B", int(column.kind == "i")))))
    if column.width > 1:
        item = _field("item", _FIXED_LIST, Table((Int("i", column.width),)), item)
    return _field(column.name, _LIST, Table(()), item)


def _field(name: str, code: Int, kind: Table, *children: Table) -> Table:
    return Table((name, Int("B", 0), code, kind, None, list(children)))


def _message(kind: Int, header: Table, *, start: int = 0, body_bytes: int = 0) -> bytes:
    """Return an encapsulated message; one that has a body is padded so that the body starts aligned."""
    metadata = encode_flatbuffer(Table((_V5, kind, header, Int("q", body_bytes))))
    if body_bytes:
        metadata += bytes(-(start + 8 + len(metadata)) % ALIGNMENT_BYTES)
    return _CONTINUES + struct.pack("<i", len(metadata)) + metadata


def _padded(size_bytes: int) -> int:
    return size_bytes + -size_bytes % ALIGNMENT_BYTES


def encode_flatbuffer(root: Table) -> bytes:
    """Return the flatbuffer whose root is `root`; its start must be placed at a multiple of 8 bytes."""
    out = bytearray(8)
    _refer(out, 0, _place(out, root))
    _pad(out, 8)
    return bytes(out)


def _place(out: bytearray, value: Structs | Table | str | list[Table]) -> int:
    """Append `value`; return its position."""
    if isinstance(value, Table):
        return _place_table(out, value)
    if isinstance(value, str):
        text = value.encode()
        return _append(out, struct.pack("<I", len(text)) + text + b"\0", remainder=0)
    if isinstance(value, Structs):
        # The elements, not the count before them, must lie on a multiple of 8.
        return _append(out, struct.pack("<I", len(value.packed)) + b"".join(value.packed), remainder=4)
    start = _append(out, struct.pack("<I", len(value)) + bytes(4 * len(value)), remainder=0)
    for index, item in enumerate(value):
        _refer(out, start + 4 + 4 * index, _place(out, item))
    return start


def _place_table(out: bytearray, table: Table) -> int:
    present = [field for field in table.fields if field is not None]
    slots = iter(range(8, 8 + 8 * len(present), 8))
    entries = [0 if field is None else next(slots) for field in table.fields]
    size = 8 + 8 * len(present)
    vtable = _append(out, struct.pack(f"<HH{len(entries)}H", 4 + 2 * len(entries), size, *entries), remainder=0)
    start = _append(out, bytes(size), remainder=0)
    struct.pack_into("<i", out, start, start - vtable)
    for slot, field in zip(range(start + 8, start + size, 8), present, strict=True):
        if isinstance(field, Int):
            struct.pack_into("<" + field.code, out, slot, field.value)
        else:
            _refer(out, slot, _place(out, field))
    return start


def _append(out: bytearray, data: bytes, *, remainder: int) -> int:
    """Append `data` at the next position that leaves `remainder` when divided by 8."""
    out.extend(bytes((remainder - len(out)) % 8))
    start = len(out)
    out.extend(data)
    return start


def _refer(out: bytearray, slot: int, target: int) -> None:
    struct.pack_into("<I", out, slot, target - slot)


def _pad(out: bytearray, multiple: int) -> None:
    out.extend(bytes(-len(out) % multiple))
