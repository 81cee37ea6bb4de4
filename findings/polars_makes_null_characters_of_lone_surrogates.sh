#!/usr/bin/env bash
# polars 2.1.0 and pandas 3.1.1 (beside orjson 3.13.0), 2026-11-28.
# A JSON text may hold an escaped surrogate without its partner (RFC 8259, section 8.2: the
# grammar allows it, what comes of it is up to the reader). orjson and pyarrow refuse such a
# line. Polars puts another character in its place, the null character U+0000, and pandas
# leaves it out; both say nothing, and the text that is left is another one.
# Why it matters: texts cut at a fixed number of UTF-16 units (posts, messages, captions) end
# in half an emoji; a corpus then has null characters that end a text in C, or words joined.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq polars==2.1.0 pandas==3.1.1 pyarrow==26.0.1 orjson==3.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import io

import orjson
import pandas
import polars
import pyarrow
import pyarrow.json

line = rb'{"text": "cut \ud83d here"}' + b"\n"
found = {
    "polars, eager": polars.read_ndjson(io.BytesIO(line))["text"][0],
    "pandas": pandas.read_json(io.BytesIO(line), lines=True)["text"][0],
}
with open("lines.jsonl", "wb") as file:
    file.write(line)
found["polars, lazy"] = polars.scan_ndjson("lines.jsonl").collect()["text"][0]
for name, read, error in (
    ("orjson", orjson.loads, orjson.JSONDecodeError),
    ("pyarrow", lambda raw: pyarrow.json.read_json(io.BytesIO(raw)), pyarrow.ArrowInvalid),
):
    try:
        read(line)
    except error:
        found[name] = "refused"
for name, text in found.items():
    print(f"{name}: {text!r}")
assert found["orjson"] == found["pyarrow"] == "refused"
assert found["polars, eager"] == found["polars, lazy"] == "cut \0 here"
assert found["pandas"] == "cut  here"
PY
"$tmp/v/bin/python" seen.py
