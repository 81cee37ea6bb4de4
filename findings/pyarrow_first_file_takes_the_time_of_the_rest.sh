#!/usr/bin/env bash
# pyarrow 26.0.1 (pyarrow.dataset), datasets 5.2.0 (load_dataset and streaming), 2026-11-28.
# The first Parquet file of a folder decides the types, and later files are cast to them. The cast is a
# safe one, and refuses 7.5 as an integer or -1 as uint8. But it lets pass, with no error: a timestamp as
# a date, which loses its time of day; a double as a float, which is rounded; a number as a bool.
# Why it matters: jobs write a file an hour, and one of them has only midnights, or whole small
# numbers; then the events of all other files are at midnight too, and ids kept as doubles are other ids.
# In another order of the same files all is right. Polars 2.1.0 refuses such a folder.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq pyarrow==26.0.1 datasets==5.2.0 polars==2.1.0
cd "$tmp"
export HF_HOME="$tmp/hf" HF_HUB_OFFLINE=1
cat > seen.py <<'PY'
import datetime as dt
import tempfile

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

datasets.disable_progress_bars()
noon = dt.datetime(2026, 1, 2, 12, 30)


def read(name, first, later):
    files = [f"{name}-0.parquet", f"{name}-1.parquet"]
    for file, column in zip(files, (first, later)):
        pq.write_table(pa.table({"x": column}), file)
    load = lambda **k: datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=tempfile.mkdtemp(), **k)
    found = [pads.dataset(files).to_table()["x"].to_pylist(), load()["x"][:], [row["x"] for row in load(streaming=True)]]
    try:
        pl.read_parquet(files)
        raise SystemExit("Polars reads it now")
    except pl.exceptions.SchemaError:
        pass
    print(f"{name:7}", later.to_pylist(), "is read as", [rows[1:] for rows in found])
    assert all(rows == found[0] for rows in found), found
    return found[0][1]


date = pa.array([dt.date(2026, 1, 1)])
assert read("time", date, pa.array([noon], pa.timestamp("us"))) == dt.date(2026, 1, 2), "the time is kept or refused"
single = pa.array([1.0], pa.float32())
assert read("double", single, pa.array([16777217.0])) == 16777216.0, "the double is kept or refused"
assert read("bool", pa.array([True]), pa.array([7])) is True, "the number is kept or refused"
try:
    read("whole", pa.array([1]), pa.array([7.5]))
    raise SystemExit("7.5 passes as an integer now")
except pa.ArrowInvalid as error:
    print("whereas:", error)
PY
"$tmp/v/bin/python" seen.py
