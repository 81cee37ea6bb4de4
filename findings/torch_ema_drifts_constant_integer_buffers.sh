#!/usr/bin/env bash
# torch 2.13.0 (torch.optim.swa_utils), CPU, 2026-11-28.
# AveragedModel(..., use_buffers=True) averages integer buffers through float32 and cuts
# the result. A buffer that never changes changes in the average: with decay 0.9 about a
# quarter of the numbers below 1,000 lose one, and with any decay numbers
# above 2**24 come out as their nearest float.
# Why it matters: index tables, hash multipliers and vocabulary maps are kept as buffers;
# the EMA model that is checkpointed and evaluated looks things up in the wrong place.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def averaged(decay):
    model = torch.nn.Linear(1, 1)
    model.register_buffer("index", torch.arange(1000))
    model.register_buffer("multiplier", torch.tensor([2**31 - 1, 2**40 + 12345]))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(10):
        ema.update_parameters(model)  # the model itself never changes
    lost = (ema.module.index != model.index).sum().item()
    print(f"decay {decay}: {lost} of 1000 indices changed, multipliers "
          f"{model.multiplier.tolist()} -> {ema.module.multiplier.tolist()}")
    return lost, ema.module.multiplier.tolist()


lost, multiplier = averaged(0.9)
assert lost > 100, "indices are kept"
lost, multiplier = averaged(0.999)
assert multiplier == [2**31, 2**40], "multipliers are kept"
PY
"$tmp/v/bin/python" seen.py
