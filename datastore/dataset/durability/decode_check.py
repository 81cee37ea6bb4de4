"""A look into shards beyond their digests: each must decode, and say what the manifest and its documents say.

Digests prove that the bytes are those that were written. This proves that what was written makes sense, so it finds
faults of a writer, ours or another's, that no digest can. The price is reading each shard a second time, whole.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.durability.blocks import BadBlock
from datastore.dataset.durability.parity import xor_files
from datastore.dataset.log.keys import deletions_key
from datastore.dataset.shards.deletions import Deletions, merge_spans
from datastore.dataset.shards.files import read_documents, read_record_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.parity_groups import Group
from datastore.dataset.snapshot import Dataset
from datastore.digest import digest_bytes
from datastore.errors import DatastoreError
from datastore.formats.arrow import numbers_of, scalar_of
from datastore.formats.evolution import adapt
from datastore.formats.tokens import Offsets, TokenTable, decode_token_table
from datastore.formats.tokentext import TokenText
from datastore.storage.verified import read_checked

__all__ = ["DeepCheck"]

T = TypeVar("T")

_TEXTS = 64
"""Documents of a shard whose text is looked at, spread evenly: decoding all would take forty times as long as the rest."""


class DeepCheck:
    """Decodes the shards of a version whose bytes are sound. Safe for several threads.

    - A token shard has the dtype, documents, tokens and columns that the manifest names, at the positions that it
      names, and no id beyond the vocabulary.
    - Its documents file has one row for each of its rows, which counts its tokens, and the named first and last source.
    - Where the tokenizer is byte-level, so that tokens are their text to the byte, some texts have the digests that the
      documents file says.
    - A record shard has the rows that the manifest names, in the batches that it names, and can be read as the version's
      schema.
    - Rows that are deleted are there, and have the tokens that the deletions name.
    - A parity file is the XOR of its members.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._deletions = Deletions([])
        with suppress(DatastoreError):  # Told by who checks the files; what they would say is passed over then.
            self._deletions = dataset.deletions
        self._text = _text_of(dataset)
        self._lock = threading.Lock()
        self._unseen = set(self._deletions.uids)

    def seen(self, shard: ShardInfo) -> None:
        """Note that the shard is there: `rest` says which deletions are of none."""
        with self._lock:
            self._unseen.discard(shard.uid)

    def shard(self, shard: ShardInfo) -> list[BadBlock]:
        """Return what is wrong with a shard and its documents."""
        self.seen(shard)
        storage = self._dataset.storage
        bad: list[BadBlock] = []
        if shard.kind == "records":
            table = _tried(partial(read_record_shard, storage, shard), shard.path, bad)
            if table is not None:
                _note(shard.path, self._record_faults(shard, table), bad)
            return bad
        found = _tried(partial(self._token_table, shard), shard.path, bad)
        documents = _tried(partial(read_documents, storage, shard), shard.docs_path, bad)
        if found is None:
            return bad
        raw, tokens = found
        _note(shard.path, self._token_faults(shard, raw, tokens), bad)
        if documents is not None:
            _note(shard.docs_path, _document_faults(shard, documents, tokens.offsets), bad)
        if documents is not None and not bad:
            _note(shard.path, self._text_faults(tokens, documents), bad)
        return bad

    def group(self, group: Group) -> list[BadBlock]:
        """Return what is wrong with a parity file whose bytes, and those of its members, are sound."""
        with suppress(DatastoreError):  # A member is damaged, and told where it is checked.
            made = xor_files(self._dataset.storage, group.members, size_bytes=group.size_bytes)
            if digest_bytes(made.data) != group.digest:
                return [BadBlock(group.path, None, "it is not the XOR of its members")]
        return []

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

    def _token_table(self, shard: ShardInfo) -> tuple[pa.Buffer, TokenTable]:
        raw = read_checked(self._dataset.storage, shard.path, size_bytes=shard.size_bytes, digest=shard.digest)
        return raw, decode_token_table(raw)

    def _token_faults(self, shard: ShardInfo, raw: pa.Buffer, table: TokenTable) -> Iterator[str]:
        values, offsets = table.values, table.offsets
        if (values.dtype.name, offsets.size - 1, values.size) != (shard.dtype, shard.documents, shard.tokens):
            yield "its dtype, documents or tokens are not those that the manifest names"
            return
        columns = {column.name: column for column in shard.layout.columns}
        placed = [(values, shard.values_start), (offsets.astype(shard.offsets_dtype), shard.offsets_start)]
        placed += [(table.columns[name], columns[name].values_start) for name in columns.keys() & table.columns.keys()]
        if columns.keys() != table.columns.keys() or not all(_lies_at(raw, start, found) for found, start in placed):
            yield "its tokens, offsets or columns are not where the manifest says"
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

    def _text_faults(self, table: TokenTable, documents: pa.Table) -> Iterator[str]:
        if self._text is None:
            return
        for row in np.linspace(0, documents.num_rows - 1, min(_TEXTS, documents.num_rows), dtype=np.int64).tolist():
            tokens = table.values[table.offsets[row] : table.offsets[row + 1]]
            digest = documents.column("digest")[row].as_py()
            # No text was ever known of tokens that came as such; the end of text has none, so none may be within.
            if digest in {bytes(16), digest_bytes(tokens.data)} or not self._text.ends_only(tokens):
                continue
            try:
                if digest_bytes(self._text.decode(tokens).encode()) == digest:
                    continue
            except IndexError:
                pass
            yield f"the tokens of row {row} are not the text that its documents file names"

    def _record_faults(self, shard: ShardInfo, table: pa.Table) -> Iterator[str]:
        if table.num_rows != shard.documents:
            yield f"it has {table.num_rows} rows, not {shard.documents}"
        try:
            adapt(table, self._dataset.schema)
        except DatastoreError as error:
            yield error.fact
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


def _lies_at(raw: pa.Buffer, start: int, values: npt.NDArray[Any]) -> bool:
    """Whether the bytes of `values` lie at `start` of `raw`."""
    if start + values.nbytes > raw.size:
        return False
    return np.array_equal(
        np.frombuffer(memoryview(raw), np.uint8, values.nbytes, start), values.reshape(-1).view(np.uint8)
    )


def _text_of(dataset: Dataset) -> TokenText | None:
    """Return what decodes to the byte, if the tokenizer does."""
    with suppress(DatastoreError, ValueError):  # Damage is told where the file is checked.
        text = dataset.token_text
        return text if text is not None and text.exact else None
    return None


def _document_faults(shard: ShardInfo, documents: pa.Table, offsets: Offsets) -> Iterator[str]:
    if not np.array_equal(numbers_of(documents.column("tokens")), np.diff(offsets)):
        yield "its rows do not count the tokens of the shard's rows"
        return
    sources = documents.column("source")
    # A purged document has no source any more, and counts for none.
    named = sources.filter(pc.not_equal(sources, scalar_of("", pa.string())))
    if (shard.source_first, shard.source_last) not in {_ends(sources), _ends(named)}:
        yield "its first and last source are not those that the manifest names"


def _ends(texts: "pa.ChunkedArray[Any]") -> tuple[str, str]:
    return (str(texts[0]), str(texts[-1])) if len(texts) else ("", "")


def _tried(read: Callable[[], T], path: str, bad: list[BadBlock]) -> T | None:
    """Return what `read` returns; if it cannot, note why."""
    try:
        return read()
    except DatastoreError as error:
        bad.append(BadBlock(path, None, error.fact))
        return None


def _note(path: str, faults: Iterator[str], bad: list[BadBlock]) -> None:
    bad.extend(BadBlock(path, None, fault) for fault in faults)
