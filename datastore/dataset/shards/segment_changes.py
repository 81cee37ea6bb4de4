"""The segments of a next version: shards are appended to those of the one before, or stand in the place of others.

Only what is new is stored. A program that makes many small versions reads no segment again: the small ones of the version
that it has made last are kept in memory, under the digests that stand for their bytes.
"""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.log.keys import segment_key
from datastore.dataset.log.manifest import Commit, SegmentRef
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.segment_file import (
    MAX_SEGMENT_SHARDS,
    SEGMENT_SCHEMA,
    encode_segment,
    segment_of,
    segment_ref,
)
from datastore.dataset.shards.segments import Loaded, load_segment
from datastore.formats.arrow import array_of, numbers_of
from datastore.formats.schema import no_rows
from datastore.storage.base import Storage

__all__ = ["append_shards", "keep_segments", "merge_tail", "recent_segments", "replace_shards", "store_segments"]

_MERGE_RATIO = 3
"""A segment at the tail is merged into the one after it if it has less than this many times its shards."""

_KEPT_BYTES = 2**18
"""Segments up to this size are kept for the next append: a program that makes many small ones reads none of them again."""

_recent: Loaded = {}
"""Small segments of the version that this process has made last: some 20 at most, as a version has no more."""


def recent_segments() -> Loaded:
    """Return the small segments of the version that this process has made last, whatever the dataset."""
    return dict(_recent)


def keep_segments(commit: Commit, loaded: Loaded) -> None:
    """Keep those of `loaded` that are small and of `commit`, and forget all others."""
    global _recent  # noqa: PLW0603 - replaced as a whole, so that threads need no lock
    _recent = {
        ref.digest: loaded[ref.digest]
        for ref in commit.segments
        if ref.digest in loaded and ref.file_bytes <= _KEPT_BYTES
    }


def append_shards(
    storage: Storage, kept: Sequence[SegmentRef], shards: Sequence[ShardInfo], *, loaded: Loaded | None = None
) -> tuple[SegmentRef, ...]:
    """Return the segments `kept`, those at their end merged, and stored new ones for `shards`.

    Segments that are `loaded` are not read.
    """
    merged = merge_tail([ref.shards for ref in kept], len(shards))
    rows = [load_segment(storage, ref, loaded=loaded) for ref in kept[len(kept) - merged :]]
    if shards:
        rows.append(segment_of(shards))
    table = pa.Table.from_batches(rows, schema=SEGMENT_SCHEMA).combine_chunks()
    return (*kept[: len(kept) - merged], *store_segments(storage, table, loaded=loaded))


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
            out += store_segments(storage, pa.Table.from_batches(pending, schema=SEGMENT_SCHEMA))
            pending = []
        if batch is None:
            out.append(ref)
        else:
            pending.append(batch)
    return (*out, *store_segments(storage, pa.Table.from_batches(pending, schema=SEGMENT_SCHEMA)))


def merge_tail(segments: Sequence[int], added: int) -> int:
    """Return how many segments at the end of `segments` (their sizes) to merge with `added` new shards.

    Each shard is rewritten a few times on its way into a full segment: every merge of it at least grows its segment
    by a third. Large segments are never rewritten for a small append.
    """
    merged, total = 0, added
    for size in reversed(segments):
        if size >= _MERGE_RATIO * total or size + total > MAX_SEGMENT_SHARDS:
            break
        merged, total = merged + 1, total + size
    return merged


def _replaced(batch: pa.RecordBatch, fresh: pa.RecordBatch, places: Mapping[bytes, range]) -> pa.RecordBatch | None:
    """Return `batch` with the rows that have a place in `fresh` replaced; None if it has none."""
    wanted = array_of(list(places), SEGMENT_SCHEMA.field("uid").type)
    hit = pc.is_in(batch.column("uid"), value_set=wanted)
    hits = np.flatnonzero(numbers_of(hit))
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
    return _one_batch(both.take(array_of(order)))


def store_segments(storage: Storage, table: pa.Table, *, loaded: Loaded | None = None) -> list[SegmentRef]:
    """Store the rows of `table` as segments of at most `MAX_SEGMENT_SHARDS` rows each, `loaded` from then on."""
    refs = []
    for start in range(0, table.num_rows, MAX_SEGMENT_SHARDS):
        batch = _one_batch(table.slice(start, MAX_SEGMENT_SHARDS))
        raw = encode_segment(batch)
        ref = segment_ref(batch, raw)
        storage.put(segment_key(ref.digest), raw)
        refs.append(ref)
        if loaded is not None:
            loaded[ref.digest] = batch
    return refs


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return batches[0] if batches else no_rows(SEGMENT_SCHEMA)
