#!/usr/bin/env bash
# daft 0.7.26 with pyarrow 25.0.1 and numpy 2.4.6, 2026-11-28.
# `a // b` is documented as "floor divides", and does so for floats. For integer columns it cuts towards zero:
# -5 // 3 is -1, while -5.0 // 3 and -5 // 3.0 are -2.0, as -5 // 3 is in Python.
# int8, int32 and int64 alike, with no error and no warning.
# Why it matters: "position // bucket" and "second // day" put what lies on both sides of zero into one
# bucket of nearly double width, and the same pipeline buckets otherwise once a column is float.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq daft==0.7.26 pyarrow==25.0.1 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import daft
import pyarrow as pa
from daft import col

assert "Floor divides" in daft.Expression.__floordiv__.__doc__
numbers = list(range(-6, 7))
right = [x // 3 for x in numbers]
for name in ("int8", "int32", "int64", "float32", "float64"):
    kind = getattr(pa, name)()
    table = pa.table({"a": pa.array(numbers, kind), "b": pa.array([3] * len(numbers), kind)})
    seen = daft.from_arrow(table).select((col("a") // col("b")).alias("q")).to_pydict()["q"]
    print(f"{name}: {numbers} // 3 = {seen}, Python says {right}")
    if name.startswith("int"):
        assert seen == [int(x / 3) for x in numbers] != right, "integers are rounded down"
    else:
        assert seen == right, "floats are not rounded down"
mixed = daft.from_pydict({"a": [-5]}).select((col("a") // daft.lit(3.0)).alias("q"))
assert mixed.to_pydict()["q"] == [-2.0]
PY
"$tmp/v/bin/python" seen.py
