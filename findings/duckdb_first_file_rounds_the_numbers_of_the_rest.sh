#!/usr/bin/env bash
# DuckDB 2.0.1, 2026-11-28.
# read_parquet of several files takes the types of the first one and casts what the others have. Where a
# number does not fit it says so (2**40 as INTEGER). Where it fits after rounding it is rounded: 7.5 becomes
# 8, 0.4 becomes 0, the decimal 1.25 becomes 1.3, 2**53 + 1 becomes 2**53; a timestamp becomes a date, and 7 true.
# Why it matters: a file in which all prices or labels are whole numbers, and which comes first by name,
# changes the sums of all the others, with no error. With the files in another order, or with
# union_by_name=true, the same query is right (but for 2**53 + 1, which is lost there too).
# Upstream: that the first file decides is documented and was asked for (duckdb #2877, #3238); of rounding no issue is known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq duckdb==2.0.1
cd "$tmp"
cat > seen.py <<'PY'
import datetime as dt
from decimal import Decimal

import duckdb


def read(first, later):
    duckdb.sql(f"COPY (SELECT {first} AS x) TO '0.parquet'")
    duckdb.sql(f"COPY (SELECT {later} AS x) TO '1.parquet'")
    rows = [duckdb.sql(f"SELECT x FROM read_parquet(['0.parquet', '1.parquet']{how})").fetchall() for how in ("", ", union_by_name=true")]
    print(f"{first:20} then {later:38} reads", rows[0][1][0], "; by name", rows[1][1][0])
    return rows[0][1][0], rows[1][1][0]


assert read("1::INTEGER", "7.5::DOUBLE") == (8, 7.5)
assert read("1::INTEGER", "0.4::DOUBLE") == (0, 0.4)
assert read("1.0::DECIMAL(5,1)", "1.25::DECIMAL(5,2)") == (Decimal("1.3"), Decimal("1.25"))
assert read("1::DOUBLE", "9007199254740993::BIGINT") == (2.0**53, 2.0**53)
day, moment = read("DATE '2026-01-01'", "TIMESTAMP '2026-01-02 12:30:00'")
assert (day, moment) == (dt.date(2026, 1, 2), dt.datetime(2026, 1, 2, 12, 30))
assert read("true", "7::BIGINT") == (True, 7)
try:
    read("1::INTEGER", "1099511627776::BIGINT")
    raise SystemExit("2**40 passes as an INTEGER now")
except duckdb.ConversionException:
    print("whereas 2**40 is refused")
PY
"$tmp/v/bin/python" seen.py
