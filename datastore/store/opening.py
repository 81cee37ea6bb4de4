"""From a commit to its columns: the segments of a version, read, checked and mapped."""

from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from datastore.errors import CorruptError
from datastore.storage.base import Storage
from datastore.store.checked import read_checked
from datastore.store.manifest import Commit, SegmentRef
from datastore.store.segment import Segments, decode_segment, segment_key

__all__ = ["load_segment", "load_segments"]

_READERS = 8


def load_segments(storage: Storage, commit: Commit) -> Segments:
    """Return the shards of `commit`.

    Raises:
        MissingError: a segment is gone.
        CorruptError: a segment is damaged, or does not hold what the commit says.
    """
    if len(commit.segments) < 2:
        return Segments([load_segment(storage, ref) for ref in commit.segments])
    with ThreadPoolExecutor(max_workers=min(_READERS, len(commit.segments))) as pool:
        return Segments(list(pool.map(lambda ref: load_segment(storage, ref), commit.segments)))


def load_segment(storage: Storage, ref: SegmentRef) -> pa.RecordBatch:
    """Return the rows of one segment."""
    key = segment_key(ref.digest)
    batch = decode_segment(read_checked(storage, key, size_bytes=ref.file_bytes, digest=ref.digest), where=key)
    if batch.num_rows != ref.shards:
        raise CorruptError(
            "a segment has another number of shards than its commit says",
            where=key,
            expected=ref.shards,
            found=batch.num_rows,
            hint="Restore this file from a copy.",
        )
    return batch
