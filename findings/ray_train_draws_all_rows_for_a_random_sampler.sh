#!/usr/bin/env bash
# ray 2.60.0 (Ray Train) with torch 2.13.0, CPU, two workers on one machine, 2026-11-28.
# ray.train.torch.prepare_data_loader makes the loader anew with a DistributedSampler, and
# warns if a sampler is overwritten. It takes every RandomSampler for the one that
# shuffle=True makes: one with num_samples (a short epoch) or replacement=True (a bootstrap)
# is dropped in silence. An epoch then has all rows, each once. With one worker it is kept.
# Why it matters: the same script trains on other rows, and for as many times longer an
# epoch, as soon as it has two workers; loss curves and logs do not say why.
# Upstream: no issue known (ray-project/ray#22406 is about shuffle).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq "ray[train]==2.60.0" torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import json
import logging
import os

import ray
import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_data_loader
from torch.utils.data import DataLoader, RandomSampler

HERE = os.getcwd()


def work(config):
    rows = torch.arange(100)
    short = DataLoader(rows, batch_size=1, sampler=RandomSampler(rows, num_samples=10))
    often = DataLoader(rows, batch_size=1, sampler=RandomSampler(rows, replacement=True))
    seen = {}
    for name, loader in (("short", short), ("often", often)):
        seen[name] = [int(batch[0]) for batch in prepare_data_loader(loader)]
    context = train.get_context()
    with open(f"{HERE}/{context.get_world_size()}-{context.get_world_rank()}.json", "w") as file:
        json.dump(seen, file)


ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
for workers in (1, 2):
    TorchTrainer(
        work,
        scaling_config=train.ScalingConfig(num_workers=workers),
        run_config=train.RunConfig(name=f"workers-{workers}", storage_path=f"{HERE}/runs"),
    ).fit()
ray.shutdown()
one = json.load(open("1-0.json"))
two = [json.load(open(f"2-{rank}.json")) for rank in (0, 1)]
both = {name: two[0][name] + two[1][name] for name in one}
for workers, seen in ((1, one), (2, both)):
    print(f"{workers} worker(s): an epoch of 10 rows has {len(seen['short'])}; "
          f"a bootstrap of 100 has {len(set(seen['often']))} different rows")
assert len(one["short"]) == 10 and len(set(one["often"])) < 90
assert sorted(both["short"]) == sorted(both["often"]) == list(range(100))
PY
RAY_TRAIN_V2_ENABLED=1 timeout 400 "$tmp/v/bin/python" -W ignore seen.py 2>err.txt || { tail -30 err.txt; exit 1; }
