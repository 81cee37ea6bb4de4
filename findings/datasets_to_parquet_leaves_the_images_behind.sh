#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 26.0.1 and Pillow 12.3.0, 2026-11-28.
# A dataset of an image folder, written by Dataset.to_parquet, holds the paths of its images on
# this machine and no bytes; the column still says that it is an Image. The same dataset written
# by save_to_disk holds the bytes. The file reads fine here, and nowhere else.
# Why it matters: a Parquet file is what people copy to a cluster or a bucket; it is a few
# hundred bytes a row, its schema is right, and the pictures stay on the laptop.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq datasets==5.2.0 pyarrow==26.0.1 pillow==12.3.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import os

import datasets
import pyarrow.parquet
from PIL import Image

datasets.disable_progress_bars()
for kind in ("cat", "dog"):
    os.makedirs(f"pictures/{kind}")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(f"pictures/{kind}/one.png")
data = datasets.load_dataset("imagefolder", data_dir="pictures", split="train", cache_dir="cache")
data.to_parquet("copy.parquet")
data.save_to_disk("copy")
parquet = pyarrow.parquet.read_table("copy.parquet")["image"].to_pylist()
saved = datasets.load_from_disk("copy").with_format("arrow")[:]["image"].to_pylist()
print("to_parquet:", [value["bytes"] for value in parquet], "and paths that are absolute:",
      [os.path.isabs(value["path"]) for value in parquet])
print("save_to_disk:", [len(value["bytes"]) for value in saved], "bytes")
assert all(value["bytes"] is None and os.path.isabs(value["path"]) for value in parquet)
assert all(value["bytes"].startswith(b"\x89PNG") for value in saved)
os.rename("pictures", "elsewhere")
again = datasets.load_dataset("parquet", data_files="copy.parquet", split="train", cache_dir="cache2")
try:
    again[0]
except FileNotFoundError as error:
    print("read where the folder is not:", type(error).__name__)
else:
    raise AssertionError("the image was found")
PY
"$tmp/v/bin/python" seen.py
