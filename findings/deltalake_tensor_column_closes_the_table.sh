#!/usr/bin/env bash
# deltalake 1.6.6 with pyarrow 26.0.1, numpy 2.4.6, 2026-11-28.
# A fixed-shape tensor column (also one of UUIDs) is written without complaint. Its storage
# becomes a plain list (or binary), but the field keeps the name of the extension type,
# which that storage no longer fits: the pyarrow and pandas readers then refuse the
# whole table, other columns included, and so it stays for whatever is appended.
# Why it matters: embeddings and image patches are kept as tensors; the write and every
# append succeed, and the error comes to whoever trains from the table.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq deltalake==1.6.6 pyarrow==26.0.1 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import numpy as np
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(8.0).reshape(2, 2, 2))
uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16, b"1" * 16], pa.binary(16)))
for name, column in (("tensor", tensors), ("uuid", uuids)):
    rows = pa.table({"id": [0, 1], name: column})
    write_deltalake(name, rows)
    write_deltalake(name, rows, mode="append")
    print(name, "written twice, version", DeltaTable(name).version())
    for columns in (None, ["id"]):
        try:
            DeltaTable(name).to_pyarrow_table(columns=columns)
        except (pa.ArrowInvalid, TypeError, ValueError) as error:
            print("  reading", columns or "all columns", "->", error)
        else:
            raise SystemExit(f"{name}: {columns} can be read")
PY
"$tmp/v/bin/python" seen.py
