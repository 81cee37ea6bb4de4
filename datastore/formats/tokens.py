"""A token shard: an Arrow IPC file with one record batch, one row per document, `tokens: list<uint16 | uint32>`.

The values buffer *is* the flat token stream, so any sequence length is chosen when reading; the offsets buffer *is*
the document index. Both start at multiples of 64 bytes and are not compressed, so that a block of tokens is a plain
byte range of a remote object and a shard on disk is mapped, never parsed. The price: a shard is made in memory as a
whole, and text that would compress well takes its full size.

The bytes depend on the tokens alone: not on the library's version, nor on the machine.

Source: https://arrow.apache.org/docs/format/Columnar.html (IPC file format; metadata version V5)
"""

import struct
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import Buffer

from datastore.errors import ConfigError, CorruptError
from datastore.formats.flatbuffer import Int, Structs, Table, encode_flatbuffer

__all__ = [
    "ALIGNMENT_BYTES",
    "MAX_SHARD_TOKENS",
    "EncodedShard",
    "TokenLayout",
    "decode_tokens",
    "encode_tokens",
    "narrow_tokens",
    "token_dtype",
    "token_schema",
]

ALIGNMENT_BYTES = 64
"""Start of the file's two buffers, and their padded length: a cache line, and what Arrow recommends."""

MAX_SHARD_TOKENS = 2**31 - 1
"""The largest int32 offset of an Arrow `list`."""

_MAGIC = b"ARROW1"
_CONTINUES = b"\xff\xff\xff\xff"
_V5 = Int("h", 4)
_SCHEMA, _BATCH = Int("B", 1), Int("B", 3)
_INT, _LIST = Int("B", 2), Int("B", 12)

Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where the two buffers of a token shard lie in its file."""

    dtype: str
    """`uint16` or `uint32`, little-endian."""

    tokens: int
    documents: int
    values_start: int
    """Byte position of token 0."""

    offsets_start: int
    """Byte position of offset 0; there are `documents + 1` of them, the last equals `tokens`."""

    offsets_dtype: str = "int32"


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """The bytes of one token shard."""

    data: bytes
    layout: TokenLayout


def token_dtype(vocab_size: int) -> str:
    """Return the narrowest dtype that holds every id below `vocab_size`: `uint16` up to 65,536, else `uint32`."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def token_schema(dtype: str) -> pa.Schema:
    """Return the Arrow schema of a token shard of `dtype`: nothing in it is nullable, and it has no metadata."""
    item = pa.field("item", pa.from_numpy_dtype(np.dtype(dtype)), nullable=False)
    return pa.schema([pa.field("tokens", pa.list_(item), nullable=False)])


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


def encode_tokens(values: Tokens, offsets: Offsets) -> EncodedShard:
    """Return the shard whose document `i` is `values[offsets[i]:offsets[i + 1]]`.

    Raises:
        ConfigError: `values` is not a flat uint16 or uint32 array, `offsets` do not run from 0 to its end without
            a step back, or there are more tokens than one shard can hold.
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
    documents = offsets.size - 1
    index = np.ascontiguousarray(offsets, dtype="<i4").data.cast("B")
    stream = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<")).data.cast("B")
    index_bytes, stream_bytes = _padded(len(index)), _padded(len(stream))
    schema = _schema_table(values.dtype.itemsize * 8)
    batch = Table(
        (
            Int("q", documents),
            Structs((struct.pack("<qq", documents, 0), struct.pack("<qq", values.size, 0))),
            # Validity of the lists, offsets, validity of the items, values. Nothing is null, so validity is empty.
            Structs(
                (
                    struct.pack("<qq", 0, 0),
                    struct.pack("<qq", 0, len(index)),
                    struct.pack("<qq", index_bytes, 0),
                    struct.pack("<qq", index_bytes, len(stream)),
                )
            ),
        )
    )
    head = _MAGIC + b"\0\0" + _message(_SCHEMA, schema)
    frame = _message(_BATCH, batch, start=len(head), body_bytes=index_bytes + stream_bytes)
    block = struct.pack("<qi4xq", len(head), len(frame), index_bytes + stream_bytes)
    footer = encode_flatbuffer(Table((_V5, schema, Structs(()), Structs((block,)))))
    body = len(head) + len(frame)
    data = b"".join(
        (
            *(head, frame),
            *(index, bytes(index_bytes - len(index))),
            *(stream, bytes(stream_bytes - len(stream))),
            *(_CONTINUES, bytes(4), footer, struct.pack("<i", len(footer)), _MAGIC),
        )
    )
    layout = TokenLayout(
        dtype=dtype, tokens=values.size, documents=documents, values_start=body + index_bytes, offsets_start=body
    )
    return EncodedShard(data=data, layout=layout)


def decode_tokens(raw: Buffer) -> tuple[Tokens, Offsets]:
    """Return the flat tokens (a view of `raw`) and the int64 document offsets of a token shard.

    Raises:
        CorruptError: not an Arrow file with one record batch of the schema of token shards, or its offsets do not
            cut up its tokens.
    """
    try:
        reader = pa.ipc.open_file(pa.py_buffer(raw))
        if reader.num_record_batches != 1 or reader.schema not in (token_schema("uint16"), token_schema("uint32")):
            raise _not_a_shard("its schema or number of record batches differs")
        batch = reader.get_batch(0)
        batch.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _not_a_shard(str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    column = cast("pa.ListArray[Any]", batch.column(0))
    values: Tokens = column.values.to_numpy(zero_copy_only=True)
    offsets = column.offsets.to_numpy(zero_copy_only=False).astype(np.int64)
    if not _offsets_fit(offsets, values.size):
        raise _not_a_shard("its offsets do not cut up its tokens")
    return values, offsets


def _offsets_fit(offsets: Offsets, tokens: int) -> bool:
    """Whether `offsets` run from 0 to `tokens` without a step back."""
    if offsets.ndim != 1 or offsets.size == 0 or not np.issubdtype(offsets.dtype, np.integer):
        return False
    return bool(offsets[0] == 0 and offsets[-1] == tokens and (np.diff(offsets) >= 0).all())


def _schema_table(bits: int) -> Table:
    def field(name: str, code: Int, kind: Table, children: list[Table]) -> Table:
        return Table((name, Int("B", 0), code, kind, None, children))

    item = field("item", _INT, Table((Int("i", bits), Int("B", 0))), [])
    return Table((Int("h", 0), [field("tokens", _LIST, Table(()), [item])]))


def _message(kind: Int, header: Table, *, start: int = 0, body_bytes: int = 0) -> bytes:
    """Return an encapsulated message; one that has a body is padded so that the body starts aligned."""
    metadata = encode_flatbuffer(Table((_V5, kind, header, Int("q", body_bytes))))
    if body_bytes:
        metadata += bytes(-(start + 8 + len(metadata)) % ALIGNMENT_BYTES)
    return _CONTINUES + struct.pack("<i", len(metadata)) + metadata


def _padded(size_bytes: int) -> int:
    return size_bytes + -size_bytes % ALIGNMENT_BYTES


def _not_a_shard(reason: str) -> CorruptError:
    return CorruptError(f"not a token shard: {reason}", hint="Restore this file from a copy, or ingest it again.")
