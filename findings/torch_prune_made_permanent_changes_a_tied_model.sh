#!/usr/bin/env bash
# torch 2.13.0 (torch.nn.utils.prune), CPU, 2026-11-28.
# prune.remove, which makes pruning permanent and is said to leave the pruned tensor as it
# is, changes what a model with tied weights computes. Pruning the embedding masks the embedding
# alone: the output layer goes on with the dense matrix, in training and in evaluation, without
# a word. `remove` then writes the zeros into the matrix that both share, so the model that is
# exported is not the one that was evaluated.
# Why it matters: most small language models tie the two; the loss that was measured while pruning
# was trained is not the loss of the file that is shipped.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
from torch import nn
from torch.nn.utils import prune


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids))


torch.manual_seed(0)
model = Tied()
ids = torch.arange(50)
prune.l1_unstructured(model.embed, "weight", amount=0.5)
with torch.no_grad():
    before = model(ids)
    zeros = [int((one.weight == 0).sum()) for one in (model.embed, model.head)]
    prune.remove(model.embed, "weight")
    after = model(ids)
apart = float((before - after).abs().max())
print(f"zeros while pruned: embedding {zeros[0]}, output layer {zeros[1]} of 800")
print(f"the answers move by up to {apart:.3f} when pruning is made permanent")
assert zeros == [400, 0], "both are pruned"
assert apart > 0.1, "the answers stay"
assert model.head.weight is model.embed.weight

untied = Tied()
untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
prune.l1_unstructured(untied.embed, "weight", amount=0.5)
with torch.no_grad():
    before = untied(ids)
    prune.remove(untied.embed, "weight")
    print(f"without a tie: by {float((before - untied(ids)).abs().max()):.3f}")
    assert torch.equal(before, untied(ids))
PY
"$tmp/v/bin/python" seen.py
