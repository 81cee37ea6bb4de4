#!/usr/bin/env bash
# torch 2.13.0 (torch.distributed.checkpoint), one process, CPU, 2026-11-29.
# A quantized tensor (torch.quantize_per_tensor: quint8, scale 0.1) is saved, and loaded into
# one of another scale, as a model has it that was quantized a moment ago from other weights.
# The integers come back, the scale does not: 1, 2, 3 are read as 5, 10, 15, without an
# error. `Tensor.copy_` and `load_state_dict` take the scale along: DCP copies into
# `tensor.detach()`, which shares the integers with the original and has a scale of its own.
# Why it matters: a quantized model that is restored by DCP gives other outputs
# than the one that was saved, and its state_dict has the right dtypes and shapes.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import warnings

import torch
import torch.distributed.checkpoint as dcp

warnings.filterwarnings("ignore")


def quantized(values, scale):
    return torch.quantize_per_tensor(torch.tensor(values), scale, 0, torch.quint8)


saved = quantized([1.0, 2.0, 3.0], 0.1)
dcp.save({"w": saved}, checkpoint_id="run", no_dist=True)
by_dcp, by_copy = quantized([0.0] * 3, 0.5), quantized([0.0] * 3, 0.5)
dcp.load({"w": by_dcp}, checkpoint_id="run", no_dist=True)
by_copy.copy_(saved)
print("saved  ", saved.dequantize().tolist(), "scale", saved.q_scale())
print("copy_  ", by_copy.dequantize().tolist(), "scale", by_copy.q_scale())
print("by DCP ", by_dcp.dequantize().tolist(), "scale", by_dcp.q_scale())
assert torch.equal(by_copy.dequantize(), saved.dequantize())
assert by_dcp.dequantize().tolist() == [5.0, 10.0, 15.0], "DCP takes the scale along"
PY
"$tmp/v/bin/python" seen.py
