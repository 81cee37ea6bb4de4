#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0, CPU, two processes (gloo), 2026-11-28.
# With dispatch_batches=True process 0 reads a batch for every process and sends them out.
# skip_first_batches(loader, n) on such a loader of a map-style dataset skips n batches of
# one process, not of all: with two processes it resumes at half the step. Rows that were
# trained on come again, and the run is in another order than the undisturbed one. Without
# dispatch_batches, with split_batches, or for an IterableDataset n is a number of steps.
# Why it matters: the number of steps done is what a training loop keeps, and skipping them
# is how its documentation resumes; losses and shapes look right.
# Upstream: no issue known (huggingface/accelerate#4295 is about settings that the skip drops).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import os
import sys

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset


class Rows(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(24))


def rows_of(batches):  # What all processes were given in each step
    return [sorted(accelerator.gather(batch).tolist()) for batch in batches]


for name, data, size, how in (
    ("each reads its own", torch.arange(24), 3, {}),
    ("dispatched in parts", torch.arange(24), 6, {"dispatch_batches": True, "split_batches": True}),
    ("dispatched, iterable", Rows(), 3, {"dispatch_batches": True}),
    ("dispatched", torch.arange(24), 3, {"dispatch_batches": True}),
):
    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**how))
    whole = rows_of(accelerator.prepare(DataLoader(data, batch_size=size)))
    later = rows_of(skip_first_batches(accelerator.prepare(DataLoader(data, batch_size=size)), 1))
    if accelerator.is_main_process:
        print(f"{name}: step 2 is {whole[1]}, after a resume {later[0]}")
        assert whole[1] == [6, 7, 8, 9, 10, 11], whole
        assert (later == whole[1:]) == (name != "dispatched"), later
        assert name != "dispatched" or later[0] == [3, 4, 5, 6, 7, 8], later
PY
port=$("$tmp/v/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MASTER_ADDR=127.0.0.1 MASTER_PORT=$port WORLD_SIZE=2 OMP_NUM_THREADS=1
RANK=1 LOCAL_RANK=1 timeout 120 "$tmp/v/bin/python" -W ignore seen.py >/dev/null 2>other.txt & other=$!
RANK=0 LOCAL_RANK=0 timeout 120 "$tmp/v/bin/python" -W ignore seen.py 2>err.txt || { cat err.txt; kill $other; exit 1; }
wait $other || { cat other.txt; exit 1; }
