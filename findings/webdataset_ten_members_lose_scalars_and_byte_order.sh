#!/usr/bin/env bash
# webdataset 1.0.2 (webdataset.tenbin: the ".ten" members), numpy 2.4.6, 2026-11-28.
# TarWriter takes an array without dimensions (a loss, a label, a score: np.array(3.5)) under ".ten",
# and the reader fails on it: the sample can never be decoded again. An array in big-endian order, as
# IDX, FITS or netCDF files give it, is written with its bytes as they are and read as little-endian:
# 1 comes back as 16,777,216, with the right shape and no error. The ".npy" members of the same
# library keep both.
# Why it matters: ".ten" is the library's own format for arrays, and TarWriter encodes it by itself;
# a shard is written once and read much later.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq webdataset==1.0.2 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import numpy as np
import webdataset as wds


def there_and_back(ending, value):
    with wds.TarWriter("one.tar") as tar:
        tar.write({"__key__": "0", ending: value})
    sample = next(iter(wds.WebDataset("one.tar", shardshuffle=False).decode()))
    return sample[ending]


big = np.array([0, 1, 2], dtype=">i4")
scalar = np.array(3.5)
print("npy", there_and_back("npy", big), there_and_back("npy", scalar))
assert there_and_back("npy", big).tolist() == [0, 1, 2] and there_and_back("npy", scalar) == 3.5

(found,) = there_and_back("ten", big)
print("ten", found, found.dtype, "instead of", big)
assert found.tolist() == [0, 2**24, 2**25], found
try:
    there_and_back("ten", scalar)
except Exception as error:
    print("ten", "array(3.5) was written; reading it:", type(error).__name__)
else:
    raise AssertionError("it can be read")
PY
"$tmp/v/bin/python" -W ignore seen.py
