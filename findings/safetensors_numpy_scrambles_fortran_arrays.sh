#!/usr/bin/env bash
# safetensors 0.8.0 with numpy 2.4.6, 2026-11-28.
# safetensors.numpy.save_file writes an array in Fortran order (contiguous, as
# scikit-learn or a transpose gives it) in its memory order, under the shape of the C
# order: the file loads without an error, with the right shape and dtype and the
# numbers in other places. 0.7.0 stored it right; the torch side refuses such tensors.
# Why it matters: weights exported through numpy (.T of a projection, PCA
# embeddings) are destroyed in silence, and a checksum of the file finds nothing.
# Upstream: https://github.com/safetensors/safetensors/issues/825
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import numpy as np
from safetensors.numpy import load_file, save_file

rows = np.arange(6, dtype=np.float32).reshape(2, 3)
fortran = np.asfortranarray(rows)
assert fortran.flags.f_contiguous and np.array_equal(rows, fortran)
save_file({"rows": rows, "fortran": fortran}, "w.safetensors")
back = load_file("w.safetensors")
print("given ", fortran.tolist())
print("loaded", back["fortran"].tolist())
assert np.array_equal(back["rows"], rows)
assert back["fortran"].shape == (2, 3) and back["fortran"].dtype == np.float32
assert back["fortran"].ravel().tolist() == fortran.ravel("K").tolist()
assert not np.array_equal(back["fortran"], fortran), "stored right again"
PY
"$tmp/v/bin/python" seen.py
