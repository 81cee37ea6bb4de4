"""From a dataset to the order of its rows: which there are, which columns of them, and where a loader begins."""

import numpy as np

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.formats.records import BATCH_BYTES
from datastore.loader.order.order import ORDER_VERSION
from datastore.loader.rows.batch import Rows
from datastore.loader.rows.grid import RowGrid, live_rows_of, matching_rows, row_grid
from datastore.loader.settings import LoaderSettings
from datastore.loader.state import LoaderState
from datastore.loader.stream import SMALL_BYTES

__all__ = ["checked_columns", "chosen_rows", "first_state"]


def chosen_rows(dataset: Dataset, rows: Rows, *, options: LoaderSettings) -> RowGrid:
    """Return the rows of `dataset` to go through.

    Raises:
        ConfigError: it holds tokens; no row is chosen, or in two ways; or there is no such row.
        DependencyError: the condition is SQL, and DuckDB is not installed.
    """
    if dataset.kind != "records":
        raise ConfigError(
            f"the dataset holds {dataset.kind}, and this loader reads rows",
            url=dataset.url,
            hint="Read it with `Loader`.",
        )
    if rows.where is not None and rows.numbers is not None:
        raise ConfigError("both a condition and a list choose the rows", hint="Pass `where` or `numbers`.")
    chosen = None if rows.numbers is None else np.asarray(rows.numbers)
    if chosen is not None and chosen.dtype.kind not in "iu":
        raise ConfigError("rows are chosen by whole numbers", dtype=chosen.dtype.name, hint="Pass integers.")
    if rows.where is not None:
        chosen = matching_rows(dataset, rows.where)
    if options.deletions == "compact" and dataset.deletions:
        live = live_rows_of(dataset)
        chosen = live if chosen is None else chosen[np.isin(chosen, live)]
    return row_grid(dataset, chosen=chosen)


def checked_columns(dataset: Dataset, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return `names`, if they are columns of `dataset`.

    Raises:
        ConfigError: one is not, and is named.
    """
    for name in names:
        if name not in dataset.schema.names:
            raise ConfigError(
                "the dataset has no such column",
                column=name,
                columns=dataset.schema.names,
                hint="Name one that it has.",
            )
    return names


def first_state(dataset: Dataset, grid: RowGrid, *, seed: int, options: LoaderSettings) -> LoaderState:
    """Return the state of a loader that has delivered no row.

    A lane reads a batch of a shard at a time, and shuffles within a window. Where the rows are so large that few make a batch, a
    window is one batch, or each lane would have many to keep.

    Raises:
        ConfigError: `seed` is out of range.
    """
    if not 0 <= seed < 2**63:
        raise ConfigError("seed out of range", seed=seed, hint="Use a number from 0 to 2^63 - 1.")
    size_bytes, rows = int(dataset.segments.size_bytes.sum()), int(dataset.segments.documents.sum())
    batch_rows = max(1, BATCH_BYTES * rows // max(1, size_bytes))
    if size_bytes <= SMALL_BYTES:
        window, lanes = options.window, grid.samples // options.window
    else:
        window, lanes = min(options.window, batch_rows), grid.samples // (4 * batch_rows)
    if not options.shuffle:
        lanes = window = 1
    return LoaderState(
        dataset=dataset.uuid,
        version=dataset.version,
        fingerprint=grid.fingerprint(dataset.segments.uid64),
        seq_len=0,
        seed=seed,
        lanes=max(1, min(options.lanes, lanes)),
        window=max(1, window),
        order=ORDER_VERSION,
        cursor=0,
        deletions=options.deletions,
        shuffle=options.shuffle,
    )
