"""Requests for another order than each row once an epoch: by weight, or with each value of a column at its rate throughout."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datastore.errors import ConfigError, whole_number
from datastore.loader.rows.source import RowSource

__all__ = ["Stratified", "Weighted", "draws_of", "strata_of", "weights_of"]

_MOST_STRATA = 4_096

Weights = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Weighted:
    """Draw rows in proportion to weights."""

    weights: str | npt.ArrayLike
    """The column that has them; or one for each row of the dataset, deleted ones too. A row of weight 0 never comes."""

    replacement: bool = True
    """Whether a row may come more than once an epoch. Each row then comes as often as its weight says, rounded up or down by
    chance. False: at most once, and the `rows` of an epoch are chosen anew, by chance and weight."""

    rows: int | None = None
    """Rows of an epoch; None: as many as there are. It must be given where none may come twice."""


@dataclass(frozen=True, slots=True)
class Stratified:
    """Go through each row once an epoch, and through each value of a column at its rate, all the time."""

    by: str
    """The column; it has at most 4,096 values. Null is one of them."""


def weights_of(source: RowSource, request: Weighted) -> Weights:
    """Return the weight of every row of `source`: one pass over the column, if it names one.

    Raises:
        ConfigError: there is no such column, it has no numbers, or not one for each row; or one is negative or not finite.
    """
    rows = int(source.segments.documents.sum())
    if isinstance(request.weights, str):
        column = _column(source, request.weights)
        if not (
            pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)
        ):
            raise ConfigError(
                "weights are numbers", column=request.weights, type=str(column.type), hint="Name a column of numbers."
            )
        if column.null_count:
            raise ConfigError(
                "a weight is null", column=request.weights, hint="Give each row a weight; 0 leaves it out."
            )
        weights = column.cast(pa.float64(), safe=False).to_numpy()
    else:
        weights = np.asarray(request.weights)
        if weights.dtype.kind not in "iufb" or weights.shape != (rows,):
            raise ConfigError(
                "there must be one number for each row",
                shape=weights.shape,
                dtype=weights.dtype.name,
                rows=rows,
                hint="Give weights in the order of the dataset, deleted rows too.",
            )
        weights = weights.astype(np.float64)
    wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(wrong):
        row = int(wrong[0])
        raise ConfigError("a weight is negative or not finite", row=row, weight=float(weights[row]), hint="Correct it.")
    return weights


def draws_of(request: Weighted, weights: Weights) -> int:
    """Return how many rows an epoch has, of rows with these weights.

    Raises:
        ConfigError: none has a weight; or there are not that many.
    """
    some = int(np.count_nonzero(weights))
    if not some:
        raise ConfigError(
            "no row has a weight above 0", rows=len(weights), hint="Choose others, or give other weights."
        )
    rows = len(weights) if request.rows is None else whole_number(request.rows, name="rows")
    if rows < 1:
        raise ConfigError("an epoch has no rows", rows=rows, hint="Give a number above 0.")
    if not request.replacement and (request.rows is None or rows > some):
        raise ConfigError(
            "without replacement an epoch is a part of the rows",
            rows=request.rows,
            rows_with_a_weight=some,
            hint="Say how many: `Weighted(..., replacement=False, rows=N)`.",
        )
    return rows


def strata_of(source: RowSource, request: Stratified) -> npt.NDArray[np.int64]:
    """Return the value that every row of `source` has in a column, as a number: one pass over the column.

    Raises:
        ConfigError: there is no such column, or it has too many values.
    """
    column = _column(source, request.by)
    try:
        encoded = column.cast(pa.string()) if pa.types.is_null(column.type) else column
        coded: Any = pc.dictionary_encode(encoded, null_encoding="encode").unify_dictionaries().combine_chunks()
    except (pa.ArrowException, NotImplementedError) as error:
        raise ConfigError(
            f"rows cannot be grouped by that column: {error}",
            column=request.by,
            type=str(column.type),
            hint="Name a column of plain values.",
        ) from None
    codes: npt.NDArray[np.int64] = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    values = int(codes.max(initial=0)) + 1
    if values > _MOST_STRATA:
        raise ConfigError(
            "the column has too many values", column=request.by, values=values, limit=_MOST_STRATA, hint="Name another."
        )
    return codes


def _column(source: RowSource, name: str) -> "pa.ChunkedArray":  # type: ignore[type-arg]
    if name not in source.schema.names:
        raise ConfigError("no such column", column=name, columns=source.schema.names, hint="Name one that there is.")
    kind = source.schema.field(name).type
    parts = [batch.column(0) for batch in source.iter_batches(columns=[name], deleted=True)]
    return pa.chunked_array(parts, type=kind)
