#!/usr/bin/env bash
# peft 0.21.2 with torch 2.13.0, transformers 5.24.0, CPU, 2026-11-28.
# OFT on a convolution wider than 1x1 rotates all overlapping windows of the input and folds
# them back in training, but merges as a rotation of the kernel: merge_and_unload() gives a
# layer with other outputs than the adapter that was trained, without a warning.
# Linear layers and 1x1 convolutions merge exactly.
# Why it matters: the patch embedding of every vision encoder is such a convolution; what
# was evaluated is not what is exported.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
from peft import OFTConfig, get_peft_model


def difference(layer, x):
    model = torch.nn.Sequential(layer)
    plain = model(x).detach()
    config = OFTConfig(target_modules=["0"], oft_block_size=4, r=0)
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.03)
    for _ in range(5):
        optimizer.zero_grad()
        (adapted(x) - 1).square().mean().backward()
        optimizer.step()
    adapted.eval()
    with torch.no_grad():
        trained = adapted(x)
        merged = adapted.merge_and_unload()(x)
    moved = (trained - plain).norm() / plain.norm()
    changed = (merged - trained).norm() / trained.norm()
    return moved.item(), changed.item()


torch.manual_seed(0)
image = torch.randn(2, 8, 8, 8)
for name, layer, x, same in (
    ("linear", torch.nn.Linear(8, 12), torch.randn(4, 8), True),
    ("conv 1x1", torch.nn.Conv2d(8, 12, 1), image, True),
    ("conv 2x2 patches", torch.nn.Conv2d(8, 12, 2, stride=2), image, False),
    ("conv 3x3", torch.nn.Conv2d(8, 12, 3, padding=1), image, False),
):
    moved, changed = difference(layer, x)
    print(f"{name:17} training moved the output by {moved:.1%}, merging by {changed:.3%}")
    assert moved > 0.01
    assert (changed < 1e-4) == same and (same or changed > 0.1), name
PY
"$tmp/v/bin/python" -W ignore seen.py
