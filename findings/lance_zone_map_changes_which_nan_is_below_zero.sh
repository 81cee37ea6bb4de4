#!/usr/bin/env bash
# pylance 14.0.2, numpy 2.4.6, pyarrow 26.0.1, x86-64, 2026-11-28.
# `value < 0` finds a NaN that came out of a division (0.0 / 0.0 sets the sign bit on this hardware)
# and not the one of float("nan"). Floats are compared in IEEE's total order, where one NaN stands
# below minus infinity and the other above infinity. With a zone-map index, the same question gives
# a third answer: a zone's smallest value passes over NaN, so of two such rows one is gone.
# Why it matters: rows picked by a score (`loss < 0.5`, `quality > 0.9`) hold undefined scores of one
# kind, and a delete by the same words deletes them; an index that should only be faster changes
# which.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq pylance==14.0.2 numpy==2.4.6 pyarrow==26.0.1
cd "$tmp"
cat > seen.py <<'PY'
import lance
import numpy as np
import pyarrow as pa

with np.errstate(invalid="ignore"):
    divided = np.float64(0.0) / np.float64(0.0)
values = [-1.0, divided, 1.0, float("nan"), 2.0, divided, 3.0, 4.0]
table = pa.table({"id": range(8), "value": values})


def ask(dataset, words):
    return dataset.to_table(filter=words, columns=["id"])["id"].to_pylist()


print("values  ", [f"{'-' if np.signbit(v) else ''}{abs(v)}" for v in values])
plain = lance.write_dataset(table, "plain", max_rows_per_file=4)
lance.write_dataset(table, "indexed", max_rows_per_file=4).create_scalar_index("value", "ZONEMAP")
indexed = lance.dataset("indexed")
answers = {words: (ask(plain, words), ask(indexed, words)) for words in ("value < 0", "value > 2.5")}
for words, (without, with_index) in answers.items():
    print(f"{words:12} rows {without}, with a zone map {with_index}")
assert answers["value < 0"] == ([0, 1, 5], [0, 1]), answers
assert answers["value > 2.5"] == ([3, 6, 7], [3, 6, 7]), answers
PY
"$tmp/v/bin/python" -W ignore seen.py 2>/dev/null
