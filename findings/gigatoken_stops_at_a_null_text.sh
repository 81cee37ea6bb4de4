#!/usr/bin/env bash
# gigatoken 0.10.0 with tokenizers 0.23.3, 2026-11-28.
# JsonlFileSource ends a piece of a file at the first line whose text is null or missing:
# all documents after it are gone, without an error or a warning. Small files lose
# everything after the line; large ones lose what is left of one thread's piece, so the
# count differs between parallel=False and parallel=True, which are said to give the same.
# (A null in a Parquet column becomes an empty document, as is documented.)
# Why it matters: crawls and chat dumps have null texts; the corpus shrinks by an amount
# that depends on the number of threads, and nobody is told.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq gigatoken==0.10.0 tokenizers==0.23.3 pyarrow==26.0.1
cd "$tmp"
cat > seen.py <<'PY'
import json

import gigatoken
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
bpe = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = gigatoken.Tokenizer.from_json(bpe.to_str())


def count(rows, parallel=False):
    with open("rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return len(tokenizer.encode_files(gigatoken.JsonlFileSource(["rows.jsonl"]), parallel=parallel))


texts = [{"text": f"document {i}"} for i in range(1000)]
print("1000 rows                    ", count(texts), "documents")
for name, hole in (("null", {"text": None}), ("missing", {"title": "no text"})):
    rows = texts.copy()
    rows[10] = hole
    seen = count(rows)
    print(f"1000 rows, the 11th {name:7}  ", seen, "documents")
    assert seen == 10, seen
assert count(texts) == 1000
rows = [{"text": f"document {i}"} for i in range(200_000)]
rows[10] = {"text": None}
seen = [count(rows, parallel) for parallel in (False, True)]
print("200000 rows, the 11th null   ", seen[0], "documents, in parallel", seen[1])
assert seen[0] == 10 and seen[1] < 199_999, seen
pq.write_table(pa.table({"text": ["a", None, "b"]}), "rows.parquet")
assert len(tokenizer.encode_files(gigatoken.ParquetFileSource(["rows.parquet"]))) == 3
PY
"$tmp/v/bin/python" seen.py
