#!/usr/bin/env bash
# torch 2.13.0 (torch.distributed.pipelining, Schedule1F1B and ScheduleGPipe), gloo, two
# processes, CPU, 2026-11-28.
# Before the first step a PipelineStage finds out what its messages hold by running the real
# module and the real loss function once more, on memory that nobody has filled. The module is
# in training mode: a BatchNorm counts three batches where there were two, and its running mean
# on the second stage is made of that memory (seen: 1e27). Later steps forget it by a factor
# of 0.9 each, so evaluation is wrong for hundreds of them. Dropout draws numbers for it, and a
# loss function that adds up what it sees adds up one loss that was none.
# Why it matters: training goes on well, as BatchNorm trains on its batch; only evaluation,
# and what is exported, is wrong, on every rank but the first in a way that differs from run to
# run. The documentation speaks of metadata, not of a run of the module with side effects.
# A way out: give PipelineStage input_args and output_args, with requires_grad as in training
# (tried: then two batches are counted, and two losses).
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
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
part = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
calls = []


def loss_of(outputs, targets):
    calls.append(1)
    return (outputs - targets).square().mean()


schedule = Schedule1F1B(PipelineStage(part, rank, 2, torch.device("cpu")), 2, loss_fn=loss_of)
x = torch.randn(8, 4)
if rank == 0:
    schedule.step(x)
else:
    schedule.step(target=torch.zeros(8, 4))
norm = part[1]
counted = torch.tensor([norm.num_batches_tracked.item(), len(calls)])
every = [torch.zeros(2, dtype=torch.int64) for _ in range(2)]
dist.all_gather(every, counted)
if rank == 0:
    print("two micro-batches; batches that BatchNorm counted, and calls of the loss, by rank:", [one.tolist() for one in every])
else:
    print("running mean of the second stage:", norm.running_mean.tolist())
dist.destroy_process_group()
sys.exit([one.tolist() for one in every] != [[3, 0], [3, 3]])
PY
"$tmp/v/bin/torchrun" --standalone --nproc-per-node 2 seen.py 2>"$tmp/log" || { tail -5 "$tmp/log"; echo "torch behaves otherwise now"; exit 1; }
