"""Documents on their way into shards, in order: collected until a shard is full, then stored.

A shard is full with the batch that reaches `shard_bytes`; batches are cut by the records alone, so the borders of
shards are a function of the task and the settings.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa
import xxhash
from typing_extensions import override

from datastore.dataset.shards.files import shard_uid, write_record_shard, write_token_shard
from datastore.dataset.shards.segment_file import ShardInfo
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.tokens import Tokens, narrow_tokens
from datastore.ingest.records import Record, Reject, reject
from datastore.ingestion.encoding.encoder import Counts, TextEncoder
from datastore.storage.base import Storage

__all__ = ["RECORDS_SCHEMA", "RecordShards", "ShardSink", "TokenShards"]

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

    def add(self, records: Sequence[Record]) -> tuple[list[Record], list[Reject]]:
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
        self._records: list[Record] = []
        self._size_bytes = 0

    @override
    def add(self, records: Sequence[Record]) -> tuple[list[Record], list[Reject]]:
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
            documents=_documents(self._records, counts),
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
        self._records: list[Record] = []
        self._size_bytes = 0

    @override
    def add(self, records: Sequence[Record]) -> tuple[list[Record], list[Reject]]:
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


def _documents(records: Sequence[Record], counts: Counts) -> pa.Table:
    names, sources, offsets, lengths, texts, _ = zip(*records, strict=True)
    digests = [xxhash.xxh3_128_digest(text.encode()) for text in texts]
    return pa.table(
        [names, sources, offsets, lengths, counts, pa.array(digests, pa.binary(16))], schema=DOCUMENTS_SCHEMA
    )
