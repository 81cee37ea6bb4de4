#!/usr/bin/env bash
# blosc2 4.14.1 with numexpr 2.14.2 and numpy 2.4.6, 2026-11-28.
# a % n and blosc2.remainder(a, n) on arrays give a negative remainder for a negative number, as C
# does; the documentation of both says "equivalent to the Python modulus operator" and points to
# np.remainder. a // n rounds down as Python does, so (a // n) * n + a % n is no longer a.
# Integers and floats alike; numbers that are not negative are right.
# Why it matters: "position % period", "bucket = hash % 16" and "(index - shift) % length" fall out
# of range in silence: as an index, -2 takes the row before the last.
# Upstream: akin to https://github.com/pydata/numexpr/issues/365 (closed: integers there).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq blosc2==4.14.1 numexpr==2.14.2 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import blosc2
import numpy as np


def computed(expression):
    return expression.compute()[...]


assert "equivalent to the Python modulus operator" in blosc2.remainder.__doc__
for dtype in (np.int8, np.int32, np.int64, np.float32, np.float64):
    numbers = np.arange(-5, 5).astype(dtype)
    array = blosc2.asarray(numbers)
    remainder, quotient = computed(array % 3), computed(array // 3)
    print(f"{numbers.dtype}: {numbers.tolist()} % 3 = {remainder.tolist()}, "
          f"Python says {[x % 3 for x in numbers.tolist()]}")
    named = computed(blosc2.remainder(array, 3))
    text = computed(blosc2.lazyexpr("a % 3", {"a": array}))
    assert np.array_equal(remainder, named) and np.array_equal(remainder, text)
    assert np.array_equal(remainder, np.fmod(numbers, 3)), "it is not that of C"
    assert (remainder != numbers % 3).any(), "it is that of Python"
    assert np.array_equal(quotient, numbers // 3), "// does not round down"
    assert (quotient * 3 + remainder != numbers).any(), "they fit together"
PY
"$tmp/v/bin/python" seen.py
