#!/usr/bin/env bash
# fsspec 2026.9.0, pandas 3.1.1 and datasets 5.2.0 (all by Python's lzma module, 3.11), 2026-11-28.
# An .xz file may have Stream Padding, zero bytes in multiples of four, between its streams
# (section 2.2 of the format). The xz program reads all of such a file; the three libraries
# read it up to the padding and report success, so every row behind it is gone without a word.
# Two streams with nothing between them are read whole by all.
# Why it matters: shards of corpora are put together by appending compressed pieces, and
# padding comes from writers that align them to blocks; no count in the file tells of the loss.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq fsspec==2026.9.0 pandas==3.1.1 datasets==5.2.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import json
import lzma
import shutil
import subprocess

import datasets
import fsspec
import pandas

datasets.disable_progress_bars()
pieces = [lzma.compress(b"".join(b'{"text": "%d"}\n' % n for n in range(start, start + 500)))
          for start in (0, 500)]
readers = {
    "lzma": lambda path: lzma.open(path).read().count(b"\n"),
    "fsspec": lambda path: fsspec.open(path, compression="infer").open().read().count(b"\n"),
    "pandas": lambda path: len(pandas.read_json(path, lines=True)),
    "datasets": lambda path: datasets.load_dataset(
        "json", data_files=path, split="train", cache_dir=f"cache-{path}").num_rows,
}
if shutil.which("xz"):
    readers["xz"] = lambda path: subprocess.run(
        ["xz", "-dc", path], check=True, capture_output=True).stdout.count(b"\n")
seen = {}
for name, between in (("touching", b""), ("padded", b"\0" * 8)):
    path = f"{name}.jsonl.xz"
    with open(path, "wb") as file:
        file.write(between.join(pieces))
    seen[name] = {reader: read(path) for reader, read in readers.items()}
    print(f"{name}, 1000 lines: " + json.dumps(seen[name]))
assert set(seen["touching"].values()) == {1000}
assert seen["padded"].pop("xz", 1000) == 1000
assert set(seen["padded"].values()) == {500}
PY
"$tmp/v/bin/python" seen.py
