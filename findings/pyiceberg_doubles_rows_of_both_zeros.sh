#!/usr/bin/env bash
# pyiceberg 0.12.0 with pyarrow 26.0.1, 2026-11-28.
# An append to a table partitioned by a float column tells 0.0 from -0.0 when it lists
# the partitions, but not when it picks the rows of each: with both zeros in one append, every
# such row is written twice, once per partition. The count of the table says so too.
# Why it matters: rows come twice in training; -0.0 is what rounding or a negated
# score leaves behind, so nobody looks for it.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq 'pyiceberg[sql-sqlite,pyarrow]==0.12.0' pyarrow==26.0.1
cd "$tmp"
cat > seen.py <<'PY'
import os

import pyarrow as pa
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.transforms import IdentityTransform

catalog = SqlCatalog("c", uri="sqlite:///:memory:", warehouse=f"file://{os.getcwd()}/w")
catalog.create_namespace("n")


def stored(name, labels):
    rows = pa.table({"id": range(len(labels)), "label": labels})
    table = catalog.create_table(f"n.{name}", schema=rows.schema)
    with table.update_spec() as update:
        update.add_field("label", IdentityTransform(), "part")
    table.append(rows)
    ids = sorted(table.scan().to_arrow()["id"].to_pylist())
    print("appended", labels, "-> ids", ids, "count", table.scan().count())
    return ids


assert stored("plain", [0.0, 1.0, 0.0]) == [0, 1, 2]
assert stored("zeros", [0.0, 1.0, 0.0, round(-0.4, 0)]) == [0, 0, 1, 2, 2, 3, 3]
PY
"$tmp/v/bin/python" -W ignore seen.py
