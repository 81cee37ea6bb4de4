"""What a shard must be beyond its digests: something that decodes, and says what the manifest and its documents say.

Digests prove that the bytes are those that were written. This proves that what was written makes sense, so it finds
faults of a writer, ours or another's, that no digest can. The price is reading each shard a second time, whole.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pyarrow as pa

from datastore.errors import DatastoreError
from datastore.formats.tokens import Offsets, Tokens
from datastore.store.blocks import BadBlock
from datastore.store.dataset import Dataset
from datastore.store.deletions import Deletions, deletions_key, merge_spans
from datastore.store.segment import ShardInfo
from datastore.store.shards import read_documents, read_record_shard, read_token_shard

__all__ = ["DeepCheck"]

T = TypeVar("T")


class DeepCheck:
    """Decodes the shards of a version whose bytes are sound. Safe for several threads.

    - A token shard has the dtype, documents and tokens that the manifest names, and no id beyond the vocabulary.
    - Its documents file has one row for each of its rows, which counts its tokens, and the named first and last source.
    - A record shard has the rows that the manifest names, in the batches that it names, and the dataset's columns.
    - Rows that are deleted are there, and have the tokens that the deletions name.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._deletions = Deletions([])
        with suppress(DatastoreError):  # Told by who checks the files; what they would say is passed over then.
            self._deletions = dataset.deletions
        self._lock = threading.Lock()
        self._unseen = set(self._deletions.uids)

    def shard(self, shard: ShardInfo) -> list[BadBlock]:
        """Return what is wrong with a shard and its documents."""
        with self._lock:
            self._unseen.discard(shard.uid)
        storage = self._dataset.storage
        bad: list[BadBlock] = []
        if shard.kind == "records":
            table = _tried(partial(read_record_shard, storage, shard), shard.path, bad)
            if table is not None:
                _note(shard.path, self._record_faults(shard, table), bad)
            return bad
        found = _tried(partial(read_token_shard, storage, shard), shard.path, bad)
        documents = _tried(partial(read_documents, storage, shard), shard.docs_path, bad)
        if found is not None:
            _note(shard.path, self._token_faults(shard, *found), bad)
        if found is not None and documents is not None:
            _note(shard.docs_path, _document_faults(shard, documents, found[1]), bad)
        return bad

    def rest(self) -> list[BadBlock]:
        """Return what is wrong with the deletions, once all shards have been looked at and found sound."""
        refs = self._dataset.commit.deletions
        bad: list[BadBlock] = []
        if refs:
            _note(deletions_key(refs[-1].digest), self._deletion_faults(sum(ref.documents for ref in refs)), bad)
        return bad

    def _deletion_faults(self, documents: int) -> Iterator[str]:
        if self._unseen:
            yield f"it deletes rows of a shard that is not in this version ({min(self._unseen)})"
        if documents != self._deletions.documents:
            yield "it deletes what is deleted already"

    def _token_faults(self, shard: ShardInfo, values: Tokens, offsets: Offsets) -> Iterator[str]:
        if (values.dtype.name, offsets.size - 1, values.size) != (shard.dtype, shard.documents, shard.tokens):
            yield "its dtype, documents or tokens are not those that the manifest names"
            return
        tokenizer = self._dataset.commit.tokenizer
        if tokenizer is not None and values.size and int(values.max()) >= tokenizer.vocab_size:
            yield f"it holds the id {values.max()}, the tokenizer has {tokenizer.vocab_size}"
        rows = self._deletions.rows(shard.uid)
        if not rows.size:
            return
        if rows[-1] >= shard.documents:
            yield f"row {rows[-1]} of it is deleted, it has {shard.documents}"
            return
        spans = merge_spans(np.stack([offsets[rows], offsets[rows + 1]], axis=1))
        if not np.array_equal(spans, self._deletions.spans(shard.uid)):
            yield "its deleted rows are not where the deletions say"

    def _record_faults(self, shard: ShardInfo, table: pa.Table) -> Iterator[str]:
        if table.num_rows != shard.documents:
            yield f"it has {table.num_rows} rows, not {shard.documents}"
        if not set(table.column_names) <= set(self._dataset.schema.names):
            yield "it has columns that the dataset has not"
        rows = self._deletions.rows(shard.uid)
        if rows.size and rows[-1] >= table.num_rows:
            yield f"row {rows[-1]} of it is deleted, it has {table.num_rows}"
        batches = shard.layout.batches
        edges = [0, *(edge for batch in batches for edge in (batch.start, batch.stop)), shard.size_bytes]
        if batches and (
            any(before > after for before, after in pairwise(edges))
            or sum(batch.rows for batch in batches) != table.num_rows
        ):
            yield "its batches do not cut it up"


def _document_faults(shard: ShardInfo, documents: pa.Table, offsets: Offsets) -> Iterator[str]:
    if not np.array_equal(documents.column("tokens").to_numpy(), np.diff(offsets)):
        yield "its rows do not count the tokens of the shard's rows"
        return
    sources = documents.column("source")
    ends = (str(sources[0]), str(sources[-1])) if documents.num_rows else ("", "")
    if ends != (shard.source_first, shard.source_last):
        yield "its first and last source are not those that the manifest names"


def _tried(read: Callable[[], T], path: str, bad: list[BadBlock]) -> T | None:
    """Return what `read` returns; if it cannot, note why."""
    try:
        return read()
    except DatastoreError as error:
        bad.append(BadBlock(path, None, error.fact))
        return None


def _note(path: str, faults: Iterator[str], bad: list[BadBlock]) -> None:
    bad.extend(BadBlock(path, None, fault) for fault in faults)
