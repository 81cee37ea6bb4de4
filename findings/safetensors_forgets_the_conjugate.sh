#!/usr/bin/env bash
# safetensors 0.8.0 with torch 2.13.0, CPU, 2026-11-28.
# tensor.conj() is contiguous, and torch keeps it as a flag on the same memory.
# safetensors.torch.save_file writes the memory and not the flag: the file holds the
# tensor before the conjugation. torch.save keeps it right.
# Why it matters: rotary frequencies, state-space and Fourier layers have complex buffers;
# an inverse rotation comes back as the rotation, with no error.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import io

import torch
from safetensors.torch import load_file, save_file

rotation = torch.polar(torch.ones(3), torch.tensor([0.0, 0.5, 1.0]))
inverse = rotation.conj()
assert inverse.is_contiguous()
save_file({"inverse": inverse}, "w.safetensors")
back = load_file("w.safetensors")["inverse"]
print("given ", inverse.tolist())
print("loaded", back.tolist())
buffer = io.BytesIO()
torch.save(inverse, buffer)
buffer.seek(0)
assert torch.equal(torch.load(buffer), inverse)
assert torch.equal(back, rotation) and not torch.equal(back, inverse), "stored right"
PY
"$tmp/v/bin/python" seen.py
