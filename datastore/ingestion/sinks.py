"""Documents on their way into shards, in order: collected until a shard is full, then stored.

A shard is full with the batch that reaches `shard_bytes`; batches are cut by the records alone, so the borders of
shards are a function of the task and the settings.

Rows and tokens that are taken over as they are, into shards.

An import is strict: a row that does not fit ends it, for what another tool has written it has written on purpose. The
shards depend on the task and the settings alone, as with text. Tokens are as wide as the tokenizer's vocabulary needs;
without one, each shard is as wide as the largest id in it, which a reader does not notice.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds
import xxhash
from typing_extensions import override

from datastore.dataset.log.manifest import TokenizerRef
from datastore.dataset.shards.files import shard_uid, write_record_shard, write_token_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.errors import ConfigError
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.schema import check_rows
from datastore.formats.tokens import Tokens, narrow_tokens, token_dtype
from datastore.ingestion.encoding.encoder import Counts, TextEncoder
from datastore.ingestion.reading.documents import Reject, TextRecord, reject
from datastore.storage.base import Storage

__all__ = [
    "RECORDS_SCHEMA",
    "CopiedRows",
    "CopiedTokens",
    "CopySink",
    "RecordShards",
    "ShardSink",
    "TokenShards",
    "is_token_column",
]

_RECORD_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "source": pa.string(),
    "offset": pa.int64(),
    "text": pa.string(),
}

RECORDS_SCHEMA = pa.schema(pa.field(name, kind, nullable=False) for name, kind in _RECORD_COLUMNS.items())
"""The columns of text that stays text."""


class ShardSink(Protocol):
    """Takes the documents of one task."""

    shards: list[ShardInfo]
    """What was stored so far."""

    tokens: int

    def add(self, records: Sequence[TextRecord]) -> tuple[list[TextRecord], list[Reject]]:
        """Take a batch; return those that became documents, and the others."""
        ...

    def flush(self) -> None:
        """Store what is left."""
        ...


class TokenShards(ShardSink):
    """Encodes, and stores tokens with a row for each document."""

    def __init__(self, storage: Storage, task_id: str, *, encoder: TextEncoder, shard_bytes: int) -> None:
        self.shards = []
        self.tokens = 0
        self._storage = storage
        self._task_id = task_id
        self._encoder = encoder
        self._shard_bytes = shard_bytes
        self._values: list[Tokens] = []
        self._counts: list[Counts] = []
        self._records: list[TextRecord] = []
        self._size_bytes = 0

    @override
    def add(self, records: Sequence[TextRecord]) -> tuple[list[TextRecord], list[Reject]]:
        encoded = self._encoder.encode([record.text for record in records])
        taken = [record for i, record in enumerate(records) if i not in encoded.faults]
        faulty = [(records[i], reason) for i, reason in sorted(encoded.faults.items())]
        self._values.append(encoded.values)
        self._counts.append(encoded.counts)
        self._records += taken
        self._size_bytes += encoded.values.nbytes
        self.tokens += encoded.values.size
        if self._size_bytes >= self._shard_bytes:
            self.flush()
        return taken, [reject(record.source, record.offset, reason, record.text) for record, reason in faulty]

    @override
    def flush(self) -> None:
        if not self._records:
            return
        counts = np.concatenate(self._counts)
        offsets = np.zeros(len(counts) + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        shard = write_token_shard(
            self._storage,
            uid=shard_uid(self._task_id, len(self.shards)),
            values=narrow_tokens(np.concatenate(self._values), self._encoder.dtype),
            offsets=offsets,
            documents=_documents_of_texts(self._records, counts),
        )
        self.shards.append(shard)
        self._values, self._counts, self._records, self._size_bytes = [], [], [], 0


class RecordShards(ShardSink):
    """Stores texts as they are."""

    def __init__(self, storage: Storage, task_id: str, *, shard_bytes: int) -> None:
        self.shards = []
        self.tokens = 0
        self._storage = storage
        self._task_id = task_id
        self._shard_bytes = shard_bytes
        self._records: list[TextRecord] = []
        self._size_bytes = 0

    @override
    def add(self, records: Sequence[TextRecord]) -> tuple[list[TextRecord], list[Reject]]:
        self._records += records
        self._size_bytes += sum(record.length for record in records)
        if self._size_bytes >= self._shard_bytes:
            self.flush()
        return list(records), []

    @override
    def flush(self) -> None:
        if not self._records:
            return
        names, sources, offsets, _, texts, _ = zip(*self._records, strict=True)
        table = pa.table([names, sources, offsets, texts], schema=RECORDS_SCHEMA)
        uid = shard_uid(self._task_id, len(self.shards))
        self.shards.append(write_record_shard(self._storage, uid=uid, table=table))
        self._records, self._size_bytes = [], 0


def _documents_of_texts(records: Sequence[TextRecord], counts: Counts) -> pa.Table:
    names, sources, offsets, lengths, texts, _ = zip(*records, strict=True)
    digests = [xxhash.xxh3_128_digest(text.encode()) for text in texts]
    return pa.table(
        [names, sources, offsets, lengths, counts, pa.array(digests, pa.binary(16))], schema=DOCUMENTS_SCHEMA
    )


class CopySink(Protocol):
    """Takes the rows of one task."""

    shards: list[ShardInfo]
    documents: int
    tokens: int

    def add(self, first: int, rows: pa.Table, *, source: str) -> None:
        """Take rows of the file `source`, of which the first is row `first` of it."""
        ...

    def flush(self) -> None:
        """Store what is left."""
        ...


class CopiedRows(CopySink):
    """Stores all columns, as records of `schema`."""

    def __init__(self, storage: Storage, task_id: str, *, schema: pa.Schema, shard_bytes: int) -> None:
        self.shards = []
        self.documents = 0
        self.tokens = 0
        self._storage = storage
        self._task_id = task_id
        self._schema = schema
        self._shard_bytes = shard_bytes
        self._parts: list[pa.Table] = []
        self._bytes = 0

    @override
    def add(self, first: int, rows: pa.Table, *, source: str) -> None:
        try:
            self._parts.append(check_rows(rows.replace_schema_metadata(), self._schema))
        except ConfigError as error:
            raise ConfigError(
                error.fact, file=source, row=first, hint="Import files of one schema at a time."
            ) from None
        self.documents += rows.num_rows
        self._bytes += rows.nbytes
        if self._bytes >= self._shard_bytes:
            self.flush()

    @override
    def flush(self) -> None:
        if self._parts:
            uid = shard_uid(self._task_id, len(self.shards))
            self.shards.append(write_record_shard(self._storage, uid=uid, table=pa.concat_tables(self._parts)))
            self._parts, self._bytes = [], 0


class CopiedTokens(CopySink):
    """Stores the column `key` as tokens, and what the others say of each document: its id, and where it comes from."""

    def __init__(
        self, storage: Storage, task_id: str, *, key: str, tokenizer: TokenizerRef | None, shard_bytes: int
    ) -> None:
        self.shards = []
        self.documents = 0
        self.tokens = 0
        self._storage = storage
        self._task_id = task_id
        self._key = key
        self._tokenizer = tokenizer
        self._shard_bytes = shard_bytes
        self._values: list[Any] = []
        self._counts: list[Any] = []
        self._documents: list[pa.Table] = []
        self._bytes = 0

    @override
    def add(self, first: int, rows: pa.Table, *, source: str) -> None:
        values, counts = self._tokens_of(rows, source)
        self._values.append(values)
        self._counts.append(counts)
        self._documents.append(_documents_of_rows(rows, counts, first=first, source=source))
        self.documents += rows.num_rows
        self.tokens += values.size
        self._bytes += values.nbytes
        if self._bytes >= self._shard_bytes:
            self.flush()

    @override
    def flush(self) -> None:
        if not self._documents:
            return
        values = np.concatenate(self._values)
        needed = self._tokenizer.vocab_size if self._tokenizer else int(values.max(initial=0)) + 1
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(self._counts), dtype=np.int64)])
        shard = write_token_shard(
            self._storage,
            uid=shard_uid(self._task_id, len(self.shards)),
            values=narrow_tokens(values, token_dtype(needed)),
            offsets=offsets,
            documents=pa.concat_tables(self._documents),
        )
        self.shards.append(shard)
        self._values, self._counts, self._documents, self._bytes = [], [], [], 0

    def _tokens_of(self, rows: pa.Table, source: str) -> tuple[Any, Any]:
        """Return the ids end to end, as uint32, and how many each row has."""
        if not is_token_column(rows.schema, self._key):
            raise ConfigError(
                "the rows have no such column of token ids",
                file=source,
                tokens_key=self._key,
                columns=rows.column_names,
                hint="Set tokens_key to a column of lists of whole numbers.",
            )
        column: Any = rows.column(self._key).combine_chunks()
        values = column.flatten()
        if column.null_count or values.null_count:
            raise ConfigError("tokens are missing", file=source, column=self._key, hint="Fill or drop these rows.")
        ids = values.to_numpy(zero_copy_only=False)
        limit = self._tokenizer.vocab_size if self._tokenizer else 2**32
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= limit):
            raise ConfigError(
                "a token id is past the vocabulary",
                file=source,
                smallest=int(ids.min()),
                largest=int(ids.max()),
                vocab_size=limit,
                hint="Name the tokenizer that made these tokens.",
            )
        return ids.astype(np.uint32), np.asarray(column.value_lengths(), np.int64)


def is_token_column(schema: pa.Schema, name: str) -> bool:
    """Return whether the column `name` is there and holds lists of whole numbers."""
    kind: Any = schema.field(name).type if name in schema.names else None
    is_list = kind is not None and (kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))
    return bool(is_list and kinds.is_integer(kind.value_type))


def _documents_of_rows(rows: pa.Table, counts: Any, *, first: int, source: str) -> pa.Table:
    """Return the documents of `rows`: what they say of themselves, as our exports do, or their place in the file.

    The digest of a text that nobody knows is zero.
    """
    numbers = np.arange(first, first + rows.num_rows)
    default: dict[str, Any] = {
        "id": [f"{source}#{number}" for number in numbers],
        "source": [source] * rows.num_rows,
        "offset": numbers,
        "length": np.zeros_like(numbers),
        "digest": pa.array([bytes(16)] * rows.num_rows, pa.binary(16)),
    }
    columns: dict[str, Any] = {"tokens": counts}
    for name, values in default.items():
        given = rows.column(name) if name in rows.column_names else None
        columns[name] = values if given is None else _fitting(given, DOCUMENTS_SCHEMA.field(name).type, values)
    return pa.table({name: columns[name] for name in DOCUMENTS_SCHEMA.names}, schema=DOCUMENTS_SCHEMA)


def _fitting(given: Any, kind: pa.DataType, otherwise: Any) -> Any:
    """Return the column `given` if all its values can be of `kind`."""
    try:
        return given.cast(kind) if not given.null_count else otherwise
    except pa.ArrowException:
        return otherwise
