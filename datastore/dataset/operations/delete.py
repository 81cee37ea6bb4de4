"""Delete documents: one small table of row numbers and one commit; no shard is touched, old versions keep what they had.

It costs reading the documents files, every byte of them checked, with only the columns that the selection needs decoded
(a record dataset has none: its shards are read themselves), and then a file of a few bytes per document. The bytes stay
on disk until `purge` or `compact`; opening an older version brings the documents back.

What is meant is decided in the version that was read: an append that comes between is kept, and not looked through.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.log.keys import DELETIONS
from datastore.dataset.log.manifest import Commit, sum_refs
from datastore.dataset.operations.selection import Matcher, Selection
from datastore.dataset.operations.transaction import (
    DatasetLike,
    draft_commit,
    explain_expiry,
    open_for_change,
    publish,
    require_unchanged,
)
from datastore.dataset.shards.deletions import add_deletions
from datastore.dataset.shards.files import read_documents
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.snapshot import Dataset
from datastore.errors import MissingError
from datastore.formats.arrow import array_of, numbers_of
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.threads import in_parallel
from datastore.units import Progress

__all__ = [
    "DeleteReport",
    "FoundDocuments",
    "ShardDeletion",
    "commit_deletion",
    "delete",
    "delete_selected",
    "find_documents",
]

_CHUNK_DOCUMENTS = 16_384
"""Small shards are looked through together until they have as many documents, or as many as there are ids: looking up
ids costs as much as there are of them, each time."""

_CHUNK_BYTES = 64 * 2**20

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ShardDeletion:
    """What is deleted of one shard."""

    path: str
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True)
class DeleteReport:
    """What a delete did, or would do."""

    url: str
    version: int
    """The version that has it done; with nothing to delete, or only asked what there is, the one that was read."""

    committed: bool
    documents: int
    tokens: int
    shards: tuple[ShardDeletion, ...]
    already: int
    """Documents that are meant, but deleted already."""

    missing: tuple[str, ...]
    """Ids that no document has."""

    read_bytes: int
    seconds: float


@dataclass(slots=True)
class FoundDocuments:
    """The rows that a selection means, by the uid of their shard."""

    rows: dict[str, npt.NDArray[np.int32]] = field(default_factory=dict)
    lengths: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    """Tokens of every row of those shards; empty for records."""

    shards: list[ShardDeletion] = field(default_factory=list)
    already: int = 0
    missing: tuple[str, ...] = ()
    read_bytes: int = 0

    @property
    def documents(self) -> int:
        """How many documents are to be deleted."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """How many tokens they have."""
        return sum(shard.tokens for shard in self.shards)


def delete(
    target: DatasetLike,
    *,
    ids: Iterable[str] | None = None,
    sources: Iterable[str] = (),
    where: "str | pc.Expression | None" = None,
    allow_missing: bool = False,
    dry_run: bool = False,
) -> DeleteReport:
    """Delete the documents of `target` that have one of `ids`, a source like one of `sources`, and `where` true.

    What is not given does not matter. `where` is SQL (through DuckDB) or a pyarrow expression over the columns of the
    documents table, or of the records themselves. Documents that are deleted already are counted, not deleted again.
    With `dry_run` nothing is deleted, and the report says what would be.

    Raises:
        ConfigError: nothing is given, or it does not fit the columns.
        MissingError: no document has one of the ids, and `allow_missing` is not set; nothing was deleted.
        ConflictError: another operation changed the same shards meanwhile; nothing was deleted.
        DependencyError: `where` is SQL, and DuckDB is not installed.
    """
    selection = Selection.of(ids=ids, sources=sources, where=where)
    return delete_selected(target, selection, allow_missing=allow_missing, dry_run=dry_run)


def delete_selected(
    target: DatasetLike,
    selection: Selection,
    *,
    allow_missing: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> DeleteReport:
    """Delete what `selection` means, as `delete`; `progress` gets the bytes that were read, and that are to be read.

    Raises:
        ConfigError, MissingError, ConflictError, DependencyError: as `delete`.
    """
    started = time.monotonic()
    dataset = open_for_change(target)
    with explain_expiry(dataset, operation="delete"):
        found = find_documents(dataset, selection, progress=progress)
    if found.missing and not allow_missing:
        raise MissingError(
            f"{len(found.missing):,} of the ids are those of no document, so nothing was deleted",
            url=dataset.url,
            version=dataset.version,
            missing=list(found.missing[:_SHOWN]),
            hint="Correct them, or allow it: `allow_missing`.",
        )
    commit = commit_deletion(dataset, found) if found.rows and not dry_run else dataset.commit
    return DeleteReport(
        url=dataset.url,
        version=commit.version,
        committed=commit is not dataset.commit,
        documents=found.documents,
        tokens=found.tokens,
        shards=tuple(found.shards),
        already=found.already,
        missing=found.missing,
        read_bytes=found.read_bytes,
        seconds=time.monotonic() - started,
    )


def find_documents(dataset: Dataset, selection: Selection, *, progress: Progress | None = None) -> FoundDocuments:
    """Return the rows of `dataset` that `selection` means and that are not deleted yet; several shards at a time.

    Raises:
        ConfigError, DependencyError: as `delete`.
        MissingError, CorruptError: a file of the dataset is gone or damaged.
    """
    schema = dataset.schema if dataset.kind == "records" else DOCUMENTS_SCHEMA
    matcher = Matcher(selection, schema)
    present = np.zeros(0 if selection.ids is None else len(selection.ids), np.bool_)
    found = FoundDocuments()
    total = sum(shard.docs_bytes if dataset.kind == "tokens" else shard.size_bytes for shard in dataset.segments)
    chunks = _chunks(dataset, least=max(_CHUNK_DOCUMENTS, present.size))
    for part, seen in in_parallel(lambda chunk: _look_through(dataset, matcher, chunk), chunks):
        present[seen] = True
        found.rows |= part.rows
        found.lengths |= part.lengths
        found.shards += part.shards
        found.already += part.already
        found.read_bytes += part.read_bytes
        if progress is not None:
            progress(found.read_bytes, total)
    if selection.ids is not None:
        found.missing = tuple(cast("list[str]", selection.ids.filter(array_of(~present)).to_pylist()))
    return found


def commit_deletion(dataset: Dataset, found: FoundDocuments) -> Commit:
    """Commit that the rows `found` in `dataset` are deleted; return the version that has it.

    Raises:
        ConflictError: one of their shards was changed since.
    """

    def build(newest: Commit | None) -> Commit:
        current = require_unchanged(dataset, newest, uids=found.rows, operation="delete").commit
        refs = add_deletions(dataset.storage, current.deletions, found.rows, lengths=found.lengths)
        return msgspec.structs.replace(
            draft_commit("delete", parent=current),
            deletions=refs,
            totals=sum_refs(current.segments, refs),
            features=tuple(sorted({*current.features, DELETIONS})),
        )

    return publish(dataset.storage, dataset.info, build)


Chunk = Sequence[tuple[int, ShardInfo]]


def _chunks(dataset: Dataset, *, least: int) -> Iterator[Chunk]:
    """Yield runs of shards, with their numbers, that have `least` documents together or are large."""
    chunk: list[tuple[int, ShardInfo]] = []
    documents = size_bytes = 0
    for index, shard in enumerate(dataset.segments):
        chunk.append((index, shard))
        documents += shard.documents
        size_bytes += shard.docs_bytes or shard.size_bytes
        if documents >= least or size_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, documents, size_bytes = [], 0, 0
    if chunk:
        yield chunk


def _look_through(dataset: Dataset, matcher: Matcher, chunk: Chunk) -> tuple[FoundDocuments, npt.NDArray[np.int64]]:
    """Return what is meant in some shards, and which of the ids are there."""
    tokens = dataset.kind == "tokens"
    tables = [
        read_documents(dataset.storage, shard, columns=sorted({*matcher.columns, "tokens"}))
        if tokens
        else dataset.record_shard(index).select(matcher.columns)
        for index, shard in chunk
    ]
    chosen, present = matcher.match(pa.concat_tables(tables))
    found = FoundDocuments(read_bytes=sum(shard.docs_bytes if tokens else shard.size_bytes for _, shard in chunk))
    start = 0
    for (_, shard), table in zip(chunk, tables, strict=True):
        rows = np.flatnonzero(chosen[start : start + table.num_rows]).astype(np.int32)
        start += table.num_rows
        fresh = np.setdiff1d(rows, dataset.deletions.rows(shard.uid), assume_unique=True)
        found.already += rows.size - fresh.size
        if fresh.size:
            lengths = numbers_of(table.column("tokens")) if tokens else np.empty(0, np.int64)
            found.rows[shard.uid] = fresh
            if tokens:
                found.lengths[shard.uid] = lengths
            count = int(lengths[fresh].sum()) if tokens else 0
            found.shards.append(ShardDeletion(path=shard.path, documents=fresh.size, tokens=count))
    return found, present
