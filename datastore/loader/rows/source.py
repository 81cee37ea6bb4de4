"""A source of rows as the loader needs it, as a protocol: a dataset at one version, or files that others wrote.

A source is a list of shards, each of which is a list of batches; a batch is the least that is read at a time. Rows are numbered
through all shards, deleted ones counted, and none of it ever changes.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["ChangedFiles", "RowSource", "Shards"]

I64 = npt.NDArray[np.int64]


class Shards(Protocol):
    """All shards of a source, in order, as columns."""

    @property
    def documents(self) -> I64:
        """[S] rows of each."""
        ...

    @property
    def size_bytes(self) -> I64:
        """[S] about what each takes in memory."""
        ...

    @property
    def uid64(self) -> npt.NDArray[np.uint64]:
        """[S] the name of each, as a number: their order in an epoch is hashed from it."""
        ...


class RowSource(Protocol):
    """Rows by shard and batch. Safe for any number of threads, and it can be sent to another process."""

    @property
    def url(self) -> str:
        """Where it lies, without credentials."""
        ...

    @property
    def uuid(self) -> str:
        """Names what is in it: a saved state goes on with no other."""
        ...

    @property
    def version(self) -> int:
        """Counts what may change while a run goes on, which is deletions."""
        ...

    @property
    def kind(self) -> str:
        """`records`, if it holds rows."""
        ...

    @property
    def schema(self) -> pa.Schema:
        """The columns of every row."""
        ...

    @property
    def segments(self) -> Shards:
        """Its shards."""
        ...

    @property
    def deletions(self) -> Any:
        """True if rows are deleted."""
        ...

    @property
    def batch_bytes(self) -> int:
        """About what a batch takes in memory."""
        ...

    def live_rows(self, index: int) -> npt.NDArray[np.bool_] | None:
        """Return which rows of a shard are not deleted, or None if all are there."""
        ...

    def batch_rows(self, shard: int) -> Sequence[int]:
        """Return how many rows each batch of a shard has; none if it is read as a whole only."""
        ...

    def read_batch(self, shard: int, batch: int, *, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Return one batch, deleted rows too."""
        ...

    def record_shard(self, index: int) -> pa.Table:
        """Return all rows of a shard, deleted ones too."""
        ...

    def iter_batches(self, *, columns: Sequence[str] | None = None, deleted: bool = False) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, a few batches in memory at a time; `deleted` ones only if asked."""
        ...


@runtime_checkable
class ChangedFiles(Protocol):
    """A source that can tell which of its files are others than in a saved state."""

    def changed_since(self, uuid: str) -> list[str]:
        """Return what has changed since the source was `uuid`, file by file; nothing where that is not known."""
        ...
