"""Python values become Arrow columns without a loss, or are refused."""

import datetime as dt
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import datastore as ds
from datastore.errors import ConfigError
from datastore.formats.rows import RowError, rows_to_table

INT, DOUBLE = pa.int64(), pa.float64()


def stored(value: Any, kind: pa.DataType) -> Any:
    return rows_to_table([{"a": value}], pa.schema([("a", kind)])).to_pylist()[0]["a"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1.5, INT),
        (-0.5, pa.int8()),
        (Decimal("1.5"), INT),
        (True, DOUBLE),
        (np.bool_(True), INT),
        (np.float64(1.5), INT),
        (1e300, pa.float32()),
        (2**53 + 1, DOUBLE),
        (2**64, INT),
        (1.5, pa.date32()),
        ([1.5], pa.list_(INT)),
        (np.array([1.5]), pa.list_(INT)),
        ([[True]], pa.list_(pa.list_(DOUBLE))),
        ({"x": 1.5}, pa.struct([("x", INT)])),
        ({"x": 1, "y": 2}, pa.struct([("x", INT)])),
        ("1", INT),
    ],
)
def test_what_arrow_would_change_is_refused_with_its_row(value: Any, kind: pa.DataType) -> None:
    with pytest.raises(RowError, match="column a") as found:
        rows_to_table([{"a": None}, {"a": value}], pa.schema([("a", kind)]))
    assert found.value.row == 1


@pytest.mark.parametrize(
    ("value", "kind", "same"),
    [
        (1.0, INT, 1),
        (np.int64(3), DOUBLE, 3.0),
        (np.float32(0.5), DOUBLE, 0.5),
        (np.int8(3), INT, 3),
        (np.bool_(True), pa.bool_(), True),
        ([np.int64(1), 2, None], pa.list_(INT), [1, 2, None]),
        (np.array([1, 2]), pa.list_(DOUBLE), [1.0, 2.0]),
        ({"x": np.int8(1)}, pa.struct([("x", INT), ("y", INT)]), {"x": 1, "y": None}),
        (math.inf, pa.float32(), math.inf),
        (dt.date(2026, 1, 2), pa.date32(), dt.date(2026, 1, 2)),
    ],
)
def test_what_loses_nothing_is_taken(value: Any, kind: pa.DataType, same: Any) -> None:
    assert stored(value, kind) == same


@given(st.one_of(st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)), st.sampled_from([INT, DOUBLE]))
def test_a_number_is_stored_as_it_is_or_not_at_all(value: float, kind: pa.DataType) -> None:
    try:
        found = stored(value, kind)
    except RowError:
        return
    assert found == value


def test_a_writer_of_records_refuses_half_a_number(tmp_path: Path) -> None:
    schema = pa.schema([("a", INT)])
    with (
        pytest.raises(ConfigError, match=r"column a: 1.5 is no whole number"),
        ds.record_writer(tmp_path / "data", schema=schema) as rows,
    ):
        rows.write({"a": 1.5})
