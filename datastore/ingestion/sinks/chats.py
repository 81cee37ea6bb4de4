"""Chats on their way into shards: as documents of tokens with a loss mask, and pairs as records of two lists of tokens.

A pair is a record, not two documents: whoever compares the two answers needs both in one batch, and a row of a record dataset
stays whole on any number of ranks.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from typing_extensions import override

from datastore.dataset.shards.files import write_record_shard, write_token_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.formats.arrow import table_of
from datastore.formats.tokens import narrow_tokens, offsets_of, token_dtype
from datastore.ingestion.encoding.chats import ChatEncoder, ChatTokens, UnusableChatError, end_to_end
from datastore.ingestion.reading.documents import Reject, TextRecord, reject
from datastore.ingestion.sinks.documents import ShardSink, documents_of_texts
from datastore.storage.base import Storage

__all__ = ["PAIRS_SCHEMA", "ChatShards", "PairShards"]

_IDS = pa.list_(pa.field("item", pa.int32(), nullable=False))
_MASK = pa.list_(pa.field("item", pa.bool_(), nullable=False))
_PAIR_COLUMNS: dict[str, pa.DataType] = {
    "id": pa.string(),
    "source": pa.string(),
    "offset": pa.int64(),
    "chosen": _IDS,
    "chosen_mask": _MASK,
    "rejected": _IDS,
    "rejected_mask": _MASK,
}

PAIRS_SCHEMA = pa.schema(pa.field(name, kind, nullable=False) for name, kind in _PAIR_COLUMNS.items())
"""The columns of preference pairs."""


class _ChatSink(ShardSink):
    """Encodes the chats of one task."""

    def __init__(self, storage: Storage, task_id: str, *, encoder: ChatEncoder, shard_bytes: int) -> None:
        super().__init__(storage, task_id, shard_bytes=shard_bytes)
        self._encoder = encoder
        self._records: list[TextRecord] = []
        self._chats: list[tuple[ChatTokens, ...]] = []

    @override
    def add(self, records: Sequence[TextRecord]) -> tuple[list[TextRecord], list[Reject]]:
        taken: list[TextRecord] = []
        refused: list[Reject] = []
        tokens = 0
        for record in records:
            try:
                chats = self._encode(record.text)
            except UnusableChatError as error:
                shown = f"{error.detail}: {record.text}"
                refused.append(reject(record.source, record.offset, error.reason, shown))
                continue
            taken.append(record)
            self._chats.append(chats)
            tokens += sum(chat.ids.size for chat in chats)
            self.escaped += any(chat.escaped for chat in chats)
        self._records += taken
        self._take(documents=len(taken), tokens=tokens, size_bytes=4 * tokens)
        return taken, refused

    def _encode(self, text: str) -> tuple[ChatTokens, ...]:
        return (self._encoder.encode(text),)

    @override
    def _collected(self) -> int:
        return len(self._records)

    def _hand_over(self) -> tuple[list[TextRecord], list[tuple[ChatTokens, ...]]]:
        found = self._records, self._chats
        self._records, self._chats = [], []
        return found


class ChatShards(_ChatSink):
    """Stores the tokens of chats, with the column `loss_mask`."""

    @override
    def _store(self, uid: str) -> ShardInfo:
        records, chats = self._hand_over()
        values, mask, counts = end_to_end([chat for (chat,) in chats])
        return write_token_shard(
            self.storage,
            uid=uid,
            values=narrow_tokens(values, token_dtype(self._encoder.vocab_size)),
            offsets=offsets_of(counts),
            documents=documents_of_texts(records, counts),
            columns={"loss_mask": mask.astype(np.uint8)},
        )


class PairShards(_ChatSink):
    """Stores pairs as records."""

    @override
    def _encode(self, text: str) -> tuple[ChatTokens, ...]:
        return self._encoder.encode_pair(text)

    @override
    def _store(self, uid: str) -> ShardInfo:
        records, pairs = self._hand_over()
        names, sources, offsets, *_ = zip(*records, strict=True)
        lists = [column for side in zip(*pairs, strict=True) for column in _lists(side)]
        return write_record_shard(
            self.storage, uid=uid, table=table_of([names, sources, offsets, *lists], PAIRS_SCHEMA)
        )


def _lists(chats: Sequence[ChatTokens]) -> list[Any]:
    """Return the ids and the masks of `chats` as columns of lists."""
    values, mask, counts = end_to_end(chats)
    index: Any = pa.array(offsets_of(counts).astype(np.int32))
    parts: tuple[tuple[Any, Any], ...] = ((values.astype(np.int32), _IDS), (mask, _MASK))
    return [pa.ListArray.from_arrays(index, pa.array(part), type=kind) for part, kind in parts]
