"""Deleted documents: tables of row numbers beside the shards, so that a delete touches no shard.

A delete writes one small file and one commit, whatever the size of what it deletes; the union of a version's tables
says which rows of which shards are gone, and which stretches of tokens those are, so that nobody has to read a shard to
know what is missing in it. The price is that readers must look here, and that the bytes stay on disk until `purge` or
`compact` writes the shards anew.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import Buffer

from datastore.dataset.log.keys import deletions_key
from datastore.dataset.log.manifest import Commit, DeletionRef
from datastore.digest import digest_hex
from datastore.errors import CorruptError
from datastore.formats.arrow import array_of, numbers_of
from datastore.storage.base import Storage
from datastore.storage.verified import read_checked

__all__ = [
    "DELETIONS_SCHEMA",
    "Deletions",
    "add_deletions",
    "decode_deletions",
    "drop_deletions",
    "encode_deletions",
    "load_deletion",
    "load_deletions",
    "merge_spans",
    "store_deletions",
]

I64 = npt.NDArray[np.int64]

Rows = npt.NDArray[np.int32]

Lengths = Mapping[str, npt.NDArray[np.integer]]

DELETIONS_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.binary(16), nullable=False),
        pa.field("rows", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
        pa.field("spans", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
    ]
)
"""One row per shard: its uid, the numbers of its deleted rows in ascending order, how many tokens those have, and which:
first and one past the last of each run, in ascending order, runs that touch made one."""

_MERGE_RATIO = 4
"""A table is merged into the one added after it if it has less than this many times its documents."""

_NONE: Rows = np.empty(0, np.int32)

_NO_LENGTHS: Lengths = MappingProxyType({})


class Deletions:
    """Which rows of which shards are deleted; immutable."""

    def __init__(self, tables: Sequence[pa.RecordBatch]) -> None:
        self.tokens = int(sum(numbers_of(table.column("tokens")).sum() for table in tables))
        """How many tokens are deleted."""
        self._rows = _merged(tables, "rows", np.union1d)
        self._spans = _merged(tables, "spans", _union)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def rows(self, uid: str) -> Rows:
        """Return the deleted rows of the shard `uid`, in ascending order; none if nothing of it is deleted."""
        return self._rows.get(uid, _NONE)

    def spans(self, uid: str) -> I64:
        """Return [K, 2] the deleted tokens of the shard `uid` as stretches [start, stop), in order, none touching."""
        return self._spans.get(uid, _NONE).astype(np.int64).reshape(-1, 2)

    @property
    def uids(self) -> frozenset[str]:
        """The shards of which something is deleted."""
        return frozenset(self._rows)

    @property
    def documents(self) -> int:
        """How many documents are deleted."""
        return sum(rows.size for rows in self._rows.values())


def merge_spans(spans: npt.NDArray[np.integer]) -> I64:
    """Return the union of stretches [K, 2] of numbers [start, stop), in order, none empty, none touching."""
    ordered = spans[np.argsort(spans[:, 0], kind="stable")].astype(np.int64)
    ordered = ordered[ordered[:, 1] > ordered[:, 0]]
    reach = np.maximum.accumulate(ordered[:, 1]) if len(ordered) else ordered[:, 1]
    first = np.ones(len(ordered), np.bool_)
    first[1:] = ordered[1:, 0] > reach[:-1]
    last = np.append(first[1:], True)[: len(ordered)]
    return np.stack([ordered[first, 0], reach[last]], axis=1)


def _union(one: Rows, other: Rows) -> Rows:
    return merge_spans(np.concatenate([one, other]).reshape(-1, 2)).reshape(-1).astype(np.int32)


def _merged(tables: Sequence[pa.RecordBatch], name: str, union: Callable[[Rows, Rows], Rows]) -> dict[str, Rows]:
    """Return the column `name` by the uid of the shard; a shard in several tables gets the union of what they say."""
    found: dict[str, Rows] = {}
    for table in tables:
        values, offsets = _lists(table, name)
        uids = cast("list[bytes]", table.column("uid").to_pylist())
        for uid, start, stop in zip(uids, offsets[:-1], offsets[1:], strict=True):
            before = found.get(uid.hex())
            found[uid.hex()] = values[start:stop] if before is None else union(before, values[start:stop])
    return found


def encode_deletions(rows: Mapping[str, Rows], *, lengths: Lengths = _NO_LENGTHS) -> bytes:
    """Return the table that says that `rows[uid]` of each shard are deleted.

    `lengths[uid]` are the tokens of every row of that shard, deleted or not; records have none.
    """
    unique = {uid: np.unique(numbers).astype(np.int32) for uid, numbers in rows.items()}
    return _encode(unique, {uid: _token_spans(numbers, lengths.get(uid)) for uid, numbers in unique.items()})


def _encode(rows: Mapping[str, Rows], spans: Mapping[str, I64]) -> bytes:
    uids = sorted(rows)
    columns: list[list[Any]] = [
        [bytes.fromhex(uid) for uid in uids],
        [rows[uid] for uid in uids],
        [int((spans[uid][:, 1] - spans[uid][:, 0]).sum()) for uid in uids],
        [spans[uid].reshape(-1).astype(np.int32) for uid in uids],
    ]
    arrays = [array_of(column, field.type) for field, column in zip(DELETIONS_SCHEMA, columns, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, DELETIONS_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=DELETIONS_SCHEMA))
    return sink.getvalue().to_pybytes()


def _token_spans(rows: Rows, lengths: npt.NDArray[np.integer] | None) -> I64:
    if lengths is None:
        return np.empty((0, 2), np.int64)
    stops = np.cumsum(lengths, dtype=np.int64)
    return merge_spans(np.stack([stops - lengths, stops], axis=1)[rows])


def decode_deletions(raw: Buffer | pa.Buffer, *, where: str) -> pa.RecordBatch:
    """Return the table that `raw` holds; its digest is the caller's to check first.

    Raises:
        CorruptError: not a table of deletions, or what is in it does not ascend or add up.
    """
    try:
        reader = pa.ipc.open_file(raw if isinstance(raw, pa.Buffer) else pa.py_buffer(raw))
        if reader.num_record_batches != 1 or not reader.schema.equals(DELETIONS_SCHEMA):
            raise _damaged("other columns", where)
        table = reader.get_batch(0)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _damaged(str(error).splitlines()[0] if str(error) else type(error).__name__, where) from None
    if not _ascends(table, "rows"):
        raise _damaged("row numbers do not ascend", where)
    if not (_ascends(table, "spans") and _adds_up(table)):
        raise _damaged("its stretches of tokens do not ascend or add up", where)
    return table


def _ascends(table: pa.RecordBatch, name: str) -> bool:
    values, offsets = _lists(table, name)
    larger = np.diff(values, prepend=np.int32(-1)) > 0
    larger[offsets[:-1][np.diff(offsets) > 0]] = True
    return bool(larger.all()) and not (values.size and values.min() < 0)


def _adds_up(table: pa.RecordBatch) -> bool:
    """Whether the stretches of each shard come in pairs and hold as many tokens as it says."""
    values, offsets = _lists(table, "spans")
    if (offsets % 2).any():
        return False
    ends = np.zeros(int(offsets[-1]) // 2 + 1, np.int64)
    values = values[: offsets[-1]].astype(np.int64)
    np.cumsum(values[1::2] - values[::2], out=ends[1:])
    return bool((np.diff(ends[offsets // 2]) == numbers_of(table.column("tokens"))).all())


def store_deletions(storage: Storage, rows: Mapping[str, Rows], *, lengths: Lengths = _NO_LENGTHS) -> DeletionRef:
    """Store the table that `encode_deletions` makes, and return how a commit names it."""
    return _store(storage, encode_deletions(rows, lengths=lengths))


def add_deletions(
    storage: Storage, refs: Sequence[DeletionRef], rows: Mapping[str, Rows], *, lengths: Lengths = _NO_LENGTHS
) -> tuple[DeletionRef, ...]:
    """Return `refs` with what `encode_deletions` would say of `rows`, none of which they have; stored.

    Small tables at their end are merged into the new one, so that there are never more than some ten of them, and
    each is written again a few times at most.
    """
    merged, total = 0, sum(len(numbers) for numbers in rows.values())
    for ref in reversed(refs):
        if ref.documents >= _MERGE_RATIO * total:
            break
        merged, total = merged + 1, total + ref.documents
    kept = len(refs) - merged
    tables = [load_deletion(storage, ref) for ref in refs[kept:]]
    tables.append(decode_deletions(encode_deletions(rows, lengths=lengths), where="memory"))
    return (*refs[:kept], _store(storage, _encode_all(Deletions(tables), without=())))


def drop_deletions(storage: Storage, deletions: Deletions, *, uids: Collection[str]) -> tuple[DeletionRef, ...]:
    """Return, stored as one table, what `deletions` say of other shards than `uids`; nothing, if that is nothing."""
    if deletions.uids <= frozenset(uids):
        return ()
    return (_store(storage, _encode_all(deletions, without=uids)),)


def _encode_all(deletions: Deletions, *, without: Collection[str]) -> bytes:
    rows = {uid: deletions.rows(uid) for uid in deletions.uids.difference(without)}
    return _encode(rows, {uid: deletions.spans(uid) for uid in rows})


def _store(storage: Storage, raw: bytes) -> DeletionRef:
    table = decode_deletions(raw, where="memory")
    digest = digest_hex(raw)
    storage.put(deletions_key(digest), raw)
    return DeletionRef(
        digest=digest,
        file_bytes=len(raw),
        shards=table.num_rows,
        documents=_lists(table, "rows")[0].size,
        tokens=int(numbers_of(table.column("tokens")).sum()),
    )


def load_deletions(storage: Storage, commit: Commit) -> Deletions:
    """Return what is deleted in `commit`.

    Raises:
        MissingError: a table is gone.
        CorruptError: a table is damaged, or does not hold what the commit says.
    """
    return Deletions([load_deletion(storage, ref) for ref in commit.deletions])


def load_deletion(storage: Storage, ref: DeletionRef) -> pa.RecordBatch:
    """Return one table of deletions."""
    key = deletions_key(ref.digest)
    table = decode_deletions(read_checked(storage, key, size_bytes=ref.file_bytes, digest=ref.digest), where=key)
    if (table.num_rows, _lists(table, "rows")[0].size) != (ref.shards, ref.documents):
        raise _damaged("it holds another number of rows than its commit says", where=key)
    return table


def _lists(table: pa.RecordBatch, name: str) -> tuple[Rows, Rows]:
    """Return the numbers of all shards in column `name`, end to end, and where those of each start."""
    column = cast("pa.ListArray[Any]", table.column(name))
    return numbers_of(column.values), numbers_of(column.offsets)


def _damaged(reason: str, where: str) -> CorruptError:
    return CorruptError(f"not a table of deletions: {reason}", where=where, hint="Restore this file from a copy.")
