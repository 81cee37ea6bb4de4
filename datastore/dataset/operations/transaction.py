"""Shards written anew: what an operation that replaces some of them checks, and how their segments change.

Two operations on the same shard never merge: which rows the second one meant was decided from what the first one has
changed. So each remembers the shards it started from, and gives way if the newest version has others; what happened
to any other shard meanwhile does not matter. Only segments that name a replaced shard are written again.
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.manifest import Commit, SegmentRef
from datastore.dataset.shards.files import remove_unused
from datastore.dataset.shards.segment_file import (
    MAX_SEGMENT_SHARDS,
    SEGMENT_SCHEMA,
    ShardInfo,
    encode_segment,
    segment_key,
    segment_of,
    segment_ref,
)
from datastore.dataset.shards.segments import load_segment
from datastore.dataset.snapshot import Dataset, open_dataset, split_reference
from datastore.errors import ConfigError, ConflictError, MissingError
from datastore.storage.base import Storage
from datastore.storage.resolve import strip_credentials
from datastore.store.leftovers import data_paths

__all__ = ["Target", "changing", "open_to_change", "replace_shards", "require_unchanged", "withdraw"]

Target = str | os.PathLike[str] | Storage | Dataset
"""A dataset to change: its URL, its storage, or a version of it that was opened before."""


def open_to_change(target: Target) -> Dataset:
    """Return the newest version of `target`; a dataset that is open already is what the change starts from.

    Raises:
        ConfigError: the URL names a version.
        MissingError, FormatError, CorruptError: as `open_dataset`.
    """
    if isinstance(target, Dataset):
        return target
    if not isinstance(target, Storage) and (name := split_reference(os.fspath(target))[1]):
        raise ConfigError(
            "a version cannot be changed",
            url=strip_credentials(os.fspath(target)),
            version=name,
            hint="Name the dataset without it: what is done makes a new version.",
        )
    return open_dataset(target)


@contextmanager
def changing(dataset: Dataset, *, operation: str) -> Iterator[None]:
    """Say that another was faster if the block misses a file because `dataset` has expired since it was opened.

    Raises:
        ConflictError: it has.
    """
    try:
        yield
    except MissingError as error:
        newest = CommitLog(dataset.storage).newest()
        if newest is None or newest.min_version <= dataset.version:
            raise
        raise ConflictError(
            f"the version that this {operation} started from has expired meanwhile",
            url=dataset.url,
            started_from=dataset.version,
            newest=newest.version,
            hint=f"Nothing was lost. Give the same {operation} again: it starts from the newest version.",
        ) from error


def require_unchanged(base: Dataset, newest: Commit | None, *, uids: Collection[str], operation: str) -> Dataset:
    """Return the version `newest`, in which the shards `uids` are what they are in `base`, deletions included.

    Raises:
        ConflictError: one of them is gone, was written anew, or has other deleted rows.
    """
    if newest is None:
        raise ConflictError("the dataset is gone", url=base.url, hint="Check the URL.")
    current = Dataset(base.storage, info=base.info, commit=newest)
    changed = _changed(base, current, uids)
    if changed:
        raise ConflictError(
            f"shards that this {operation} changes were changed meanwhile",
            url=base.url,
            started_from=base.version,
            newest=newest.version,
            newest_operation=newest.operation,
            shards=len(changed),
            first=changed[0],
            hint=f"Nothing was lost. Give the same {operation} again: it starts from the newest version.",
        )
    return current


def withdraw(base: Dataset, made: Mapping[str, Sequence[str]]) -> None:
    """After a conflict, remove the files `made` from shards of `base` that have changed: they can never be committed.

    What was made from others stays, to be found by whoever tries again. A failure leaves files that no version names.
    """
    storage = base.storage
    newest = CommitLog(storage).newest()
    if newest is None:
        return
    named = {str(path) for path in data_paths(storage, newest.segments).to_pylist()}
    changed = _changed(base, Dataset(storage, info=base.info, commit=newest), made)
    remove_unused(storage, {path for uid in changed for path in made[uid]} - named)


def _changed(base: Dataset, current: Dataset, uids: Collection[str]) -> list[str]:
    """Return those of the shards `uids` that are not in `current` what they are in `base`, deletions included."""
    if current.version == base.version:
        return []
    before = base.segments.digests_of(list(uids))
    present = current.segments.digests_of(list(uids))
    return [
        uid
        for uid in sorted(uids)
        if present.get(uid) != before[uid] or not np.array_equal(current.deletions.rows(uid), base.deletions.rows(uid))
    ]


def replace_shards(
    storage: Storage, refs: Sequence[SegmentRef], new: Mapping[str, Sequence[ShardInfo]]
) -> tuple[SegmentRef, ...]:
    """Return `refs` with each shard whose uid is in `new` replaced, where it stands, by those given for it.

    Segments that change are stored anew, neighbours among them as one if it is not too large; the others stay.
    """
    fresh = segment_of(list(chain.from_iterable(new.values())))
    places, at = dict[bytes, range](), 0
    for uid, shards in new.items():
        places[bytes.fromhex(uid)] = range(at, at + len(shards))
        at += len(shards)
    out: list[SegmentRef] = []
    pending: list[pa.RecordBatch] = []
    for ref in refs:
        batch = _replaced(load_segment(storage, ref), fresh, places)
        if pending and (batch is None or sum(b.num_rows for b in pending) + batch.num_rows > MAX_SEGMENT_SHARDS):
            out += _stored(storage, pending)
            pending = []
        if batch is None:
            out.append(ref)
        else:
            pending.append(batch)
    return (*out, *_stored(storage, pending))


def _replaced(batch: pa.RecordBatch, fresh: pa.RecordBatch, places: Mapping[bytes, range]) -> pa.RecordBatch | None:
    """Return `batch` with the rows that have a place in `fresh` replaced; None if it has none."""
    wanted = pa.array(list(places), SEGMENT_SCHEMA.field("uid").type)
    hit = pc.is_in(batch.column("uid"), value_set=wanted)
    hits = np.flatnonzero(hit.to_numpy(zero_copy_only=False))
    if not hits.size:
        return None
    uids = cast("list[bytes]", batch.column("uid").filter(hit).to_pylist())
    pieces = []
    start = 0
    for row, uid in zip(hits.tolist(), uids, strict=True):
        place = places[uid]
        pieces += [np.arange(start, row), np.arange(place.start, place.stop) + batch.num_rows]
        start = row + 1
    order = np.concatenate([*pieces, np.arange(start, batch.num_rows)])
    both = pa.Table.from_batches([batch, fresh], schema=SEGMENT_SCHEMA).combine_chunks()
    return _one_batch(both.take(pa.array(order)))


def _stored(storage: Storage, batches: Sequence[pa.RecordBatch]) -> list[SegmentRef]:
    """Store `batches` as one segment each of at most `MAX_SEGMENT_SHARDS` rows; no rows give none."""
    table = pa.Table.from_batches(batches, schema=SEGMENT_SCHEMA)
    refs = []
    for start in range(0, table.num_rows, MAX_SEGMENT_SHARDS):
        batch = _one_batch(table.slice(start, MAX_SEGMENT_SHARDS))
        raw = encode_segment(batch)
        ref = segment_ref(batch, raw)
        storage.put(segment_key(ref.digest), raw)
        refs.append(ref)
    return refs


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=SEGMENT_SCHEMA)
