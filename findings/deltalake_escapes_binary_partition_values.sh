#!/usr/bin/env bash
# deltalake 1.6.6 with pyarrow 26.0.1, 2026-11-28.
# The value of a binary partition column is written to the log as escaped text, as the
# Delta protocol says, and never unescaped: b"a" is read back as the six bytes \u0061, by the
# pyarrow reader and by SQL alike. The column's type stays binary and nothing fails.
# Why it matters: tables partitioned by a digest or a hash prefix come back with other
# keys, so joins, look-ups and deduplication against them silently find nothing.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq deltalake==1.6.6 pyarrow==26.0.1
cd "$tmp"
cat > seen.py <<'PY'
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

rows = pa.table({"prefix": pa.array([b"a", b"\x00\xff"], pa.binary()), "id": [0, 1]})
write_deltalake("plain", rows)
write_deltalake("parted", rows, partition_by=["prefix"])
given = sorted(rows["prefix"].to_pylist())
for name in ("plain", "parted"):
    got = DeltaTable(name).to_pyarrow_table()["prefix"]
    print("given", given, name, "table reads", sorted(got.to_pylist()), got.type)
    right = [rb"\u0000\u00FF", rb"\u0061"] if name == "parted" else given
    assert sorted(got.to_pylist()) == right
PY
"$tmp/v/bin/python" seen.py
