#!/usr/bin/env bash
# heavyball 3.2.1 with torch 2.13.0, CPU, 2026-11-28.
# storage_dtype="float32" (the default) keeps the moments of bfloat16 weights in float32. state_dict()
# holds them so, and load_state_dict() makes bfloat16 of them: the library builds on torch's
# Optimizer, which casts state to the dtype of its parameter, and does not undo that. They stay
# bfloat16 for the rest of the run, so the resumed run has other weights after its
# first step, with all random states the same, and another optimizer in all later ones.
# float32 weights resume exactly, so the usual test of a resume passes.
# Why it matters: this is the library's default for bfloat16 weights, and a resume quietly takes 16 of
# 24 bits off all moments, from then on.
# Upstream: none known here; akin to https://github.com/pytorch/torchtitan/pull/4615 (merged: the reverse
# in torchtitan).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq heavyball==3.2.1 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import copy

import heavyball
import torch

heavyball.utils.compile_mode = None  # the same without compiling


def model(dtype):
    torch.manual_seed(0)
    return torch.nn.Linear(64, 64, dtype=dtype)


def step(net, optimizer, number):
    torch.manual_seed(number)  # data and the rounding's random numbers
    rows = torch.randn(32, 64).to(net.weight.dtype)
    net(rows).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def dtypes(optimizer):
    moments = set()
    for per_parameter in optimizer.state.values():
        for state in per_parameter.values():
            moments |= {value.dtype for name, value in state.items() if "exp_avg" in name}
    return moments


def differing(make, dtype, cut, steps=40):
    net = model(dtype)
    optimizer = make(net.parameters(), lr=0.01)
    for number in range(cut):
        step(net, optimizer, number)
    before = dtypes(optimizer)
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other = model(dtype)
    resumed = make(other.parameters(), lr=0.01)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    counts = []
    for number in range(cut, cut + steps):
        step(net, optimizer, number)
        step(other, resumed, number)
        counts.append((net.weight != other.weight).sum().item())
    print(f"{make.__name__} {dtype}, saved after step {cut}: moments {before} -> {dtypes(resumed)}, "
          f"{counts[0]} of 4096 weights differ after one step, {counts[-1]} after {steps}")
    return before, dtypes(resumed), counts[0]


for make in (heavyball.AdamW, heavyball.ADOPT, heavyball.LaProp):
    for cut in (1, 7, 20):
        assert differing(make, torch.float32, cut)[2] == 0, "float32 does not resume"
        before, after, count = differing(make, torch.bfloat16, cut)
        assert before == {torch.float32}, "the moments are not float32"
        assert after == {torch.bfloat16}, "the moments stay float32"
        assert count > 0, "it resumes exactly"
PY
"$tmp/v/bin/python" seen.py
