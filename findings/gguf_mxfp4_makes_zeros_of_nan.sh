#!/usr/bin/env bash
# gguf 0.19.0 (gguf.quants, MXFP4), numpy 2.4.6, 2026-11-28.
# One NaN or one infinity among 32 weights makes all 32 of them zero, in silence. Weights that are
# nothing but NaN come back as zeros, so a model that has diverged looks finite after quantization.
# Q8_0 and Q4_0 of the same package keep the block not finite, as one would expect.
# Why it matters: the usual last check ("are all weights of the exported file finite?") passes
# on a broken model, and 31 sound neighbours of one bad weight are lost with it.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq gguf==0.19.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import numpy as np
from gguf import GGMLQuantizationType, quants


def there_and_back(name, weights):
    kind = GGMLQuantizationType[name]
    return quants.dequantize(quants.quantize(weights, kind), kind)


weights = np.random.default_rng(0).standard_normal((1, 96)).astype("f4")
weights[0, 5] = np.nan
weights[0, 40] = np.inf
for name in ("Q8_0", "Q4_0", "MXFP4"):
    back = there_and_back(name, weights)
    blocks = [f"{np.isfinite(b).sum()} finite, {np.count_nonzero(b == 0)} zeros" for b in back.reshape(3, 32)]
    print(f"{name:6}", blocks)

back = there_and_back("MXFP4", weights)
assert np.isfinite(back).all()
assert not back[0, :64].any() and back[0, 64:].any()
assert not there_and_back("MXFP4", np.full((1, 32), np.nan, "f4")).any()
for name in ("Q8_0", "Q4_0"):
    assert not np.isfinite(there_and_back(name, weights)[0, :64]).all()
PY
"$tmp/v/bin/python" -W ignore seen.py
