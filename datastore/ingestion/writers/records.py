"""Writing records: rows are collected into shards, and the end of the `with` block commits them all or none.

    with record_writer("data/new", schema={"text": "string", "image": "image/jpeg"}) as out:
        out.write({"text": "one row", "image": jpeg})

If the block raises, or is interrupted, what was written is removed and nothing is committed. A process that is
killed leaves shards that no version names: nobody reads them.
"""

import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import msgspec
import pyarrow as pa
from typing_extensions import override

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.keys import commit_key
from datastore.dataset.log.manifest import Commit
from datastore.dataset.operations.append import Opened, Operation, add_shards
from datastore.dataset.operations.transaction import draft_commit
from datastore.dataset.roots import create_at
from datastore.dataset.shards.files import remove_unused, shard_uid, write_record_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.errors import ConfigError
from datastore.formats.evolution import without_numbers
from datastore.formats.fitting import check_rows
from datastore.formats.huggingface import keep_features
from datastore.formats.joining import cut_to_fit
from datastore.formats.plain import table_of_rows
from datastore.formats.records import RecordFormat, check_format
from datastore.formats.schema import (
    SchemaLike,
    check_storable,
    decode_schema,
    encode_schema,
    record_schema,
    with_wide_indices,
)
from datastore.storage.base import Storage
from datastore.storage.wrappers import LaterPuts

__all__ = ["RecordWriter", "ShardWriter", "record_writer"]

_SHARD_BYTES = 64 * 2**20

Rows = pa.Table | pa.RecordBatch | Mapping[str, Any] | Iterable[Mapping[str, Any]]


def record_writer(
    url: str | os.PathLike[str] | Storage,
    *,
    schema: SchemaLike | None = None,
    operation: Operation = "append",
    format: RecordFormat = "arrow",  # noqa: A002
) -> "RecordWriter":
    """Return a writer of records to the dataset at `url`, which is made if it is not there.

    `schema` is an Arrow schema, or maps column names to types as `parse_field` reads them; without one, the dataset's
    own holds; if it is new, that of the first rows written, categories numbered by 32 bits. `format` is that of the new shards:
    Arrow is read faster, Parquet is smaller. A dataset may hold both. With `operation="overwrite"` the new version holds
    only what is written here; older ones stay.

    Raises:
        ConfigError: the place holds something else, tokens, or records of another schema; or a column cannot be stored.
    """
    given = None if schema is None else record_schema(schema)
    storage, info = create_at(url)
    found = CommitLog(storage, exclusive=info.exclusive).newest_stored()
    newest = found.commit if found else None
    if newest is None or operation == "overwrite":
        fresh = None if given is None else _checked(without_numbers(keep_features(given)), format)
        return RecordWriter(storage, schema=fresh, operation=operation, format=format)
    if newest.kind != "records":
        raise ConfigError("the dataset holds tokens, not records", url=storage.url, hint="Name another URL.")
    stored = decode_schema(newest.record_schema, where=commit_key(newest.version))
    if given is not None and not given.equals(stored):
        raise ConfigError(
            "the dataset has another schema",
            url=storage.url,
            columns=stored.names,
            hint="Leave out the schema to write rows of the dataset's own, or name another URL.",
        )
    check_format(stored, format=format)  # What is there stays, also of types that are refused today.
    writer = RecordWriter(storage, schema=stored, operation=operation, format=format)
    writer.opened = Opened(info, found) if found else None
    return writer


_AT_ONCE_S = 10.0
"""A writer that is open for longer looks again which version is the newest."""


class ShardWriter(ABC):
    """The life of a writer: shards are stored as they fill, and the end of the `with` block commits them all or none."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.commit: Commit | None = None
        """The version that was committed, once the block has ended."""
        self._shards: list[ShardInfo] = []
        self._last = LaterPuts(storage)
        self._to: Storage = storage

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._withdraw()
            return
        self._to = self._last  # Flushed while the commit is made.
        self._store_shard()
        self.commit = self._commit()

    @abstractmethod
    def _store_shard(self) -> None:
        """Store what was collected in `_to`, as one more of `_shards`, if there is anything."""

    @abstractmethod
    def _commit(self) -> Commit:
        """Make `_shards` part of the dataset, once `_last` has settled."""

    def _withdraw(self) -> None:
        """Remove the shards written so far; no version names them."""
        remove_unused(self.storage, (path for shard in self._shards for path in (shard.path, shard.docs_path) if path))


class RecordWriter(ShardWriter):
    """Collects rows into shards of about 64 MiB. Not safe for several threads."""

    def __init__(
        self,
        storage: Storage,
        *,
        schema: pa.Schema | None,
        operation: Operation,
        format: RecordFormat = "arrow",  # noqa: A002
    ) -> None:
        super().__init__(storage)
        self.schema = schema
        self.operation: Operation = operation
        self.format: RecordFormat = format
        self.opened: Opened | None = None
        """What was found where the rows go, and is taken for the newest version by a commit that comes at once."""
        self._began = time.monotonic()
        self._task_id = uuid.uuid4().hex
        self._parts: list[pa.Table] = []
        self._bytes = 0

    def write(self, rows: Rows) -> None:
        """Add one row (a mapping from column to value), any iterable of rows, a record batch or a table.

        Raises:
            ConfigError: a row does not fit the schema; the rows of this call are not written.
            StorageError: a full shard could not be stored.
        """
        table = self._table_of(rows)
        if table is None:
            return
        rows_per_shard = max(1, -(-table.num_rows * _SHARD_BYTES // max(1, table.nbytes)))
        for start in range(0, table.num_rows, rows_per_shard):
            self._parts.append(table.slice(start, rows_per_shard))
            self._bytes += self._parts[-1].nbytes
            # Rows vary in size: what is nearly full would otherwise get as much again.
            if self._bytes >= _SHARD_BYTES - _SHARD_BYTES // 8:
                self._store_shard()

    @override
    def _commit(self) -> Commit:
        if self.schema is None:
            raise ConfigError(
                "nothing was written, and no schema is known",
                url=self.storage.url,
                hint="Write a row, or give a schema.",
            )
        schema = encode_schema(self.schema)
        draft = msgspec.structs.replace(draft_commit(self.operation), kind="records", record_schema=schema)
        try:
            opened = self.opened if time.monotonic() - self._began < _AT_ONCE_S else None
            return add_shards(self.storage, self._shards, draft, settle=self._last.settle, opened=opened)
        except ConfigError:
            # Somebody changed the dataset's schema meanwhile. Nothing is committed, for certain.
            self._last.settle()
            self._withdraw()
            raise

    def _table_of(self, rows: Rows) -> pa.Table | None:
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        if not isinstance(rows, pa.Table):
            listed = [rows] if isinstance(rows, Mapping) else list(rows)
            if not listed:
                return None
            rows = table_of_rows(listed, self.schema)
        if self.schema is None:
            fresh = without_numbers(keep_features(rows.schema))
            self.schema = _checked(with_wide_indices(fresh), self.format)
        return check_rows(rows, self.schema)

    @override
    def _store_shard(self) -> None:
        if self._parts:
            for table in cut_to_fit(pa.concat_tables(self._parts)):
                uid = shard_uid(self._task_id, len(self._shards))
                self._shards.append(write_record_shard(self._to, uid=uid, table=table, format=self.format))
            self._parts, self._bytes = [], 0


def _checked(schema: pa.Schema, format: RecordFormat) -> pa.Schema:  # noqa: A002
    check_storable(schema)
    check_format(schema, format=format)
    return schema
