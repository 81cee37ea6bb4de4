"""Bring documents back that one version deleted: a filter was too strict, a search for near duplicates too eager.

Later versions stay as they are, appends since then too. What a `purge` has blanked or a `compact` has left out cannot come back,
and is counted. It costs reading, for tokens, the documents files of shards of which something stays deleted.
"""

from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from datastore.dataset.log.keys import DELETIONS
from datastore.dataset.log.manifest import Commit, sum_refs
from datastore.dataset.operations.transaction import (
    DatasetLike,
    draft_commit,
    open_for_change,
    publish,
    require_unchanged,
)
from datastore.dataset.shards.deletions import drop_deletions, store_deletions
from datastore.dataset.shards.files import read_documents
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError
from datastore.formats.arrow import numbers_of
from datastore.threads import in_parallel

__all__ = ["UndeleteReport", "undelete"]

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class UndeleteReport:
    """What came back, or would."""

    url: str
    version: int
    """The version that has them again; with nothing to bring back, or only asked, the one that was read."""

    committed: bool
    documents: int
    tokens: int
    gone: int
    """Documents that cannot come back: purged, or left out by a compact."""


def undelete(target: DatasetLike, *, of: int, dry_run: bool = False) -> UndeleteReport:
    """Bring the documents back to `target` that version `of` deleted, by a delete, a `dedup` or an ingest with `replace`.

    With `dry_run` nothing is committed, and the report says what would come back.

    Raises:
        ConfigError: that version deleted nothing.
        MissingError: there is no such version, or it has expired.
        ConflictError: another operation changed the same shards meanwhile; nothing came back.
    """
    dataset = open_for_change(target)
    then = open_dataset(dataset.storage, version=of)
    meant = _deleted_by(then)
    if not meant:
        raise ConfigError(
            "that version deleted nothing",
            url=dataset.url,
            version=of,
            operation=then.commit.operation,
            hint="`datastore log` lists the versions.",
        )
    back = {uid: rows for uid, rows in _still_there(dataset, then, meant).items() if rows.size}
    stay = {uid: np.setdiff1d(dataset.deletions.rows(uid), rows, assume_unique=True) for uid, rows in back.items()}
    lengths = _lengths(dataset, list(back))
    commit = _commit(dataset, stay, lengths) if back and not dry_run else dataset.commit
    documents = sum(rows.size for rows in back.values())
    return UndeleteReport(
        url=dataset.url,
        version=commit.version,
        committed=commit is not dataset.commit,
        documents=documents,
        tokens=sum(int(lengths[uid][rows].sum()) for uid, rows in back.items() if uid in lengths),
        gone=sum(rows.size for rows in meant.values()) - documents,
    )


def _deleted_by(then: Dataset) -> dict[str, Rows]:
    """Return the rows of each shard that are deleted in `then` and were not in the version before."""
    if then.version == 1 or not then.commit.deletions:
        return {}
    before = open_dataset(then.storage, version=then.version - 1)
    found = {
        uid: np.setdiff1d(then.deletions.rows(uid), before.deletions.rows(uid), assume_unique=True)
        for uid in then.deletions.uids
    }
    return {uid: rows for uid, rows in found.items() if rows.size}


def _still_there(dataset: Dataset, then: Dataset, meant: dict[str, Rows]) -> dict[str, Rows]:
    """Return what of `meant` is deleted in `dataset`, in shards whose files are those that they were: a purge writes others."""
    uids = sorted(meant)
    found = {}
    places = zip(uids, then.segments.find(uids).tolist(), dataset.segments.find(uids).tolist(), strict=True)
    for uid, old, new in places:
        if old >= 0 and new >= 0 and then.segments.shard(old).path == dataset.segments.shard(new).path:
            found[uid] = np.intersect1d(meant[uid], dataset.deletions.rows(uid), assume_unique=True).astype(np.int32)
    return found


def _lengths(dataset: Dataset, uids: list[str]) -> dict[str, npt.NDArray[np.int64]]:
    """Return the tokens of every row of the shards `uids`; nothing for records."""
    if dataset.kind != "tokens" or not uids:
        return {}
    shards = [dataset.segments.shard(index) for index in dataset.segments.find(uids).tolist()]
    tables = in_parallel(lambda shard: read_documents(dataset.storage, shard, columns=["tokens"]), shards)
    return {
        shard.uid: numbers_of(table.column("tokens")).astype(np.int64)
        for shard, table in zip(shards, tables, strict=True)
    }


def _commit(dataset: Dataset, stay: dict[str, Rows], lengths: dict[str, npt.NDArray[np.int64]]) -> Commit:
    """Commit that of the shards in `stay` these rows are deleted, and no others."""
    left = {uid: rows for uid, rows in stay.items() if rows.size}

    def build(newest: Commit | None) -> Commit:
        current = require_unchanged(dataset, newest, uids=stay, operation="undelete")
        refs = drop_deletions(dataset.storage, current.deletions, uids=stay)
        if left:
            refs += (store_deletions(dataset.storage, left, lengths=lengths),)
        features = {*current.commit.features} - (set() if refs else {DELETIONS})
        return msgspec.structs.replace(
            draft_commit("undelete", parent=current.commit),
            deletions=refs,
            totals=sum_refs(current.commit.segments, refs),
            features=tuple(sorted(features)),
        )

    return publish(dataset.storage, dataset.info, build)
