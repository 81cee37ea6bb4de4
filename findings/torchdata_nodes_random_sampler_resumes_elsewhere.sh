#!/usr/bin/env bash
# torchdata 0.11.0 (torchdata.nodes) with torch 2.13.0, CPU, 2026-11-28.
# A RandomSampler in a node is resumed by skipping as many indices as were used, but of a
# new permutation: neither its seed nor its generator's state is in the state dict. Rows
# come twice in the epoch, others never, and nothing fails, though both runs set the same seed.
# A StatefulDataLoader(shuffle=True) of the same package resumes exactly.
# Why it matters: nodes are offered to compose resumable loaders, and RandomSampler is the
# usual way to shuffle. Give the sampler a state_dict, or draw the order from (seed, epoch).
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torchdata==0.11.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
import torchdata.nodes as nodes
from torch.utils.data import RandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

ROWS = range(12)


def with_nodes():
    return nodes.Loader(nodes.MapStyleWrapper(ROWS, RandomSampler(ROWS)))


def with_loader():
    return StatefulDataLoader(ROWS, batch_size=None, shuffle=True)


def resumed_epoch(make):
    """The second epoch, interrupted after five rows and resumed in a new loader."""
    torch.manual_seed(0)
    loader = make()
    list(loader)
    rows = iter(loader)
    seen = [int(next(rows)) for _ in range(5)]
    state = loader.state_dict()
    torch.manual_seed(0)
    loader = make()
    loader.load_state_dict(state)
    return seen, [int(row) for row in loader]


for name, make in (("StatefulDataLoader", with_loader), ("nodes", with_nodes)):
    before, after = resumed_epoch(make)
    twice = sorted(set(before) & set(after))
    never = sorted(set(ROWS) - set(before) - set(after))
    print(f"{name}: {before} then {after}, twice {twice}, never {never}")
    assert len(before) + len(after) == 12
    assert bool(twice) == (name == "nodes"), name
PY
"$tmp/v/bin/python" -W ignore seen.py
