"""A version of a dataset as the modules of this folder need it, as a protocol.

`Dataset` has all of it. `scan`, `sql` and `hf`, each of which has an optional library at its top, are written against this
and not against `Views`, which calls them.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datastore.dataset.log.manifest import Kind
from datastore.dataset.shards.deletions import Deletions
from datastore.dataset.shards.segments import Segments
from datastore.storage.base import Storage

__all__ = ["Part", "Readable"]

Part = Literal["rows", "documents"]


class Readable(Protocol):
    """Shards, what is deleted in them, and rows; the members are described where `Dataset` and `Views` define them."""

    storage: Storage

    @property
    def url(self) -> str: ...  # noqa: D102 - see above, and so on
    @property
    def kind(self) -> Kind: ...  # noqa: D102
    @property
    def schema(self) -> pa.Schema: ...  # noqa: D102
    @property
    def token_schema(self) -> pa.Schema: ...  # noqa: D102
    @property
    def row_schema(self) -> pa.Schema: ...  # noqa: D102
    @property
    def segments(self) -> Segments: ...  # noqa: D102
    @property
    def deletions(self) -> Deletions: ...  # noqa: D102

    def older_shards(self) -> frozenset[str]: ...  # noqa: D102
    def documents(self, index: int) -> pa.Table: ...  # noqa: D102
    def record_shard(self, index: int) -> pa.Table: ...  # noqa: D102
    def token_lists(self, index: int) -> pa.Table: ...  # noqa: D102
    def live_documents(self, index: int) -> pa.Table: ...  # noqa: D102
    def live_records(self, index: int) -> pa.Table: ...  # noqa: D102
    def live_rows(self, index: int) -> npt.NDArray[np.bool_] | None: ...  # noqa: D102
    def iter_batches(self, *, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]: ...  # noqa: D102
    def to_batches(self, *, columns: Sequence[str] | None = None) -> pa.RecordBatchReader: ...  # noqa: D102
