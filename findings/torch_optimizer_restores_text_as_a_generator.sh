#!/usr/bin/env bash
# torch 2.13.0 (torch.optim.Optimizer.load_state_dict), CPU, 2026-11-28.
# An optimizer keeps a word ("warm"), an exact count (an int64 tensor) and a mask (a bool tensor)
# beside a parameter. state_dict() hands them out as they are. load_state_dict() of the same
# program makes the word "<generator object ...>", a list of words a list of such texts, and
# casts every tensor to the dtype of the parameter: the count 16,777,217 becomes 16,777,216.0,
# and bfloat16 weights would leave eight bits of it. Only a key named "step" is left alone.
# No error and no warning: a schedule that asks `if phase == "warm"` goes another way after
# each resume.
# Why it matters: optimizers with phases, counters or masks per parameter (schedule-free,
# sign or pruning-aware ones) do not survive a checkpoint, though saving it lost nothing.
# Upstream: the cast of tensors is known; no issue known for text.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch


class Phased(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight] |= {
                    "phase": "warm",
                    "notes": ["ab", "cd"],
                    "seen": torch.tensor(2**24 + 1),
                    "mask": torch.tensor([True, False]),
                    "step": torch.tensor(2**24 + 1),
                }


def optimizer():
    weight = torch.nn.Parameter(torch.ones(2))
    return weight, Phased([weight])


_, first = optimizer()
first.step()
saved = first.state_dict()
print("saved   ", saved["state"][0])
weight, second = optimizer()
second.load_state_dict(saved)
found = second.state[weight]
print("restored", found)

assert saved["state"][0]["phase"] == "warm"
assert found["phase"].startswith("<generator object"), found["phase"]
assert all(text.startswith("<generator object") for text in found["notes"])
assert found["seen"].dtype == torch.float32 and int(found["seen"]) == 2**24
assert found["mask"].dtype == torch.float32
assert found["step"].dtype == torch.int64 and int(found["step"]) == 2**24 + 1
PY
"$tmp/v/bin/python" -W ignore seen.py
