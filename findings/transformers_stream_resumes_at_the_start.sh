#!/usr/bin/env bash
# transformers 5.24.0 (Trainer) with accelerate 1.15.0 and torch 2.13.0, CPU, 2026-11-28.
# For an IterableDataset without a length, Trainer takes the whole run for one epoch. Resumed
# after the first pass over the data, it skips all steps so far as batches of the first
# pass, runs out of data, and goes on with the first row of the next: the rows already seen
# in this pass come again and the last ones never. Resumed within the first pass it is exact.
# Why it matters: streams are trained with max_steps and often pass their data more than
# once; steps, learning rate and loss look right after the resume.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq transformers==5.24.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

PASS, STEPS = 10, 17


class Rows(torch.utils.data.IterableDataset):
    def __iter__(self):
        for row in range(PASS):
            yield {"input_ids": torch.tensor([row] * 4), "labels": torch.tensor([row] * 4)}


class Seen(Trainer):
    def training_step(self, model, inputs, *rest):
        self.seen.append(inputs["input_ids"][0, 0].item())
        return super().training_step(model, inputs, *rest)


def train(resume=None):
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=8))
    arguments = TrainingArguments(
        output_dir="out", max_steps=STEPS, per_device_train_batch_size=1, save_steps=7,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no")
    trainer = Seen(model=model, args=arguments, train_dataset=Rows())
    trainer.seen = []
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == STEPS
    return trainer.seen


whole = train()
print("not interrupted     ", whole)
assert whole == [step % PASS for step in range(STEPS)]
for step in (7, 14):
    rest = train(f"out/checkpoint-{step}")
    print(f"resumed at step {step:2}  ", rest, "instead of", whole[step:])
    if step < PASS:
        assert rest == whole[step:]
    else:
        assert rest == whole[:STEPS - step] != whole[step:], rest
PY
"$tmp/v/bin/python" -W ignore seen.py 2>err.txt || { cat err.txt; exit 1; }
