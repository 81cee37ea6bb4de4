#!/usr/bin/env bash
# gguf 0.19.0 (gguf.quants), numpy 2.4.6, 2026-11-28.
# Weights near 1e-5 lose more in 8 bits (Q8_0) than in 4 (Q4_0), and near 1e-6 99 % of them become
# zero, while Q4_0 keeps them within 11 %. The scale of a block is a float16: its largest weight
# divided by 127 in Q8_0, by 8 in Q4_0, so the finer format runs into float16's smallest number
# sixteen times earlier. MXFP4, whose scale is a power of two, keeps its 11 % at any size.
# No error and no warning.
# Why it matters: whoever falls back to 8 bits because a layer is "sensitive" may delete it:
# adapters just after their start, merged low-rank updates, layers scaled down on purpose.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq gguf==0.19.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import numpy as np
from gguf import GGMLQuantizationType, quants

normal = np.random.default_rng(0).standard_normal((1, 4096)).astype("f4")


def error(name, scale):
    """The root mean square of what is lost, beside that of the weights."""
    kind, weights = GGMLQuantizationType[name], normal * np.float32(scale)
    back = quants.dequantize(quants.quantize(weights, kind), kind)
    return float(np.sqrt(np.square(weights - back).mean() / np.square(weights).mean())), back


for scale in (1e-2, 1e-4, 1e-5, 1e-6):
    print(f"weights near {scale:g}:", {name: round(error(name, scale)[0], 3) for name in ("Q8_0", "Q5_0", "Q4_0", "MXFP4")})

assert error("Q8_0", 1e-2)[0] < error("Q4_0", 1e-2)[0] / 10
assert error("Q8_0", 1e-5)[0] > error("Q4_0", 1e-5)[0] > error("Q5_0", 1e-5)[0]
lost, back = error("Q8_0", 1e-6)
assert lost > 0.99 and np.count_nonzero(back) < 41, np.count_nonzero(back)
assert error("Q4_0", 1e-6)[0] < 0.12
PY
"$tmp/v/bin/python" -W ignore seen.py
