"""From a dataset to the order of its rows: which there are, which columns of them, and where a loader begins."""

from dataclasses import dataclass
from typing import cast

import numpy as np

from datastore.errors import ConfigError
from datastore.formats.records import BATCH_BYTES
from datastore.loader.mixture.joint import places_of
from datastore.loader.mixture.request import Mixture
from datastore.loader.order.lanes import I64
from datastore.loader.place.sources import Shape, Source, first_state
from datastore.loader.place.state import LoaderState
from datastore.loader.rows.batch import Rows
from datastore.loader.rows.grid import Grid, RowGrid, live_rows_of, matching_rows, row_grid
from datastore.loader.rows.joint import JointRows, joint_rows
from datastore.loader.rows.sampling import Stratified, Weighted, draws_of, strata_of, weights_of
from datastore.loader.rows.source import RowSource
from datastore.loader.rows.strata import stratified_grid
from datastore.loader.rows.weighted import subset_grid, weighted_grid
from datastore.loader.settings import LoaderSettings
from datastore.loader.stream import SMALL_BYTES

__all__ = ["RowStream", "checked_columns", "chosen_rows", "open_rows", "shape_of"]

_WIDEST = 65_536
"""Rows of a window at most, as the state has it."""


@dataclass(frozen=True, slots=True)
class RowStream:
    """The rows of a source or of a mixture, and the state of a loader that has delivered none of them."""

    data: RowSource | Mixture
    source: RowSource
    """All sources as one."""

    sources: tuple[Source[RowSource], ...]
    grid: Grid
    start: LoaderState

    @property
    def first_rows(self) -> I64:
        """[sources] number of the first row of each source."""
        rows = [int(source.dataset.segments.documents.sum()) for source in self.sources]
        return np.cumsum([0, *rows])[:-1]


def open_rows(data: RowSource | Mixture, rows: Rows, *, seed: int, options: LoaderSettings) -> RowStream:
    """Return the rows of `data` to go through.

    Raises:
        ConfigError: it holds tokens; no row is chosen, or in two ways; or there is no such row; sources of a mixture have
            different columns, or their rows are to be chosen by number or drawn by weight.
        DependencyError: the condition is SQL, and DuckDB is not installed.
    """
    mixture = data if isinstance(data, Mixture) else None
    if mixture is not None and (rows.numbers is not None or rows.sample is not None):
        raise ConfigError(
            "rows of a mixture are gone through as they are, or by a condition",
            hint="Leave out `numbers` and `sample`, or load one dataset.",
        )
    given = {name: mixture.sources[name] for name in mixture.names} if mixture else {"": data}
    datasets = cast("dict[str, RowSource]", given)
    grids = [chosen_rows(dataset, rows, seed=seed, options=options) for dataset in datasets.values()]
    counts = [dataset.segments.documents for dataset in datasets.values()]
    places = places_of([grid.samples for grid in grids], shards=[len(count) for count in counts])
    sources = tuple(
        Source(name, dataset, grid, place, shape_of(dataset, grid, options=options))
        for (name, dataset), grid, place in zip(datasets.items(), grids, places, strict=True)
    )
    start = first_state(sources, mixture, seq_len=0, seed=seed, options=options)
    if mixture is None:
        checked_columns(sources[0].dataset, options.columns)
        return RowStream(data, sources[0].dataset, sources, grids[0], start)
    plain = [grid for grid in grids if isinstance(grid, RowGrid)]
    grid = joint_rows(plain, places, rows=[int(count.sum()) for count in counts])
    return RowStream(data, JointRows(datasets, columns=options.columns), sources, grid, start)


def chosen_rows(dataset: RowSource, rows: Rows, *, seed: int, options: LoaderSettings) -> Grid:
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
    return _sampled(dataset, row_grid(dataset, chosen=chosen), rows, seed=seed)


def _sampled(dataset: RowSource, grid: RowGrid, rows: Rows, *, seed: int) -> Grid:
    """Return the rows of `grid` as they are to be gone through."""
    here = slice(None) if grid.chosen is None else grid.chosen
    if isinstance(rows.sample, Stratified):
        return stratified_grid(grid, strata_of(dataset, rows.sample)[here])
    if isinstance(rows.sample, Weighted):
        weights = weights_of(dataset, rows.sample)[here]
        draws = draws_of(rows.sample, weights)
        return (weighted_grid if rows.sample.replacement else subset_grid)(grid, weights, draws=draws, seed=seed)
    if rows.sample is not None:
        raise ConfigError(
            "no such way to go through rows", sample=type(rows.sample).__name__, hint="Use `Weighted` or `Stratified`."
        )
    return grid


def checked_columns(dataset: RowSource, names: tuple[str, ...]) -> tuple[str, ...]:
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


def shape_of(dataset: RowSource, grid: Grid, *, options: LoaderSettings) -> Shape:
    """Return how many lanes and how wide a window the rows have, and the name of their line.

    A lane reads a batch of a shard at a time, and shuffles within a window. Where the rows are so large that few make a batch, a
    window is one batch, or each lane would have many to keep. Where batches are so large that few fit into memory, there are
    as many lanes as do, and windows become wider, up to a batch, so that as many rows are in one.

    It depends on the dataset and the options alone, not on rank, world or memory, and is frozen in the state.
    """
    size_bytes, rows = int(dataset.segments.size_bytes.sum()), int(dataset.segments.documents.sum())
    batch_rows = max(1, dataset.batch_bytes * rows // max(1, size_bytes))
    if size_bytes <= SMALL_BYTES:
        window, lanes = options.window, grid.samples // options.window
    else:
        window, lanes = min(options.window, batch_rows), grid.samples // (4 * batch_rows)
        if dataset.batch_bytes > BATCH_BYTES:
            lanes = max(1, min(options.lanes, lanes, SMALL_BYTES // dataset.batch_bytes))
            window = min(max(window, options.lanes * options.window // lanes), batch_rows, _WIDEST)
    if not options.shuffle:
        lanes = window = 1
    return Shape(max(1, min(options.lanes, lanes)), max(1, window), grid.fingerprint(dataset.segments.uid64))
