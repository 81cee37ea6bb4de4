"""Arrow numbers as NumPy numbers, and that opening a dataset does not bring pandas."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.formats.arrow import numbers_of
from datastore.testing.examples import make_dataset

TYPES = [pa.int8(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_()]


@given(kind=st.sampled_from(TYPES), values=st.lists(st.integers(0, 100)), data=st.data())
def test_any_slice_is_what_pyarrow_makes_of_it(kind: pa.DataType, values: list[int], data: st.DataObject) -> None:
    array = pa.array([value % 2 == 0 for value in values] if kind == pa.bool_() else values, kind)
    start = data.draw(st.integers(0, len(values)))
    part = array.slice(start, data.draw(st.integers(0, len(values))))
    found, expected = numbers_of(part), part.to_numpy(zero_copy_only=False)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_nulls_are_refused() -> None:
    with pytest.raises(pa.ArrowInvalid, match="1 of the values are null"):
        numbers_of(pa.array([1, None]))


def test_opening_and_reading_a_dataset_does_not_bring_pandas(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    make_dataset(tmp_path, [[3, 4], [5]])
    program = f"""
import sys
from datastore.dataset.snapshot import open_dataset  # noqa: E402
dataset = open_dataset({str(tmp_path)!r})
segments = dataset.segments
_ = segments.tokens, segments.uid64, segments.values_start, segments.itemsize, dataset.token_shard(0), dataset.deletions
assert "pandas" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
