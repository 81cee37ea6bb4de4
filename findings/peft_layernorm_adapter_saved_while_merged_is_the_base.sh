#!/usr/bin/env bash
# peft 0.21.2 (LNTuningConfig) with transformers 5.24.0 and torch 2.13.0, CPU, 2026-11-28.
# merge_adapter() of a LayerNorm adapter exchanges the trained layer with that of the base model.
# save_pretrained() in that state writes the layer of the base as the adapter: all
# training is lost from the file, which loads without an error and changes nothing. The model in
# memory is right, before and after. LoRA, LoHa, LoKr, IA3 and OFT adapters are saved the same,
# merged or not.
# Why it matters: merging for the evaluation or for a sampler and saving the best checkpoint
# there is a usual loop; the loss that was measured is not that of what was saved.
# Upstream: akin to https://github.com/huggingface/peft/pull/3423 (closed: an adapter added while merged).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq peft==0.21.2 transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
from peft import (IA3Config, LNTuningConfig, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftModel,
                  get_peft_model)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up = torch.nn.Linear(16, 32)
        self.norm = torch.nn.LayerNorm(32)
        self.head = torch.nn.Linear(32, 5)

    def forward(self, rows):
        return self.head(torch.relu(self.norm(self.up(rows))))


torch.manual_seed(1)
ROWS, LABELS = torch.randn(64, 16), torch.randint(0, 5, (64,))


def loss(model):
    return torch.nn.functional.cross_entropy(model(ROWS), LABELS)


def saved(config, folder, merged):
    model = get_peft_model(Net(), config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    model.eval()
    if merged:
        model.merge_adapter()
    in_memory = loss(model).item()
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(Net(), folder).eval()
    print(f"{type(config).__name__}, merged={merged}: loss of the base {loss(Net()).item():.4f}, "
          f"in memory {in_memory:.4f}, saved and loaded {loss(loaded).item():.4f}")
    return in_memory, loss(loaded).item()


base = loss(Net()).item()
for config in (LoraConfig(target_modules=["up"], r=4), LoHaConfig(target_modules=["up"], r=4),
               LoKrConfig(target_modules=["up"], r=4),
               IA3Config(target_modules=["up"], feedforward_modules=[]),
               OFTConfig(target_modules=["up"], oft_block_size=8, r=0)):
    memory, file = saved(config, type(config).__name__, merged=True)
    assert abs(memory - file) < 1e-4 and memory < base - 0.01, type(config)
memory, file = saved(LNTuningConfig(target_modules=["norm"]), "apart", merged=False)
assert abs(memory - file) < 1e-6, "it is lost without a merge too"
memory, file = saved(LNTuningConfig(target_modules=["norm"]), "merged", merged=True)
assert memory < base - 0.01, "nothing was trained"
assert abs(file - base) < 1e-6, "the training is saved"
PY
"$tmp/v/bin/python" seen.py 2>/dev/null
