"""Deleted documents: tables of row numbers beside the shards, so that a delete touches no shard.

A delete writes one small file and one commit, whatever the size of what it deletes; the union of a version's tables
says which rows of which shards are gone. The price is that readers must look here, and that the bytes stay on disk
until `purge` or `compact` writes the shards anew.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import Buffer

from datastore.digest import digest_hex
from datastore.errors import CorruptError
from datastore.storage.base import Storage
from datastore.store.checked import read_checked
from datastore.store.manifest import Commit, DeletionRef

__all__ = [
    "DELETIONS_SCHEMA",
    "Deletions",
    "decode_deletions",
    "deletions_key",
    "encode_deletions",
    "load_deletion",
    "load_deletions",
    "store_deletions",
]

Rows = npt.NDArray[np.int32]

DELETIONS_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.binary(16), nullable=False),
        pa.field("rows", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("tokens", pa.int64(), nullable=False),
    ]
)
"""One row per shard: its uid, the numbers of its deleted rows in ascending order, the tokens in them."""

_NONE: Rows = np.empty(0, np.int32)


class Deletions:
    """Which rows of which shards are deleted; immutable."""

    def __init__(self, tables: Sequence[pa.RecordBatch]) -> None:
        self.tokens = int(sum(np.asarray(table.column("tokens")).sum() for table in tables))
        """How many tokens are deleted."""
        self._rows: dict[str, Rows] = {}
        for table in tables:
            values, offsets = _lists(table)
            uids = cast("list[bytes]", table.column("uid").to_pylist())
            for uid, start, stop in zip(uids, offsets[:-1], offsets[1:], strict=True):
                found = values[start:stop]
                before = self._rows.get(uid.hex())
                self._rows[uid.hex()] = found if before is None else np.union1d(before, found)

    def __bool__(self) -> bool:
        return bool(self._rows)

    def rows(self, uid: str) -> Rows:
        """Return the deleted rows of the shard `uid`, in ascending order; none if nothing of it is deleted."""
        return self._rows.get(uid, _NONE)

    @property
    def uids(self) -> frozenset[str]:
        """The shards of which something is deleted."""
        return frozenset(self._rows)

    @property
    def documents(self) -> int:
        """How many documents are deleted."""
        return sum(rows.size for rows in self._rows.values())


def deletions_key(digest: str) -> str:
    """Return the key of the table of deletions with that digest."""
    return f"deletions/{digest}.arrow"


def encode_deletions(rows: Mapping[str, Rows], *, tokens: Mapping[str, int]) -> bytes:
    """Return the table that says that `rows[uid]` of each shard, with `tokens[uid]` tokens, are deleted."""
    uids = sorted(rows)
    lists = [np.unique(rows[uid]).astype(np.int32) for uid in uids]
    columns: list[Any] = [
        pa.array([bytes.fromhex(uid) for uid in uids], DELETIONS_SCHEMA.field("uid").type),
        pa.array(lists, DELETIONS_SCHEMA.field("rows").type),
        pa.array([tokens[uid] for uid in uids], pa.int64()),
    ]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, DELETIONS_SCHEMA) as writer:
        writer.write_batch(pa.record_batch(columns, schema=DELETIONS_SCHEMA))
    return sink.getvalue().to_pybytes()


def decode_deletions(raw: Buffer | pa.Buffer, *, where: str) -> pa.RecordBatch:
    """Return the table that `raw` holds; its digest is the caller's to check first.

    Raises:
        CorruptError: not a table of deletions, or its row numbers do not ascend.
    """
    try:
        reader = pa.ipc.open_file(raw if isinstance(raw, pa.Buffer) else pa.py_buffer(raw))
        if reader.num_record_batches != 1 or not reader.schema.equals(DELETIONS_SCHEMA):
            raise _damaged("other columns", where)
        table = reader.get_batch(0)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise _damaged(str(error).splitlines()[0] if str(error) else type(error).__name__, where) from None
    values, offsets = _lists(table)
    ascends = np.diff(values, prepend=np.int32(-1)) > 0
    ascends[offsets[:-1][np.diff(offsets) > 0]] = True
    if not ascends.all() or (values.size and values.min() < 0):
        raise _damaged("row numbers do not ascend", where)
    return table


def store_deletions(storage: Storage, rows: Mapping[str, Rows], *, tokens: Mapping[str, int]) -> DeletionRef:
    """Store the table that `encode_deletions` makes, and return how a commit names it."""
    raw = encode_deletions(rows, tokens=tokens)
    digest = digest_hex(raw)
    storage.put(deletions_key(digest), raw)
    return DeletionRef(
        digest=digest,
        file_bytes=len(raw),
        shards=len(rows),
        documents=sum(np.unique(numbers).size for numbers in rows.values()),
        tokens=sum(tokens[uid] for uid in rows),
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
    if (table.num_rows, _lists(table)[0].size) != (ref.shards, ref.documents):
        raise _damaged("it holds another number of rows than its commit says", where=key)
    return table


def _lists(table: pa.RecordBatch) -> tuple[Rows, Rows]:
    """Return the row numbers of all shards, end to end, and where those of each start."""
    column = cast("pa.ListArray[Any]", table.column("rows"))
    return np.asarray(column.values), np.asarray(column.offsets)


def _damaged(reason: str, where: str) -> CorruptError:
    return CorruptError(f"not a table of deletions: {reason}", where=where, hint="Restore this file from a copy.")
