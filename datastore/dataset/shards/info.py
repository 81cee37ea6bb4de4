"""One shard as the manifest describes it: what its file holds, where in it, and the digests of its parts."""

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from datastore.dataset.log.manifest import Kind
from datastore.document import Count, Document, Hex32
from datastore.errors import CorruptError

__all__ = ["PLAIN", "BatchRange", "ColumnLayout", "ShardInfo", "ShardLayout", "frame_ranges"]


class ColumnLayout(Document, frozen=True, kw_only=True):
    """A column of a token shard beside `tokens`: `width` values for each token, end to end."""

    name: str
    dtype: Annotated[str, msgspec.Meta(pattern="^(u?int(8|16|32|64)|float(16|32|64))$")]
    """NumPy's name of the type of one value."""

    width: Annotated[int, msgspec.Meta(ge=1)] = 1
    values_start: Count
    """Where its values start."""


class BatchRange(Document, frozen=True, array_like=True):
    """A record batch or row group: file bytes `[start, stop)` hold `rows` rows. An array in JSON: there are many."""

    start: Count
    stop: Count
    rows: Count
    digest: bytes
    """xxh3_128 of these bytes."""


class ShardLayout(Document, frozen=True, kw_only=True):
    """What most shards do not have; stored as JSON, and only where it differs from this default."""

    columns: tuple[ColumnLayout, ...] = ()
    batches: tuple[BatchRange, ...] = ()
    """The batches of a record shard, in the order of its rows and of its file; they do not overlap."""

    frame_digest: bytes = b""
    """xxh3_128 of what is before, between and after the batches, end to end."""

    format: Literal["arrow", "parquet"] = "arrow"
    schema_id: Count = 0
    """Which schema a record shard has: that of the versions whose `record_schema` is noted with this number."""


PLAIN = ShardLayout()
"""The layout of a token shard without further columns."""


def frame_ranges(batches: Sequence[BatchRange], size_bytes: int) -> list[tuple[int, int]]:
    """Return the byte ranges of a file of `size_bytes` that belong to none of its `batches`: its frame.

    Raises:
        CorruptError: the batches overlap, or reach beyond the file.
    """
    ranges, at = [], 0
    for batch in batches:
        if not at <= batch.start <= batch.stop <= size_bytes:
            raise CorruptError("the batches of a shard do not fit into its file", hint="Restore it from a copy.")
        if at < batch.start:
            ranges.append((at, batch.start))
        at = batch.stop
    return [*ranges, (at, size_bytes)] if at < size_bytes else ranges


class ShardInfo(Document, frozen=True, kw_only=True):
    """One shard: a row of a segment. Positions and sizes are bytes of its file."""

    uid: Hex32
    """Names the shard, and places it in the order of a run; made from what it was made from, never from its place."""

    path: str
    kind: Kind
    dtype: Literal["uint16", "uint32", ""]
    """Empty for records."""

    documents: Count
    """Rows."""

    tokens: Count
    size_bytes: Count
    values_start: Count
    """Where the flat tokens start."""

    offsets_start: Count
    """Where the `documents + 1` offsets start."""

    offsets_dtype: Literal["int32", ""]
    block_bytes: Annotated[int, msgspec.Meta(ge=1)]
    digest: bytes
    """xxh3_128 of the file."""

    block_digests: bytes
    """xxh3_128 of each block, 16 bytes each; block `i` is file bytes `[i * block_bytes, (i + 1) * block_bytes)`."""

    docs_path: str
    """The documents file; empty for records."""

    docs_bytes: Count
    docs_digest: bytes
    source_first: str
    source_last: str
    """First and last source in it, in the order of its documents."""

    layout: ShardLayout = PLAIN
