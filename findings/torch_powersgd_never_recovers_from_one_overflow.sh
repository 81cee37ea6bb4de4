#!/usr/bin/env bash
# torch 2.13.0 (DistributedDataParallel with powerSGD_hook), numpy 2.4.6, gloo, two processes, CPU,
# 2026-11-28.
# One step whose gradient is not finite makes the gradients of every later step NaN, although that
# step is skipped and the weights stay sound. The hook keeps what a message leaves out, and the thin
# matrix that the next step begins with: both take in the NaN of the bad step, and hand it on for ever.
# Why it matters: a step that overflows is normal. torch.amp.GradScaler provokes it on purpose, skips
# the step and halves the scale; with PowerSGD it then skips every step to come, halving the scale
# towards 0, and the weights never move again. The same holds for a program that skips a bad batch.
# fp16_compress_hook, which keeps nothing, recovers. The documentation of the hook does not say so.
# A way out: after a bad step, on all ranks, clear state.error_dict, state.p_memory_dict and
# state.q_memory_dict (tried: the next gradients are finite).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()


def finite_by_step(hook, state, clear=lambda: None):
    """Eight steps of SGD; the batch of step 4 is bad on rank 1, and a step with a bad gradient is skipped."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    model.register_comm_hook(state, hook)
    found = []
    for step in range(8):
        model.zero_grad()
        batch = torch.randn(4, 64)
        if step == 4 and rank == 1:
            batch[0, 0] = float("inf")
        model(batch).square().mean().backward()
        grads = [p.grad for p in model.parameters()]
        good = all(bool(g.isfinite().all()) for g in grads)
        found.append(good)
        if good:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
        else:
            clear()
    weights = all(bool(p.isfinite().all()) for p in model.parameters())
    return found, weights


def power(**more):
    return PowerSGDState(dist.group.WORLD, matrix_approximation_rank=1, start_powerSGD_iter=2, min_compression_rate=1, **more)


once = [True] * 4 + [False] + [True] * 3
ever = [True] * 4 + [False] * 4
plain = finite_by_step(fp16_compress_hook, dist.group.WORLD)
kept = finite_by_step(powerSGD_hook, power())
state = power()
cleared = finite_by_step(
    powerSGD_hook, state, lambda: [one.clear() for one in (state.error_dict, state.p_memory_dict, state.q_memory_dict)]
)
if rank == 0:
    for name, (steps, weights) in (("fp16", plain), ("PowerSGD", kept), ("PowerSGD, cleared by hand", cleared)):
        print(f"{name}: gradients finite by step {steps}, weights finite: {weights}")
dist.destroy_process_group()
sys.exit(not (plain[0] == once and kept == (ever, True) and cleared[0] == once))
PY
"$tmp/v/bin/torchrun" --standalone --nproc-per-node 2 seen.py 2>"$tmp/log" || { tail -5 "$tmp/log"; echo "torch behaves otherwise now"; exit 1; }
