"""A writer for the few flatbuffers that an Arrow file is framed with.

pyarrow cannot place buffers (it aligns them to 8 bytes) and its bytes may change between releases; a token shard
promises 64-byte alignment and the same bytes for the same tokens, so its frame is written here. The price is
these eighty lines. Reading is left to pyarrow, which also checks in the tests that what is written here is valid.

Every table field takes a slot of eight bytes, so that alignment needs no thought; tables come before what they
point to, because flatbuffer references are unsigned.

Source: https://flatbuffers.dev/internals
"""

import struct
from dataclasses import dataclass

__all__ = ["Int", "Structs", "Table", "Value", "encode_flatbuffer"]


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
