#!/usr/bin/env bash
# torchao 0.18.0 (Float8WeightOnlyConfig) with torch 2.13.0, CPU, 2026-11-28.
# One output row of a layer that is all zeros becomes NaN when quantize_() makes float8 weights of it: the
# scale is the row's largest value divided by 448, here zero, and 0 / 0 is stored. The
# layer then gives NaN for that output, whatever the input, with no error when it is quantized or saved.
# The int8 weights of the same package keep the row zero.
# Why it matters: structured pruning, padded heads and vocabularies, and zero-initialized output
# layers have such rows; one of them is enough to make NaN of the whole model.
# Upstream: https://github.com/pytorch/ao/issues/4713 (open: found for tensors that are zero throughout).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torchao==0.18.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

for dtype in (torch.float32, torch.bfloat16):
    for config in (Int8WeightOnlyConfig(), Float8WeightOnlyConfig()):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 8, dtype=dtype), torch.nn.Linear(8, 4, dtype=dtype))
        with torch.no_grad():
            model[0].weight[3] = 0  # a pruned neuron
            model[0].bias[3] = 0
        rows = torch.randn(5, 64, dtype=dtype)
        before = model(rows)
        quantize_(model, config)
        hidden, after = model[0](rows), model(rows)
        off = (after - before).abs().max().item()
        print(f"{type(config).__name__} {dtype}: outputs {after.isnan().sum().item()} of {after.numel()} "
              f"NaN, in the layer itself {hidden.isnan().any(0).tolist()}, off by {off:.3f}")
        if isinstance(config, Float8WeightOnlyConfig):
            assert hidden.isnan().any(0).tolist() == [i == 3 for i in range(8)], "the row stays zero"
            assert after.isnan().all(), "the model's outputs are finite"
        else:
            assert off < 0.05, "int8 is wrong too"
PY
"$tmp/v/bin/python" seen.py 2>/dev/null
