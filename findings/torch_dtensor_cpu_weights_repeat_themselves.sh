#!/usr/bin/env bash
# torch 2.13.0 (torch.distributed.tensor, FSDP2), gloo, two processes, CPU, 2026-11-28.
# Random weights drawn on a sharded parameter (meta device, fully_shard, to_empty, then an
# init function, as the FSDP2 tutorial shows) are the same numbers on every rank: on a CPU
# mesh each rank draws its rows from its own generator, and all ranks have one seed, as they
# must for everything else. A matrix of 8 rows on two ranks has its rows 0-3 again as rows
# 4-7: half of the units start as twins of the other half, with the same gradients. Also
# with an explicit generator. On one rank the numbers are others.
# Why it matters: whoever tries a sharded run on CPUs (tests, CI, small clusters) measures
# another model than on one process, and loss still falls. torch warns once that random
# operators "may not have complete support on cpu device mesh"; nothing says what comes out.
# A way out: draw the weights whole, then shard them.
# Upstream: https://github.com/pytorch/torchtitan/issues/3106 has it for GPUs with CPU offload.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

warnings.filterwarnings("ignore")
dist.init_process_group("gloo")
torch.manual_seed(0)
with torch.device("meta"):
    model = nn.Linear(6, 8, bias=False)
fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
model.to_empty(device="cpu")
found = []
for generator in (None, torch.Generator().manual_seed(0)):
    nn.init.normal_(model.weight, generator=generator)
    weight = model.weight.full_tensor()
    found.append(torch.equal(weight[:4], weight[4:]))
if dist.get_rank() == 0:
    print("rows 4-7 are rows 0-3 again:", found, flush=True)
dist.destroy_process_group()
sys.exit(found != [True, True])
PY
"$tmp/v/bin/torchrun" --standalone --nproc-per-node 2 seen.py 2>"$tmp/log" || { tail -5 "$tmp/log"; echo "torch behaves otherwise now"; exit 1; }
