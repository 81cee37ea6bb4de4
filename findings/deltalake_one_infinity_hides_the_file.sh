#!/usr/bin/env bash
# deltalake 1.6.6 with pyarrow 26.0.1, 2026-11-28.
# An infinite value gives the file a minimum or maximum of null in the log. The pyarrow
# dataset of the table then compares with that null and skips the file: a filter on the
# column loses all its rows, the finite ones too. The SQL of the same package finds them.
# Why it matters: scores, losses and perplexities overflow to inf. One such row in a
# file and "score >= 0.5" silently trains on less data, shard by shard.
# Upstream: akin to https://github.com/delta-io/delta-rs/issues/1411 (closed: inf in the log
# could not be read at all then).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq deltalake==1.6.6 pyarrow==26.0.1
cd "$tmp"
cat > seen.py <<'PY'
import math

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, write_deltalake

for scores in ([0.1, 0.6, 0.7], [0.3, 0.8, math.inf], [-math.inf, 0.2, 0.9]):
    write_deltalake("t", pa.table({"score": scores}), mode="append")
table = DeltaTable("t")
whole = table.to_pyarrow_table()
print("stored       ", sorted(whole["score"].to_pylist()))
dataset = table.to_pyarrow_dataset()
wrong = {}
for text, keep in ((">= 0.5", pc.field("score") >= 0.5), ("< 0.5", pc.field("score") < 0.5)):
    seen = sorted(dataset.to_table(filter=keep)["score"].to_pylist())
    right = sorted(whole.filter(keep)["score"].to_pylist())
    print(f"score {text:6}", seen, "of", right)
    wrong[text] = (seen, right)
assert wrong[">= 0.5"] == ([0.6, 0.7], [0.6, 0.7, 0.8, 0.9, math.inf])
assert wrong["< 0.5"] == ([0.1], [-math.inf, 0.1, 0.2, 0.3])
PY
"$tmp/v/bin/python" seen.py
