"""A shard with the content of some rows gone, and everything else where it was: same rows, same tokens, same places.

In a token shard the tokens of those rows become end-of-text, their columns zero, and their rows in the documents file
empty, the count of tokens apart. In a record shard every value of those rows becomes null, or, where the schema allows
no null, the empty value of its type: zero, no text, no bytes, an empty list. So row numbers stay what they are, and a
run keeps its map from step to sample. The file gets another name, which says what is blank in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

from datastore.dataset.log.keys import documents_key, shard_key
from datastore.dataset.shards.files import read_documents, read_record_shard, read_token_shard, write_record_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.digest import block_digests, digest_bytes, digest_hex
from datastore.errors import ConfigError
from datastore.formats.arrow import array_of, numbers_of, scalar_of
from datastore.formats.documents import encode_documents
from datastore.formats.fitting import fit_array
from datastore.storage.base import Storage
from datastore.storage.verified import read_checked

__all__ = ["BlankedShard", "blank_name", "blank_shard", "is_blank"]

Rows = npt.NDArray[np.int32]

_NO_DIGEST = bytes(16)


@dataclass(frozen=True, slots=True)
class BlankedShard:
    """What was stored, and what was taken out."""

    shard: ShardInfo
    ids: tuple[str, ...]
    """Ids of the rows that were not blank before; of records, if they have a column `id`."""

    documents: int
    tokens: int


def blank_name(uid: str, rows: Rows) -> str:
    """Return what the file of the shard `uid` is called when exactly `rows` are blank in it."""
    return f"{uid}-{digest_hex(np.asarray(rows, '<i4').tobytes())[:16]}"


def blank_shard(storage: Storage, shard: ShardInfo, rows: Rows, *, end_of_text: int) -> BlankedShard:
    """Store `shard` again with `rows` blank. The same rows give the same bytes, under the same name.

    Raises:
        MissingError, CorruptError: a file of the shard is gone or damaged.
        ConfigError: a column has a type of which no row can be blank.
    """
    name = blank_name(shard.uid, rows)
    if shard.kind == "records":
        return _blank_records(storage, shard, rows, name)
    return _blank_tokens(storage, shard, rows, name, end_of_text)


def is_blank(storage: Storage, shard: ShardInfo, rows: Rows, *, end_of_text: int) -> bool:
    """Return whether the stored `shard`, every byte of it read and checked, has nothing in `rows`.

    Raises:
        MissingError, CorruptError: a file of the shard is gone or damaged.
    """
    if PurePosixPath(shard.path).stem != blank_name(shard.uid, rows):
        return False
    if shard.kind == "records":
        return bool(_blank_already(read_record_shard(storage, shard), rows).all())
    values, offsets = read_token_shard(storage, shard)
    spans = _in_rows(np.diff(offsets), rows)
    documents = read_documents(storage, shard, columns=["id", "source", "digest"]).take(_index(rows))
    seen = {tuple(row.values()) for row in documents.to_pylist()}
    return bool((values[spans] == end_of_text).all()) and seen <= {("", "", _NO_DIGEST)}


def _in_rows(lengths: npt.NDArray[np.integer], rows: Rows) -> npt.NDArray[np.bool_]:
    """Return for each token whether it is in one of `rows`."""
    chosen = np.zeros(lengths.size, np.bool_)
    chosen[rows] = True
    return np.repeat(chosen, lengths)


def _blank_tokens(storage: Storage, shard: ShardInfo, rows: Rows, name: str, end_of_text: int) -> BlankedShard:
    # In place, in a copy of the file: whatever else is in it stays, byte by byte.
    data = bytearray(read_checked(storage, shard.path, size_bytes=shard.size_bytes, digest=shard.digest))
    offsets = np.frombuffer(data, shard.offsets_dtype, shard.documents + 1, shard.offsets_start)
    spans = _in_rows(np.diff(offsets), rows)
    np.frombuffer(data, shard.dtype, shard.tokens, shard.values_start)[spans] = end_of_text
    for column in shard.layout.columns:
        values = np.frombuffer(data, column.dtype, shard.tokens * column.width, column.values_start)
        values.reshape(-1, column.width)[spans] = 0
    before = read_documents(storage, shard)
    gone = before.take(_index(rows))
    fresh = gone.filter(pc.not_equal(gone.column("digest"), scalar_of(_NO_DIGEST, pa.binary(16))))
    documents = _blank_documents(before, rows)
    docs = encode_documents(documents)
    path, docs_path = shard_key(name), documents_key(name)
    storage.put(docs_path, docs)
    storage.put(path, data)
    sources = [source for source in documents.column("source").to_pylist() if source]
    return BlankedShard(
        shard=msgspec.structs.replace(
            shard,
            path=path,
            digest=digest_bytes(data),
            block_digests=block_digests(data, shard.block_bytes),
            docs_path=docs_path,
            docs_bytes=len(docs),
            docs_digest=digest_bytes(docs),
            source_first=sources[0] if sources else "",
            source_last=sources[-1] if sources else "",
        ),
        ids=tuple(str(name) for name in fresh.column("id").to_pylist()),
        documents=fresh.num_rows,
        tokens=int(numbers_of(fresh.column("tokens")).sum()),
    )


def _blank_documents(table: pa.Table, rows: Rows) -> pa.Table:
    blank = np.zeros(table.num_rows, np.bool_)
    blank[rows] = True
    nothing: dict[str, Any] = {"id": "", "source": "", "offset": 0, "length": 0, "digest": _NO_DIGEST}
    columns = [
        pc.if_else(array_of(blank), scalar_of(nothing[name], table.schema.field(name).type), table.column(name))
        if name in nothing
        else table.column(name)
        for name in table.column_names
    ]
    return pa.table(columns, schema=table.schema)


def _blank_records(storage: Storage, shard: ShardInfo, rows: Rows, name: str) -> BlankedShard:
    table = read_record_shard(storage, shard)
    fresh = rows[~_blank_already(table, rows)]
    ids = table.column("id").take(_index(fresh)).to_pylist() if "id" in table.column_names else []
    written = write_record_shard(
        storage, uid=shard.uid, table=_blank_rows(table, rows), format=shard.layout.format, name=name
    )
    named = tuple(str(value) for value in ids if value is not None)
    return BlankedShard(shard=written, ids=named, documents=fresh.size, tokens=0)


def _blank_rows(table: pa.Table, rows: Rows) -> pa.Table:
    """Return `table` with nothing in `rows`, in memory that holds nothing of what was there."""
    gone = np.zeros(table.num_rows, np.bool_)
    gone[rows] = True
    columns = []
    for field, column in zip(table.schema, table.columns, strict=True):
        plain, blank = _plain_and_blank(column, field)
        try:
            taken = _replaced(plain, blank, gone)
            columns.append(taken if field.type == plain.type else _cast(taken, field))
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise _never_blank(field, error) from None
    return pa.table(columns, schema=table.schema)


def _replaced(column: Any, blank: Any, gone: npt.NDArray[np.bool_]) -> Any:
    """Return a copy of `column` with `blank` in the places of `gone`; each array of it for itself, for it may be full."""
    chunks, start = [], 0
    for chunk in column.chunks:
        order = np.arange(len(chunk))
        order[gone[start : start + len(chunk)]] = len(chunk)
        chunks.append(pa.concat_arrays([chunk, blank]).take(_index(order)))
        start += len(chunk)
    return pa.chunked_array(chunks, column.type)


def _blank_already(table: pa.Table, rows: Rows) -> npt.NDArray[np.bool_]:
    """Return which of `rows` have nothing in them."""
    found = np.ones(len(rows), np.bool_)
    for field, column in zip(table.schema, table.columns, strict=True):
        plain, blank = _plain_and_blank(column, field)
        start = 0
        for chunk in plain.chunks:
            places = np.flatnonzero(found & (rows >= start) & (rows < start + len(chunk)))
            values = chunk.take(_index(rows[places] - start))
            for number, place in enumerate(places.tolist()):
                found[place] = values.slice(number, 1).equals(blank)
            start += len(chunk)
    return found


def _plain_and_blank(column: Any, field: "pa.Field[Any]") -> tuple[Any, Any]:
    """Return `column` without dictionaries and views, and an array of one blank value of its type then."""
    kind = _plain(field.type)
    try:
        blank: Any = pa.nulls(1, kind) if field.nullable else pa.array([_empty(kind)], kind)
        return (column if field.type == kind else _fitted(column, field.with_type(kind))), blank
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise _never_blank(field, error) from None


def _cast(column: Any, field: "pa.Field[Any]") -> Any:
    try:
        return column.cast(field.type)
    except pa.ArrowException:  # pyarrow casts no values of a fixed size to a dictionary (26.0.1).
        return _fitted(column, field)


def _fitted(column: Any, field: "pa.Field[Any]") -> Any:
    return pa.chunked_array([fit_array(chunk, field, field.name) for chunk in column.chunks], type=field.type)


def _never_blank(field: "pa.Field[Any]", error: Exception) -> ConfigError:
    return ConfigError(
        f"a row of this column cannot be blank: {error}",
        column=field.name,
        type=str(field.type),
        hint="Drop the deleted rows with `compact`, then purge.",
    )


def _index(rows: npt.NDArray[np.integer]) -> Any:
    return array_of(rows)


def _plain(kind: Any) -> Any:
    """Return the type of the same values that keeps no value which no row has: no dictionaries, no views."""
    if pt.is_dictionary(kind) or pt.is_run_end_encoded(kind):
        return _plain(kind.value_type)
    if pt.is_struct(kind):
        return pa.struct([_plain_in(kind.field(i)) for i in range(kind.num_fields)])
    for tests, plain in _LISTS:
        if any(test(kind) for test in tests):
            return plain(kind)
    return kind


def _plain_in(field: Any) -> Any:
    return field.with_type(_plain(field.type))


_LISTS: Sequence[tuple[Sequence[Any], Any]] = (
    ((pt.is_string_view,), lambda _: pa.string()),
    ((pt.is_binary_view,), lambda _: pa.binary()),
    ((pt.is_list, pt.is_list_view), lambda kind: pa.list_(_plain_in(kind.value_field))),
    ((pt.is_large_list, pt.is_large_list_view), lambda kind: pa.large_list(_plain_in(kind.value_field))),
    ((pt.is_fixed_size_list,), lambda kind: pa.list_(_plain_in(kind.value_field), kind.list_size)),
)

_EMPTY: Sequence[tuple[Any, Any]] = (
    (pt.is_null, None),
    (pt.is_boolean, False),
    (pt.is_integer, 0),
    (pt.is_floating, 0.0),
    (pt.is_decimal, Decimal(0)),
    (pt.is_string, ""),
    (pt.is_large_string, ""),
    (pt.is_binary, b""),
    (pt.is_large_binary, b""),
    (pt.is_date, datetime(1970, 1, 1, tzinfo=UTC).date()),
    (pt.is_time, datetime(1970, 1, 1, tzinfo=UTC).time()),
    (pt.is_duration, 0),
    (pt.is_interval, (0, 0, 0)),
    (pt.is_map, []),
    (pt.is_list, []),
    (pt.is_large_list, []),
)


def _empty(kind: Any) -> Any:
    """Return the empty value of a plain type, as pyarrow takes it."""
    if isinstance(kind, pa.BaseExtensionType):
        return _empty(kind.storage_type)
    if pt.is_timestamp(kind):
        return datetime(1970, 1, 1, tzinfo=UTC if kind.tz else None)
    if pt.is_fixed_size_binary(kind):
        return bytes(kind.byte_width)
    if pt.is_fixed_size_list(kind):
        return [_empty_in(kind.value_field)] * kind.list_size
    if pt.is_struct(kind):
        return {kind.field(i).name: _empty_in(kind.field(i)) for i in range(kind.num_fields)}
    return next((value for test, value in _EMPTY if test(kind)), None)


def _empty_in(field: Any) -> Any:
    return None if field.nullable else _empty(field.type)
