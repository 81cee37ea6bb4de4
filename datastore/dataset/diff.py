"""The difference between two versions: segments that differ, in them shards, in those deleted rows, in those documents.

Each step looks only at what the one before found different, so the counts come from manifests alone and cost as much as
there was changed, not as much as there is. Shards are told apart by their uid: the two may be versions of one dataset,
or of a dataset and its clone. The price: where shards were written anew (`compact`), the same document stands on both
sides of the counts; only `documents`, which reads the tables of the changed shards, can tell.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.shards.deletions import Deletions
from datastore.dataset.shards.segment_file import SEGMENT_SCHEMA
from datastore.dataset.shards.segments import load_segment
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import digest_bytes
from datastore.formats.arrow import array_of, numbers_of
from datastore.formats.schema import no_rows
from datastore.storage.base import Storage
from datastore.threads import in_parallel

__all__ = ["Changes", "Diff", "DocumentChange", "diff"]

_COLUMNS = ["uid", "digest", "documents", "tokens"]
_NOTHING = np.empty(0, np.int32)

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Changes:
    """How much is on one side only."""

    shards: int
    documents: int
    """That are not deleted."""

    tokens: int


@dataclass(frozen=True, slots=True)
class DocumentChange:
    """A document that one of the two versions has."""

    sign: Literal["+", "-"]
    row: dict[str, Any]
    """Its row of the documents table; the record itself where there is no such table."""


@dataclass(frozen=True, slots=True)
class Diff:
    """What differs between `before` and `after`."""

    before: Dataset
    after: Dataset
    added: Changes
    removed: Changes
    rewritten: int
    """Shards of both that have other bytes: purged ones."""

    _added_shards: frozenset[str]
    _removed_shards: frozenset[str]
    _added_rows: dict[str, Rows]
    _removed_rows: dict[str, Rows]
    """Rows of shards of both that only one deletes."""

    @property
    def exact(self) -> bool:
        """Whether no document can be among those added and those removed."""
        return not (self.added.documents and self.removed.documents)

    def documents(self) -> Iterator[DocumentChange]:
        """Yield what was added, then what was removed, each in the order of its version.

        A document that stands in other shards with the same content is neither. Reads the documents of the changed
        shards, or the records themselves; where something was added and removed, those removed twice, and 150 bytes of
        memory for each of them.

        Raises:
            MissingError, CorruptError: a file is gone or damaged.
        """
        gone: Counter[bytes] = Counter()
        if not self.exact:
            gone.update(_identity(row) for row in _rows(self.before, self._removed_shards, self._removed_rows))
        for row in _rows(self.after, self._added_shards, self._added_rows):
            if gone and gone[_identity(row)] > 0:
                gone[_identity(row)] -= 1
            else:
                yield DocumentChange("+", _shown(row))
        left = +gone
        for row in _rows(self.before, self._removed_shards, self._removed_rows):
            if self.exact:
                yield DocumentChange("-", _shown(row))
            elif left[_identity(row)] > 0:
                left[_identity(row)] -= 1
                yield DocumentChange("-", _shown(row))


def diff(before: str | os.PathLike[str] | Storage | Dataset, after: str | os.PathLike[str] | Storage | Dataset) -> Diff:
    """Return what was added and removed from `before` to `after`: two versions, named by URL (`URL@3`, `URL@tag`) or opened.

    Raises:
        MissingError, FormatError, CorruptError: as `open_dataset`; or a segment or a table of deletions is damaged.
    """
    old = before if isinstance(before, Dataset) else open_dataset(before)
    new = after if isinstance(after, Dataset) else open_dataset(after)
    both = {ref.digest for ref in old.commit.segments} & {ref.digest for ref in new.commit.segments}
    a, b = _shards(old, both), _shards(new, both)
    old_only, new_only = _without(a, b), _without(b, a)
    removed_shards, added_shards = _uids(old_only), _uids(new_only)
    removed_rows, added_rows, tokens = _deleted_since(old, new, leave_out=removed_shards | added_shards)
    return Diff(
        before=old,
        after=new,
        added=_changes(new, new_only, added_rows, tokens["+"]),
        removed=_changes(old, old_only, removed_rows, tokens["-"]),
        rewritten=_rewritten(a, b),
        _added_shards=added_shards,
        _removed_shards=removed_shards,
        _added_rows=added_rows,
        _removed_rows=removed_rows,
    )


def _shards(dataset: Dataset, both: set[str]) -> pa.Table:
    """Return the shards in the segments of `dataset` that are not in `both`."""
    refs = [ref for ref in dataset.commit.segments if ref.digest not in both]
    batches = [batch.select(_COLUMNS) for batch in in_parallel(lambda ref: load_segment(dataset.storage, ref), refs)]
    schema = pa.schema([SEGMENT_SCHEMA.field(name) for name in _COLUMNS])
    return pa.Table.from_batches([no_rows(schema), *batches])


def _without(table: pa.Table, other: pa.Table) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table["uid"], value_set=other["uid"].combine_chunks())))


def _uids(table: pa.Table) -> frozenset[str]:
    return frozenset(uid.hex() for uid in cast("list[bytes]", table["uid"].to_pylist()))


def _rewritten(a: pa.Table, b: pa.Table) -> int:
    places = pc.index_in(a["uid"], value_set=b["uid"].combine_chunks())
    both = pc.is_valid(places)
    same: Any = pc.equal(a["digest"].filter(both), b["digest"].take(places.filter(both)))
    return len(same) - int(np.count_nonzero(numbers_of(same)))


def _changes(dataset: Dataset, shards: pa.Table, rows: dict[str, Rows], tokens: int) -> Changes:
    """Return how much `shards` and `rows` of other shards are, what is deleted not counted."""
    documents = int(pc.sum(shards["documents"]).as_py() or 0) + sum(found.size for found in rows.values())
    tokens += int(pc.sum(shards["tokens"]).as_py() or 0)
    if shards.num_rows and dataset.commit.deletions:
        for uid in dataset.deletions.uids & _uids(shards):
            documents -= dataset.deletions.rows(uid).size
            tokens -= _length(dataset.deletions, uid)
    return Changes(shards.num_rows, documents, tokens)


def _deleted_since(
    old: Dataset, new: Dataset, *, leave_out: frozenset[str]
) -> tuple[dict[str, Rows], dict[str, Rows], dict[str, int]]:
    """Return the rows that only `new` deletes, those that only `old` deletes, and the tokens of both."""
    removed: dict[str, Rows] = {}
    added: dict[str, Rows] = {}
    tokens = {"+": 0, "-": 0}
    if {ref.digest for ref in old.commit.deletions} == {ref.digest for ref in new.commit.deletions}:
        return removed, added, tokens
    for uid in (old.deletions.uids | new.deletions.uids) - leave_out:
        before, after = old.deletions.rows(uid), new.deletions.rows(uid)
        if np.array_equal(before, after):
            continue
        removed[uid], added[uid] = np.setdiff1d(after, before), np.setdiff1d(before, after)
        either = _length_of(np.concatenate([old.deletions.spans(uid), new.deletions.spans(uid)]))
        tokens["-"] += either - _length(old.deletions, uid)
        tokens["+"] += either - _length(new.deletions, uid)
    return _filled(removed), _filled(added), tokens


def _filled(rows: dict[str, Rows]) -> dict[str, Rows]:
    return {uid: found for uid, found in rows.items() if found.size}


def _length(deletions: Deletions, uid: str) -> int:
    return _length_of(deletions.spans(uid))


def _length_of(spans: npt.NDArray[np.int64]) -> int:
    """Return how many tokens are in one of `spans` ([K, 2], in any order) at least."""
    if not len(spans):
        return 0
    starts, stops = spans[np.argsort(spans[:, 0])].T
    reach = np.maximum.accumulate(stops)
    return int(np.maximum(reach - np.maximum(starts, np.concatenate([[0], reach[:-1]])), 0).sum())


def _rows(dataset: Dataset, shards: frozenset[str], rows: dict[str, Rows]) -> Iterator[dict[str, Any]]:
    """Yield the documents of `shards` that are not deleted, and `rows` of other shards, in the order of the dataset."""
    uids = sorted(shards | rows.keys())
    places = dataset.segments.find(uids)
    for place in np.argsort(places, kind="stable"):
        index, uid = int(places[place]), uids[place]
        if dataset.kind == "tokens":
            table = dataset.live_documents(index) if uid in shards else dataset.documents(index)
        else:
            table = dataset.live_records(index) if uid in shards else dataset.record_shard(index)
        yield from (table if uid in shards else table.take(array_of(rows[uid]))).to_pylist()


def _identity(row: dict[str, Any]) -> bytes:
    return digest_bytes(repr(row).encode())


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "digest"}
