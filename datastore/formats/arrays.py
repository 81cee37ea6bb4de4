"""Arrow arrays as NumPy arrays, without pandas.

`pa.Array.to_numpy` and `np.asarray` import pandas where it is installed, to ask whether the type is one of its own: 0.3 s
and 40 MB for whoever wants to open a dataset (pyarrow 26, pandas 3.1, 2026-11-25). Fixed-width numbers need no asking.
"""

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ["numbers_of"]


def numbers_of(array: "pa.Array[Any]") -> npt.NDArray[Any]:
    """Return a view of integers or floats; of truth values, which Arrow packs, a copy.

    Raises:
        ArrowInvalid: some are null.

    >>> numbers_of(pa.array([1, 2, 3], pa.int32())[1:])
    array([2, 3], dtype=int32)
    """
    if array.null_count:
        raise pa.ArrowInvalid(f"{array.null_count} of the values are null")
    if pa.types.is_boolean(array.type):
        return numbers_of(array.cast(pa.uint8())).astype(np.bool_)
    dtype = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.empty(0, dtype)
    raw = memoryview(cast("pa.Buffer", array.buffers()[1]))
    return np.frombuffer(raw, dtype, len(array), array.offset * dtype.itemsize)
