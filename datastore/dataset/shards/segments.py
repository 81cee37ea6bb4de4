"""From a commit to its columns: the segments of a version, read, checked and mapped."""

import pyarrow as pa

from datastore.dataset.log.manifest import Commit, SegmentRef
from datastore.dataset.shards.segment_file import Segments, decode_segment, segment_key
from datastore.errors import CorruptError
from datastore.storage.base import Storage
from datastore.storage.verified import Forget, map_checked
from datastore.store.parallel import in_parallel

__all__ = ["Loaded", "load_segment", "load_segments"]

Loaded = dict[str, pa.RecordBatch]
"""Segments by their digest, which stands for their bytes: one read once need not be read again."""


def load_segments(storage: Storage, commit: Commit, *, loaded: Loaded | None = None) -> Segments:
    """Return the shards of `commit`; segments that are `loaded` are not read again, and others are added to them.

    Raises:
        MissingError: a segment is gone.
        CorruptError: a segment is damaged, or does not hold what the commit says.
    """
    forgets: list[Forget] = []

    def load(ref: SegmentRef) -> pa.RecordBatch:
        return _load(storage, ref, loaded, forgets)

    def forget() -> None:
        for pages in forgets:
            pages()

    if len(commit.segments) < 2:
        return Segments([load(ref) for ref in commit.segments])
    return Segments(list(in_parallel(load, commit.segments)), forget=forget)


def load_segment(storage: Storage, ref: SegmentRef, *, loaded: Loaded | None = None) -> pa.RecordBatch:
    """Return the rows of one segment, those `loaded` before if they are there."""
    return _load(storage, ref, loaded, [])


def _load(storage: Storage, ref: SegmentRef, loaded: Loaded | None, forgets: list[Forget]) -> pa.RecordBatch:
    found = loaded.get(ref.digest) if loaded is not None else None
    if found is not None:
        return found
    key = segment_key(ref.digest)
    raw, forget = map_checked(storage, key, size_bytes=ref.file_bytes, digest=ref.digest)
    batch = decode_segment(raw, where=key)
    forget()
    forgets.append(forget)
    if batch.num_rows != ref.shards:
        raise CorruptError(
            "a segment has another number of shards than its commit says",
            where=key,
            expected=ref.shards,
            found=batch.num_rows,
            hint="Restore this file from a copy.",
        )
    if loaded is not None:
        loaded[ref.digest] = batch
    return batch
