"""A token shard: an Arrow IPC file with one record batch, one row per document, `tokens: list<uint16 | uint32>`.

The values buffer *is* the flat token stream, so any sequence length is chosen when reading; the offsets buffer *is*
the document index. Both start at multiples of 64 bytes and are not compressed, so that a block of tokens is a plain
byte range of a remote object, and a shard in memory is what it is on disk, never parsed. The price: a shard is made in memory as a
whole, and text that would compress well takes its full size.

What goes with each token (a loss mask, a weight, the logits of a teacher) lies beside it in further columns of the same
lists: of numbers, or of a fixed number of them. A shard without such columns is the same file, byte by byte, as before
there were any.

The bytes depend on the tokens and columns alone: not on the library's version, nor on the machine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import Buffer

from datastore.errors import ConfigError, CorruptError
from datastore.formats.arrow import ALIGNMENT_BYTES, ListColumn, encode_lists, numbers_of

__all__ = [
    "ALIGNMENT_BYTES",
    "COLUMN_DTYPES",
    "MAX_SHARD_TOKENS",
    "ColumnType",
    "EncodedShard",
    "TokenLayout",
    "TokenTable",
    "column_type",
    "decode_token_table",
    "decode_tokens",
    "encode_tokens",
    "narrow_tokens",
    "offsets_of",
    "token_dtype",
    "token_schema",
]

MAX_SHARD_TOKENS = 2**31 - 1
"""The largest int32 offset of an Arrow `list`."""

COLUMN_DTYPES = tuple(
    f"{kind}{bits}"
    for kind, sizes in (("uint", (8, 16, 32, 64)), ("int", (8, 16, 32, 64)), ("float", (16, 32, 64)))
    for bits in sizes
)
"""Types of the values of a column; bools are stored as uint8."""

_ARROW_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}
_LOSS_MASK = "loss_mask"

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]
Columns = Mapping[str, npt.NDArray[Any]]
_NO_COLUMNS: Columns = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ColumnType:
    """What a column holds: `width` values of `dtype` for each token."""

    name: str
    dtype: str
    width: int = 1


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where the buffers of a token shard lie in its file."""

    dtype: Literal["uint16", "uint32"]
    """Little-endian."""

    tokens: int
    documents: int
    values_start: int
    """Byte position of token 0."""

    offsets_start: int
    """Byte position of offset 0; there are `documents + 1` of them, the last equals `tokens`."""

    offsets_dtype: Literal["int32"] = "int32"
    columns: tuple[tuple[ColumnType, int], ...] = ()
    """The columns beside the tokens, and the byte position of the first value of each."""


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """The bytes of one token shard."""

    data: bytes
    layout: TokenLayout


@dataclass(frozen=True, slots=True)
class TokenTable:
    """All that a token shard holds: document `i` is tokens `[offsets[i], offsets[i + 1])`."""

    values: Tokens
    offsets: Offsets
    columns: Columns
    """[T] or [T, width] each: what goes with each token."""


def token_dtype(vocab_size: int) -> str:
    """Return the narrowest dtype that holds every id below `vocab_size`: `uint16` up to 65,536, else `uint32`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def offsets_of(lengths: npt.ArrayLike) -> Offsets:
    """Return where each of some documents begins, end to end, and where the last ends: `len(lengths) + 1` numbers from 0."""
    counts = np.asarray(lengths, np.int64)
    offsets = np.zeros(counts.size + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def token_schema(dtype: str, *, columns: Sequence[ColumnType] = ()) -> pa.Schema:
    """Return the Arrow schema of a token shard of `dtype`: nothing in it is nullable, and it has no metadata."""

    def lists(column: ColumnType) -> "pa.Field[Any]":
        item = pa.field("item", pa.from_numpy_dtype(np.dtype(column.dtype)), nullable=False)
        if column.width > 1:
            item = pa.field("item", pa.list_(item, column.width), nullable=False)
        return pa.field(column.name, pa.list_(item), nullable=False)

    return pa.schema([lists(column) for column in (ColumnType("tokens", dtype), *columns)])


def narrow_tokens(values: npt.NDArray[np.integer], dtype: str) -> Tokens:
    """Return `values` as `dtype`; an id that does not fit is refused, never wrapped.

    Raises:
        ConfigError: an id is negative or above the largest `dtype`.
    """
    largest = int(np.iinfo(dtype).max)
    if values.size and (int(values.min()) < 0 or int(values.max()) > largest):
        raise ConfigError(
            "token id out of range",
            smallest=int(values.min()),
            largest=int(values.max()),
            dtype=dtype,
            hint="Use a wider dtype, or the tokenizer that the dataset names.",
        )
    return values.astype(dtype, copy=False)


def column_type(name: str, dtype: str, *, width: int = 1) -> ColumnType:
    """Return the type of a column, checked; `bool` is `uint8`.

    Raises:
        ConfigError: the name is no identifier or taken, the dtype is unknown, `width` below 1; or a loss mask is
            anything but one bool or uint8.
    """
    found = ColumnType(name, "uint8" if dtype == "bool" else dtype, width)
    if not name.isidentifier() or name == "tokens":
        raise ConfigError("not a name for a column", column=name, hint="Use letters, digits and _; `tokens` is taken.")
    if found.dtype not in COLUMN_DTYPES or width < 1:
        raise ConfigError(
            "not a type for a column",
            column=name,
            dtype=dtype,
            width=width,
            hint=f"Use one of bool, {', '.join(COLUMN_DTYPES)}, and a width of 1 or more.",
        )
    if name == _LOSS_MASK and (found.dtype, width) != ("uint8", 1):
        raise ConfigError(
            "a loss mask has one bool for each token", dtype=dtype, width=width, hint="Call it by another name."
        )
    return found


def encode_tokens(values: Tokens, offsets: Offsets, *, columns: Columns = _NO_COLUMNS) -> EncodedShard:
    """Return the shard whose document `i` is `values[offsets[i]:offsets[i + 1]]`, with what goes with each token beside it.

    `columns` are [T] or [T, width] each; they are stored in the order of their names.

    Raises:
        ConfigError: `values` is not a flat uint16 or uint32 array, `offsets` do not run from 0 to its end without
            a step back, there are more tokens than one shard can hold, or a column does not go with them.
    """
    dtype = values.dtype.name
    if dtype not in {"uint16", "uint32"} or values.ndim != 1:
        raise ConfigError(
            "tokens must be a flat array of uint16 or uint32",
            dtype=dtype,
            shape=values.shape,
            hint="Convert them with narrow_tokens, which checks the range.",
        )
    if not _offsets_fit(offsets, values.size):
        raise ConfigError(
            "document offsets do not cut up the tokens",
            offsets=offsets.size,
            tokens=values.size,
            hint="They run from 0 to the number of tokens and never step back.",
        )
    if values.size > MAX_SHARD_TOKENS:
        raise ConfigError("too many tokens for one shard", tokens=values.size, hint="Write several shards.")
    index = np.ascontiguousarray(offsets, dtype="<i4").data.cast("B")
    types = {name: _type_of(name, columns[name], tokens=values.size) for name in sorted(columns)}
    stored = [(ColumnType("tokens", dtype), values), *((types[name], columns[name]) for name in types)]
    data, places = encode_lists([_lists(*column, index) for column in stored], rows=offsets.size - 1)
    layout = TokenLayout(
        dtype="uint16" if dtype == "uint16" else "uint32",
        tokens=values.size,
        documents=offsets.size - 1,
        values_start=places[0][1],
        offsets_start=places[0][0],
        columns=tuple((kind, start) for kind, (_, start) in zip(types.values(), places[1:], strict=True)),
    )
    return EncodedShard(data=data, layout=layout)


def decode_tokens(raw: Buffer) -> tuple[Tokens, Offsets]:
    """Return the flat tokens (a view of `raw`) and the int64 document offsets of a token shard; as `decode_token_table`."""
    table = decode_token_table(raw)
    return table.values, table.offsets


def decode_token_table(raw: Buffer) -> TokenTable:
    """Return what a token shard holds, as views of `raw`.

    Raises:
        CorruptError: not an Arrow file with one record batch of the schema of token shards, or its offsets do not
            cut up its tokens.
    """
    try:
        reader = pa.ipc.open_file(pa.py_buffer(raw))
        types = _types_of(reader.schema)
        if reader.num_record_batches != 1 or types is None:
            raise _not_a_shard("its schema or number of record batches differs")
        batch = reader.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _not_a_shard(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    column = cast("pa.ListArray[Any]", batch.column(0))
    values: Tokens = numbers_of(column.values)
    offsets = numbers_of(column.offsets).astype(np.int64)
    if not _offsets_fit(offsets, values.size):
        raise _not_a_shard("its offsets do not cut up its tokens")
    columns = {kind.name: _values_of(batch.column(kind.name), kind, offsets) for kind in types}
    return TokenTable(values, offsets, columns)


def _type_of(name: str, values: npt.NDArray[Any], *, tokens: int) -> ColumnType:
    """Return the type of a column, if `values` go with so many tokens."""
    if values.ndim not in {1, 2} or len(values) != tokens:
        raise ConfigError(
            "a column does not go with the tokens",
            column=name,
            shape=values.shape,
            tokens=tokens,
            hint="Give it one value, or one row of values, for each token.",
        )
    found = column_type(name, values.dtype.name, width=1 if values.ndim == 1 else values.shape[1])
    if name == _LOSS_MASK and values.size and int(values.max()) > 1:
        raise ConfigError("a loss mask holds 0 and 1", largest=int(values.max()), hint="1 is a token to be learned.")
    return found


def _lists(kind: ColumnType, values: npt.NDArray[Any], index: memoryview) -> ListColumn:
    dtype = np.dtype(kind.dtype)
    stored = np.ascontiguousarray(values, dtype=dtype.newbyteorder("<")).reshape(-1).view(np.uint8).data
    return ListColumn(kind.name, dtype.kind, dtype.itemsize, kind.width, index, stored)


def _types_of(schema: pa.Schema) -> list[ColumnType] | None:
    """Return the types of the columns beside the tokens; None if it is not the schema of a token shard."""
    if not schema.names or schema.names[0] != "tokens" or len(set(schema.names)) != len(schema.names):
        return None
    types = []
    for one in schema:
        item = one.type.value_type if pa.types.is_list(one.type) else one.type
        width = 1
        if pa.types.is_fixed_size_list(item):
            item, width = item.value_type, item.list_size
        types.append(ColumnType(one.name, _ARROW_NAMES.get(str(item), str(item)), width))
    tokens, *columns = types
    known = tokens.dtype in {"uint16", "uint32"} and all(kind.dtype in COLUMN_DTYPES for kind in columns)
    return columns if known and schema.equals(token_schema(tokens.dtype, columns=columns)) else None


def _values_of(column: "pa.Array[Any]", kind: ColumnType, offsets: Offsets) -> npt.NDArray[Any]:
    lists = cast("pa.ListArray[Any]", column)
    if not np.array_equal(numbers_of(lists.offsets), offsets):
        raise _not_a_shard(f"its column {kind.name} is cut up otherwise than its tokens")
    values: Any = lists.values
    flat = numbers_of(values if kind.width == 1 else values.values)
    if flat.size != offsets[-1] * kind.width:
        raise _not_a_shard(f"its column {kind.name} has more values than its tokens")
    return flat if kind.width == 1 else flat.reshape(-1, kind.width)


def _offsets_fit(offsets: Offsets, tokens: int) -> bool:
    """Whether `offsets` run from 0 to `tokens` without a step back."""
    if offsets.ndim != 1 or offsets.size == 0 or not np.issubdtype(offsets.dtype, np.integer):
        return False
    return bool(offsets[0] == 0 and offsets[-1] == tokens and (np.diff(offsets) >= 0).all())


def _not_a_shard(reason: str) -> CorruptError:
    return CorruptError(f"not a token shard: {reason}", hint="Restore this file from a copy, or ingest it again.")
