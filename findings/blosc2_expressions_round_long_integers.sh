#!/usr/bin/env bash
# blosc2 4.14.1 with numexpr 2.14.2 and numpy 2.4.6, x86-64, 2026-11-28.
# Lazy expressions on int64 and uint64 arrays seem to compute abs(), %, <<, >> and == in float64 and hand
# out the integer type all the same: above 2**53 the numbers are others, and an id compares
# equal to its neighbour and not to itself. uint64 is divided (//) wrong above 2**63 too.
# + and * are exact, and so is everything below 2**53. There is no error and no warning.
# Why it matters: content hashes and document ids are 64 bits wide: a filter by id finds the wrong
# document or none, and `hash % shards` or `hash >> 60` sends rows to the wrong shards.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq blosc2==4.14.1 numexpr==2.14.2 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import blosc2
import numpy as np

SMALL = [7, 2**52 + 1]
LARGE = {np.int64: [2**53 + 1, 2**62 + 1, 2**63 - 1],
         np.uint64: [2**53 + 1, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1]}


def found(dtype, text):
    numbers = np.array(SMALL + LARGE[dtype], dtype)
    seen = blosc2.lazyexpr(text, {"i": blosc2.asarray(numbers)}).compute()[...]
    with np.errstate(over="ignore"):
        right = eval(text, {"i": numbers, "abs": np.abs})
    assert seen.dtype == right.dtype, (dtype, text)
    wrong = [(int(x), y.item(), z.item()) for x, y, z in zip(numbers, seen, right, strict=True)
             if y != z]
    print(f"{dtype.__name__} {text}: {len(wrong)} of {len(numbers)} wrong",
          *(f"; i={x} gives {y} instead of {z}" for x, y, z in wrong[:2]))
    assert all(x > 2**53 for x, _, _ in wrong), "small numbers are wrong too"
    return wrong


for dtype in (np.int64, np.uint64):
    for text in ("i + 1", "i * 3"):
        assert not found(dtype, text), f"{text} is wrong too"
    for text in ("i % 3", "abs(i)", "i << 1", "i >> 1"):
        assert found(dtype, text), f"{text} is right"
assert found(np.int64, "i == 9007199254740993") == [(2**53 + 1, False, True)]
assert found(np.uint64, "i == 9223372036854775813") == [(2**63, True, False), (2**63 + 5, False, True)]
assert not found(np.int64, "i // 3") and found(np.uint64, "i // 3")
PY
"$tmp/v/bin/python" seen.py
