#!/usr/bin/env bash
# accelerate 1.15.0 with torchdata 0.11.0 and torch 2.13.0, CPU, one process, 2026-11-28.
# With use_stateful_dataloader=True, save_state and load_state are to resume a data loader in
# the middle of an epoch. A shuffled one goes on with rows of another permutation: load_state
# puts back the random state of the moment of the save, from which the loader then draws
# its order anew, and skips in that. Rows come twice, others never, and the count is right.
# Unshuffled it is exact, and so is torchdata's StatefulDataLoader(shuffle=True) alone.
# Why it matters: this option exists for the resume. With use_seedable_sampler=True too it is
# exact in the first epoch; in later ones only after set_epoch() on the new loader.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq accelerate==1.15.0 torchdata==0.11.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

ROWS = range(12)


def with_accelerate(shuffle, seedable=False):
    config = DataLoaderConfiguration(use_stateful_dataloader=True, use_seedable_sampler=seedable)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    return accelerator, accelerator.prepare(DataLoader(ROWS, batch_size=1, shuffle=shuffle))


def with_torchdata():
    return None, StatefulDataLoader(ROWS, batch_size=1, shuffle=True)


def interrupted(name, start, save, load, exact):
    set_seed(0)
    state, loader = start()
    rows = iter(loader)
    before = [next(rows).item() for _ in range(5)]
    saved = save(state or loader)
    set_seed(0)
    state, loader = start()
    load(state or loader, saved)
    after = [row.item() for row in loader]
    twice = sorted(set(before) & set(after))
    never = sorted(set(ROWS) - set(before) - set(after))
    print(f"{name:22}", before, "then", after, "twice", twice, "never", never)
    assert len(before + after) == 12 and (not twice) == (not never) == exact, name


def save(accelerator):
    return accelerator.save_state("saved")


def load(accelerator, folder):
    accelerator.load_state(folder)


interrupted("torchdata, shuffled", with_torchdata, StatefulDataLoader.state_dict,
            StatefulDataLoader.load_state_dict, True)
interrupted("accelerate, in order", lambda: with_accelerate(False), save, load, True)
interrupted("accelerate, seedable", lambda: with_accelerate(True, True), save, load, True)
interrupted("accelerate, shuffled", lambda: with_accelerate(True), save, load, False)
PY
"$tmp/v/bin/python" -W ignore seen.py 2>err.txt || { cat err.txt; exit 1; }
