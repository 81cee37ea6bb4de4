"""The request, `Rows`, and the answer: one rank's part of a global batch of rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datastore.loader.mixture.request import Mixture
from datastore.loader.order.lanes import I64
from datastore.loader.rows.sampling import Stratified, Weighted
from datastore.loader.rows.source import RowSource

if TYPE_CHECKING:
    import pyarrow.compute as pc

__all__ = ["OnError", "RowBatch", "Rows"]

OnError = Literal["raise", "leave_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Which rows of a dataset to go through, and what to make of them."""

    where: "str | pc.Expression | None" = None
    """A condition, in SQL or of pyarrow; looked up once, in one pass over the columns that it names."""

    numbers: "I64 | None" = None
    """Or a list of row numbers. A row may be in it more than once; their order is that of the loader all the same."""

    sample: Weighted | Stratified | None = None
    """How to go through them; None: each once an epoch."""

    transform: Callable[[dict[str, Any], np.random.Generator], Any] | None = None
    """Called with each row as a dict, and a generator that depends on the loader's seed and the row's position alone."""

    collate: Callable[[Any], Any] | None = None
    """Called with all rows of a batch: an Arrow record batch, or the list of what `transform` returned."""

    workers: int = 0
    """Processes that do both, and are sent row numbers. They import the two functions from the module that defines them.
    0: threads of this process do it, `LoaderSettings.threads` of them."""

    on_error: OnError = "raise"
    """What becomes of a row that `transform` fails on. "raise": the call ends with its error, the next one tries again.
    "leave_out": the batch is shorter, and `RowBatch.failed` names the row."""


@dataclass(frozen=True, slots=True, eq=False)
class RowBatch:
    """Rows at consecutive positions of the order, as far as they fall to one rank: `len` may differ from batch to batch.

    What is not there: deleted rows, those that the transform failed on and that were left out, and what the last batch of a
    finite pass lacks.
    """

    data: Any
    """The rows as they were asked for: `pyarrow.RecordBatch`; with `transform`, a list of what it returned; with `collate`,
    what that returned."""

    positions: I64
    """[B] place of each row in the endless order."""

    numbers: I64
    """[B] number of each row in the dataset, deleted ones counted; in a mixture, through all its sources in the order of names."""

    cursor: int
    """First position of the global batch: how many rows all ranks had been given before it."""

    dataset: RowSource | Mixture = field(repr=False)
    """Where they are from."""

    failed: Mapping[int, str] = field(default_factory=dict)
    """Rows that the transform failed on and that were left out: the number of each, and why."""

    first_rows: I64 = field(default_factory=lambda: np.zeros(1, np.int64))
    """[sources] number of the first row of each source of a mixture."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def sources(self) -> I64:
        """[B] which source of the mixture each row is of, a number in `Mixture.names`; 0 of a dataset."""
        return np.searchsorted(self.first_rows, self.numbers, side="right") - 1

    @property
    def own_numbers(self) -> I64:
        """[B] number of each row in its own source."""
        return self.numbers - self.first_rows[self.sources]

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Return the columns as NumPy arrays of their own, of objects where NumPy has no type for them.

        Only without `transform` and `collate`.
        """
        assert isinstance(self.data, pa.RecordBatch)
        names = self.data.schema.names
        return {
            name: np.array(column.to_numpy(zero_copy_only=False))
            for name, column in zip(names, self.data.columns, strict=True)
        }
