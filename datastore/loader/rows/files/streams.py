"""One Arrow stream, as Hugging Face `datasets` saves its rows: where each record batch begins, and one of them.

A stream has no table of contents, so indexing goes from message to message: one short read each, as a message says how long it
is. The few numbers that this takes are read out of its header here; pyarrow reads a message only with its body.

Source: https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format, and `Message.fbs` beside it
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from datastore.digest import digest_hex
from datastore.errors import ConfigError, CorruptError
from datastore.loader.rows.files.parquet import not_readable
from datastore.storage.base import Storage

__all__ = ["Contents", "read_contents", "read_schema", "read_stream_batch"]

_HEAD_BYTES = 16 * 2**10
"""Fetched of a message at first: most headers are shorter."""

_CONTINUES, _PREFIX_BYTES = 0xFFFFFFFF, 8
"""A message begins with this number, and the length of its header."""

_SCHEMA, _DICTIONARY, _BATCH = 1, 2, 3


class Message(NamedTuple):
    """One message of a stream."""

    kind: int
    start: int
    stop: int
    rows: int
    header: bytes


class Contents(NamedTuple):
    """What lies where in a stream."""

    schema: tuple[int, int]
    batches: tuple[tuple[int, int, int], ...]
    """First byte, last byte and rows of each record batch."""

    digest: str
    """Of all headers, which have the lengths of all values in them, but not the values."""


def read_contents(storage: Storage, key: str, *, size_bytes: int) -> Contents:
    """Return the contents of the stream `key`: one range read for each of its record batches.

    Raises:
        CorruptError: it is no Arrow stream, or it ends early.
        ConfigError: it has dictionaries.
        MissingError, StorageError: it cannot be read.
    """
    messages = list(_messages(storage, key, size_bytes=size_bytes))
    if not messages or messages[0].kind != _SCHEMA:
        raise _no_stream(key)
    if any(message.kind == _DICTIONARY for message in messages):
        raise ConfigError(
            "the stream has dictionaries",
            where=key,
            hint="Ingest it (`datastore.import_dataset`), or save plain values.",
        )
    batches = tuple((message.start, message.stop, message.rows) for message in messages if message.kind == _BATCH)
    digest = digest_hex(*(message.header for message in messages))
    return Contents((messages[0].start, messages[0].stop), batches, digest)


def read_schema(storage: Storage, key: str, span: tuple[int, int]) -> pa.Schema:
    """Return the schema that lies at `span` of a stream.

    Raises:
        CorruptError: there is none.
    """
    raw = storage.get_ranges(key, [span])[0]
    try:
        return pa.ipc.read_schema(pa.py_buffer(raw))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise not_readable(error, key) from None


def read_stream_batch(
    storage: Storage, key: str, span: tuple[int, int], *, schema: pa.Schema, columns: Sequence[str] | None
) -> pa.RecordBatch:
    """Return the record batch at `span`, `columns` of it. All of it is fetched, and only what is asked for is kept.

    Raises:
        CorruptError: it is damaged, as far as that can be seen: its values are not checked.
        MissingError, StorageError: it cannot be read.
    """
    raw = storage.get_ranges(key, [span])[0]
    try:
        batch = pa.ipc.read_record_batch(pa.py_buffer(raw), schema)
        batch.validate(full=True)
        if columns is not None and len(columns) < len(schema.names):
            # Its arrays are views of the message: copy those that are asked for, and let go of it.
            chosen = batch.select(list(columns))
            batch = pa.ipc.read_record_batch(chosen.serialize(), chosen.schema)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise not_readable(error, f"{key}, bytes {span[0]} to {span[1]}") from None
    return batch


def _messages(storage: Storage, key: str, *, size_bytes: int) -> Iterator[Message]:
    at = 0
    while at < size_bytes:
        header = _header(storage, key, at, size_bytes=size_bytes)
        if not header:
            return
        try:
            kind, body_bytes, rows = _parsed(header)
        except struct.error:
            raise _no_stream(key) from None
        stop = at + _PREFIX_BYTES + len(header) + body_bytes
        if body_bytes < 0 or stop > size_bytes:
            raise _no_stream(key)
        yield Message(kind, at, stop, rows, header)
        at = stop


def _header(storage: Storage, key: str, at: int, *, size_bytes: int) -> bytes:
    """Return the header of the message that begins at a byte; nothing at the end of the stream."""
    head = storage.get_ranges(key, [(at, min(size_bytes, at + _HEAD_BYTES))])[0]
    if len(head) < _PREFIX_BYTES:
        raise _no_stream(key)
    continues, length = struct.unpack_from("<II", head)
    stop = at + _PREFIX_BYTES + length
    if continues != _CONTINUES or stop > size_bytes:
        raise _no_stream(key)
    if stop > at + len(head):
        head += storage.get_ranges(key, [(at + len(head), stop)])[0]
    return head[_PREFIX_BYTES : _PREFIX_BYTES + length]


def _parsed(header: bytes) -> tuple[int, int, int]:
    """Return the kind of a message, the length of its body, and its rows, if it is a record batch."""
    root = struct.unpack_from("<I", header)[0]
    kind_at, what_at, body_at = (_field(header, root, number) for number in (1, 2, 3))
    kind = struct.unpack_from("<B", header, kind_at)[0] if kind_at else 0
    body_bytes = struct.unpack_from("<q", header, body_at)[0] if body_at else 0
    if kind != _BATCH:
        return kind, body_bytes, 0
    batch = what_at + struct.unpack_from("<I", header, what_at)[0]
    rows_at = _field(header, batch, 0)
    return kind, body_bytes, struct.unpack_from("<q", header, rows_at)[0] if rows_at else 0


def _field(header: bytes, table: int, number: int) -> int:
    """Return where a field of a flatbuffers table lies; 0 if it has its default."""
    fields = table - struct.unpack_from("<i", header, table)[0]
    size = struct.unpack_from("<H", header, fields)[0]
    offset = struct.unpack_from("<H", header, fields + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
    return table + offset if offset else 0


def _no_stream(key: str) -> CorruptError:
    return CorruptError("not a whole Arrow stream", where=key, hint="Write it again, or remove it.")
