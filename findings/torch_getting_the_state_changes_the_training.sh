#!/usr/bin/env bash
# torch 2.13.0 (torch.distributed.checkpoint.state_dict), one process, CPU, 2026-11-28.
# get_state_dict(model, optimizer), called before the first step, takes a step of its own
# to create the optimizer's state. Weights stay, but the step count does not: Adam, AdamW
# and others then train to other weights, and Rprop, whose step sizes become those of a
# learning rate of zero, hardly trains at all.
# Why it matters: "save a checkpoint at step 0" and "ask for the state as the template of
# a load that finds no checkpoint" are usual; the run is then no longer the run without.
# Upstream: https://github.com/pytorch/pytorch/issues/164929
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict


def train(optimizer, ask):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    start = model.weight.detach().clone()
    opt = optimizer(model.parameters(), lr=0.01)
    x = torch.randn(8, 4)
    if ask:
        get_state_dict(model, opt)
        assert torch.equal(model.weight, start)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    return model.weight.detach() - start


for optimizer, changes in (("SGD", False), ("AdamW", True), ("NAdam", True), ("Rprop", True)):
    plain, asked = (train(getattr(torch.optim, optimizer), ask) for ask in (False, True))
    print(f"{optimizer:6} moved {plain.norm():.6f}, moved {asked.norm():.6f} when asked first")
    assert torch.equal(plain, asked) != changes, optimizer
assert asked.norm() < plain.norm() / 1000, "Rprop trains"
PY
"$tmp/v/bin/python" seen.py
