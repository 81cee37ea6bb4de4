"""A planned batch made: rows read, transformed one by one, collated.

The same code runs in the loader's threads and in worker processes. What it is sent is a plan, that is numbers; what it
sends back is what the user's functions made. A row gets a random generator of its own, seeded by the loader's seed and
the row's position: not by the worker that happens to have it, nor by what came before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from datastore.errors import DatastoreError, RejectedError
from datastore.formats.plain import python_rows
from datastore.loader.order.lanes import I64
from datastore.loader.order.mix import Purpose, derive_key
from datastore.loader.order.order import NO_SAMPLE, BatchPlan
from datastore.loader.rows.batch import Rows
from datastore.loader.rows.grid import Grid
from datastore.loader.rows.source import RowSource
from datastore.loader.rows.store import RowPlaces, RowStore
from datastore.loader.settings import LoaderSettings

__all__ = ["Assembler", "Located", "Made"]


class Located(NamedTuple):
    """The rows of a plan, and where they lie."""

    positions: I64
    numbers: I64
    places: RowPlaces


class Made(NamedTuple):
    """What a plan came to."""

    data: Any
    positions: I64
    numbers: I64
    failed: Mapping[int, str]


@dataclass(kw_only=True)
class Assembler:
    """Makes the batches of one loader. Thread-safe, and may be sent to another process: what it has read stays behind."""

    dataset: RowSource
    grid: Grid
    seed: int
    columns: Sequence[str]
    options: LoaderSettings
    rows: Rows
    store: RowStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = RowStore(self.dataset, columns=self.columns, options=self.options)

    def __reduce__(self) -> tuple[Any, ...]:
        chosen = {name: getattr(self, name) for name in _SENT}
        return _again, (chosen,)

    def locate(self, plan: BatchPlan) -> "Located":
        """Return which rows `plan` asks for that are not deleted, and where they lie."""
        there = np.flatnonzero(plan.positions != NO_SAMPLE)
        positions = plan.positions[there]
        numbers = self.grid.numbers(plan.samples[there], positions)
        # Not those of the plan: where rows are drawn by weight, it knows only about where they lie. A shard of no rows is never the last at its start.
        shards = np.searchsorted(self.grid.shard_start, numbers, side="right") - 1
        rows = numbers - self.grid.shard_start[shards]
        live = self.store.live(shards, rows)
        if not live.all():
            positions, shards, numbers, rows = positions[live], shards[live], numbers[live], rows[live]
        return Located(positions, numbers, self.store.place(shards, rows))

    def at_hand(self, located: "Located") -> bool:
        """Return whether its batch can be made at once: nothing is to be read, and no code of a user to be run."""
        return self.rows.transform is None and self.rows.collate is None and self.store.has(located.places)

    def make(self, plan: BatchPlan) -> Made:
        """Return the batch of `plan`; as `make_of`."""
        return self.make_of(self.locate(plan))

    def make_of(self, located: "Located") -> Made:
        """Return the batch of the rows that were `located`.

        Raises:
            RejectedError: `transform` raised something, and rows are not to be left out; the message names the row.
            MissingError, CorruptError, StorageError: as `RowStore.take`.
        """
        positions, numbers = located.positions, located.numbers
        data: Any = self.store.take(located.places)
        failed: dict[int, str] = {}
        if self.rows.transform is not None:
            data, kept = self._transformed(python_rows(data), positions, numbers, failed)
            positions, numbers = positions[kept], numbers[kept]
        if self.rows.collate is not None:
            data = self.rows.collate(data)
        return Made(data, positions, numbers, failed)

    def _transformed(
        self, rows: list[dict[str, Any]], positions: I64, numbers: I64, failed: dict[int, str]
    ) -> tuple[list[Any], list[int]]:
        assert self.rows.transform is not None
        out, kept = [], []
        for index, row in enumerate(rows):
            random = np.random.Generator(np.random.Philox(derive_key(self.seed, Purpose.ROW, int(positions[index]))))
            try:
                out.append(self.rows.transform(row, random))
            except DatastoreError:
                raise
            except Exception as error:
                number = int(numbers[index])
                if self.rows.on_error == "raise":
                    raise RejectedError(
                        f"the transform failed on a row: {type(error).__name__}: {error}",
                        row=number,
                        **({"id": row["id"]} if "id" in row else {}),
                        hint='Mend it, or leave such rows out: `on_error="leave_out"`.',
                    ) from error
                failed[number] = f"{type(error).__name__}: {error}"
            else:
                kept.append(index)
        return out, kept


_SENT = ("dataset", "grid", "seed", "columns", "options", "rows")


def _again(chosen: dict[str, Any]) -> Assembler:
    return Assembler(**chosen)
