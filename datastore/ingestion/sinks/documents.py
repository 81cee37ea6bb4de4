"""Documents and rows on their way into shards, in order: collected until a shard is full, then stored.

A shard is full with the batch that reaches `shard_bytes`; batches are cut by the records alone, so the borders of
shards are a function of the task and the settings.

Rows and tokens that another tool has written are taken over as they are. That is strict: a row that does not fit ends
it, for what a tool has written it has written on purpose. Tokens are as wide as the tokenizer's vocabulary needs; without
one, each shard is as wide as the largest id in it, which a reader does not notice.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from typing_extensions import override

from datastore.dataset.log.manifest import TokenizerRef
from datastore.dataset.shards.files import shard_uid, write_record_shard, write_token_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.errors import ConfigError
from datastore.formats.arrow import numbers_of, table_of
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.fitting import check_rows
from datastore.formats.joining import cut_to_fit
from datastore.formats.tokens import Tokens, narrow_tokens, offsets_of, token_dtype
from datastore.ingestion.encoding.encoder import Counts, Encoded, TextEncoder
from datastore.ingestion.quality.contamination import Contamination
from datastore.ingestion.reading.documents import Reject, TextRecord, reject
from datastore.ingestion.reading.rows import is_token_column
from datastore.storage.base import Storage

__all__ = [
    "RECORDS_SCHEMA",
    "CopiedRows",
    "CopiedTokens",
    "CopySink",
    "RecordShards",
    "ShardSink",
    "Sink",
    "TokenShards",
    "documents_of_texts",
]

_RECORD_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "source": pa.string(),
    "offset": pa.int64(),
    "text": pa.string(),
}

RECORDS_SCHEMA = pa.schema(pa.field(name, kind, nullable=False) for name, kind in _RECORD_COLUMNS.items())
"""The columns of text that stays text."""


class Sink(ABC):
    """What one task gives, on its way into shards: collected until there are `shard_bytes`, then stored as one."""

    def __init__(self, storage: Storage, task_id: str, *, shard_bytes: int) -> None:
        self.storage = storage
        self.shards: list[ShardInfo] = []
        """What was stored so far."""
        self.documents = 0
        self.tokens = 0
        self.escaped = 0
        """Chats in which a special token was spelled."""
        self.write_s = 0.0
        """CPU seconds that storing took so far."""
        self._task_id = task_id
        self._shard_bytes = shard_bytes
        self._collected_bytes = 0

    def flush(self) -> None:
        """Store what is left."""
        started = time.process_time()
        while self._collected():
            self.shards.append(self._store(shard_uid(self._task_id, len(self.shards))))
        self._collected_bytes = 0
        self.write_s += time.process_time() - started

    def _take(self, *, documents: int, tokens: int, size_bytes: int) -> None:
        """Count what was collected, and store it if that is enough."""
        self.documents += documents
        self.tokens += tokens
        self._collected_bytes += size_bytes
        if self._collected_bytes >= self._shard_bytes:
            self.flush()

    @abstractmethod
    def _collected(self) -> int:
        """Return how many documents or tables wait to be stored."""

    @abstractmethod
    def _store(self, uid: str) -> ShardInfo:
        """Store what was collected as the shard `uid`, and collect anew; what does not fit it may wait for the next."""


class ShardSink(Sink):
    """Takes the texts of one task."""

    def __init__(self, storage: Storage, task_id: str, *, shard_bytes: int) -> None:
        super().__init__(storage, task_id, shard_bytes=shard_bytes)
        self.screened: list[tuple[TextRecord, str]] = []
        """Documents that were left out, for they hold a piece of an evaluation, and the rule that says so."""

    @abstractmethod
    def add(self, records: Sequence[TextRecord]) -> tuple[list[TextRecord], list[Reject]]:
        """Take a batch; return those that became documents, and the others."""


class CopySink(Sink):
    """Takes the rows of one task."""

    @abstractmethod
    def add(self, first: int, rows: pa.Table, *, source: str) -> None:
        """Take rows of the file `source`, of which the first is row `first` of it."""


class TokenShards(ShardSink):
    """Encodes, and stores tokens with a row for each document."""

    def __init__(
        self,
        storage: Storage,
        task_id: str,
        *,
        encoder: TextEncoder,
        shard_bytes: int,
        unwanted: Contamination | None = None,
    ) -> None:
        super().__init__(storage, task_id, shard_bytes=shard_bytes)
        self._encoder = encoder
        self._unwanted = unwanted
        self._values: list[Tokens] = []
        self._counts: list[Counts] = []
        self._records: list[TextRecord] = []

    @override
    def add(self, records: Sequence[TextRecord]) -> tuple[list[TextRecord], list[Reject]]:
        encoded = self._encoder.encode([record.text for record in records])
        taken = [record for i, record in enumerate(records) if i not in encoded.faults]
        faulty = [(records[i], reason) for i, reason in sorted(encoded.faults.items())]
        taken, values, counts = self._screen(taken, encoded)
        self._values.append(values)
        self._counts.append(counts)
        self._records += taken
        self._take(documents=len(taken), tokens=values.size, size_bytes=values.nbytes)
        return taken, [reject(record.source, record.offset, reason, record.text) for record, reason in faulty]

    def _screen(self, records: list[TextRecord], encoded: Encoded) -> tuple[list[TextRecord], Tokens, Counts]:
        """Return what does not hold a piece of an evaluation: records, tokens, and how many of these each has."""
        rules = self._unwanted.rules(encoded.values, encoded.counts) if self._unwanted else {}
        if not rules:
            return records, encoded.values, encoded.counts
        self.screened += [(records[place], rule) for place, rule in rules.items()]
        kept = np.ones(len(records), dtype=np.bool_)
        kept[list(rules)] = False
        left = [record for place, record in enumerate(records) if place not in rules]
        return left, encoded.values[np.repeat(kept, encoded.counts)], encoded.counts[kept]

    @override
    def _collected(self) -> int:
        return len(self._records)

    @override
    def _store(self, uid: str) -> ShardInfo:
        values = narrow_tokens(np.concatenate(self._values), self._encoder.dtype)
        counts, records = np.concatenate(self._counts), self._records
        self._values, self._counts, self._records = [], [], []
        return write_token_shard(
            self.storage,
            uid=uid,
            values=values,
            offsets=offsets_of(counts),
            documents=documents_of_texts(records, counts),
        )


class RecordShards(ShardSink):
    """Stores texts as they are."""

    def __init__(self, storage: Storage, task_id: str, *, shard_bytes: int) -> None:
        super().__init__(storage, task_id, shard_bytes=shard_bytes)
        self._records: list[TextRecord] = []

    @override
    def add(self, records: Sequence[TextRecord]) -> tuple[list[TextRecord], list[Reject]]:
        self._records += records
        self._take(documents=len(records), tokens=0, size_bytes=sum(record.length for record in records))
        return list(records), []

    @override
    def _collected(self) -> int:
        return len(self._records)

    @override
    def _store(self, uid: str) -> ShardInfo:
        names, sources, offsets, _, texts, _ = zip(*self._records, strict=True)
        self._records = []
        table = table_of([names, sources, offsets, texts], RECORDS_SCHEMA)
        return write_record_shard(self.storage, uid=uid, table=table)


class CopiedRows(CopySink):
    """Stores all columns, as records of `schema`."""

    def __init__(self, storage: Storage, task_id: str, *, schema: pa.Schema, shard_bytes: int) -> None:
        super().__init__(storage, task_id, shard_bytes=shard_bytes)
        self._schema = schema
        self._parts: list[pa.Table] = []

    @override
    def add(self, first: int, rows: pa.Table, *, source: str) -> None:
        try:
            self._parts.append(check_rows(rows, self._schema))
        except ConfigError as error:
            raise ConfigError(
                error.fact, file=source, row=first, hint="Import files of one schema at a time."
            ) from None
        self._take(documents=rows.num_rows, tokens=0, size_bytes=rows.nbytes)

    @override
    def _collected(self) -> int:
        return len(self._parts)

    @override
    def _store(self, uid: str) -> ShardInfo:
        table, *self._parts = cut_to_fit(pa.concat_tables(self._parts))
        return write_record_shard(self.storage, uid=uid, table=table)


class CopiedTokens(CopySink):
    """Stores the column `key` as tokens, and what the others say of each document: its id, and where it comes from."""

    def __init__(
        self, storage: Storage, task_id: str, *, key: str, tokenizer: TokenizerRef | None, shard_bytes: int
    ) -> None:
        super().__init__(storage, task_id, shard_bytes=shard_bytes)
        self._key = key
        self._tokenizer = tokenizer
        self._values: list[Any] = []
        self._counts: list[Any] = []
        self._tables: list[pa.Table] = []

    @override
    def add(self, first: int, rows: pa.Table, *, source: str) -> None:
        values, counts = self._tokens_of(rows, source)
        self._values.append(values)
        self._counts.append(counts)
        self._tables.append(_documents_of_rows(rows, counts, first=first, source=source))
        self._take(documents=rows.num_rows, tokens=values.size, size_bytes=values.nbytes)

    @override
    def _collected(self) -> int:
        return len(self._tables)

    @override
    def _store(self, uid: str) -> ShardInfo:
        values, counts, tables = np.concatenate(self._values), np.concatenate(self._counts), self._tables
        self._values, self._counts, self._tables = [], [], []
        needed = self._tokenizer.vocab_size if self._tokenizer else int(values.max(initial=0)) + 1
        return write_token_shard(
            self.storage,
            uid=uid,
            values=narrow_tokens(values, token_dtype(needed)),
            offsets=offsets_of(counts),
            documents=pa.concat_tables(tables),
        )

    def _tokens_of(self, rows: pa.Table, source: str) -> tuple[Any, Any]:
        """Return the ids end to end, as uint32, and how many each row has."""
        if not is_token_column(rows.schema, self._key):
            raise ConfigError(
                "the rows have no such column of token ids",
                file=source,
                tokens_key=self._key,
                columns=rows.column_names,
                hint="Name a column of lists of whole numbers: `tokens_key=COLUMN`.",
            )
        column: Any = rows.column(self._key).combine_chunks()
        values = column.flatten()
        if column.null_count or values.null_count:
            raise ConfigError("tokens are missing", file=source, column=self._key, hint="Fill or drop these rows.")
        ids = numbers_of(values)
        limit = self._tokenizer.vocab_size if self._tokenizer else 2**32
        if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= limit):
            raise ConfigError(
                "a token id is past the vocabulary",
                file=source,
                smallest=int(ids.min()),
                largest=int(ids.max()),
                vocab_size=limit,
                hint="Name the tokenizer that made these tokens: `tokenizer=FILE`.",
            )
        return ids.astype(np.uint32), numbers_of(column.value_lengths()).astype(np.int64)


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
        "digest": [bytes(16)] * rows.num_rows,
    }
    columns: dict[str, Any] = {"tokens": counts}
    for name, values in default.items():
        given = rows.column(name) if name in rows.column_names else None
        columns[name] = values if given is None else _fitting(given, DOCUMENTS_SCHEMA.field(name).type, values)
    return table_of((columns[name] for name in DOCUMENTS_SCHEMA.names), DOCUMENTS_SCHEMA)


def _fitting(given: Any, kind: pa.DataType, otherwise: Any) -> Any:
    """Return the column `given` if all its values can be of `kind`."""
    try:
        return given.cast(kind) if not given.null_count else otherwise
    except pa.ArrowException:
        return otherwise


def documents_of_texts(records: Sequence[TextRecord], counts: Counts) -> pa.Table:
    """Return what describes `records` that have become so many tokens each."""
    names, sources, offsets, lengths, texts, _ = zip(*records, strict=True)
    digests = [xxhash.xxh3_128_digest(text.encode()) for text in texts]
    return table_of([names, sources, offsets, lengths, counts, digests], DOCUMENTS_SCHEMA)
