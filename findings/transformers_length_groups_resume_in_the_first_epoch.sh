#!/usr/bin/env bash
# transformers 5.24.0 (Trainer, train_sampling_strategy="group_by_length"), accelerate 1.15.0,
# torch 2.13.0, CPU, one process, 2026-11-28.
# A run that is resumed in the middle of its second epoch skips the right number of batches, but of
# the first epoch's order: the rest of the epoch repeats rows that it has had and never brings
# others. Every resume point within the second epoch is wrong; those in the first, and at the exact
# start of an epoch, are right. The default strategy ("random") resumes exactly, so the
# usual test of a resume passes.
# Why it matters: grouping by length is what fine-tuning with padding uses, and such runs have several
# epochs. Some rows count twice, others not at all, and the loss curve does not show it.
# Upstream: huggingface/transformers#40691 mended the default order, not this one.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq transformers==5.24.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import random

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

ROWS, BATCH = 21, 4
EPOCH = -(-ROWS // BATCH)
chance = random.Random(0)
DATA = [{"input_ids": torch.full((chance.randint(3, 9),), row + 1)} for row in range(ROWS)]


def padded(rows):
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    return {"input_ids": ids, "labels": ids.clone()}


class Watched(Trainer):
    def training_step(self, model, inputs, *arguments, **named):
        self.seen.append(sorted(set(inputs["input_ids"].flatten().tolist()) - {0}))
        return super().training_step(model, inputs, *arguments, **named)


def run(strategy, start=None):
    set_seed(1)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = TrainingArguments(
        strategy, max_steps=2 * EPOCH, per_device_train_batch_size=BATCH, save_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, train_sampling_strategy=strategy,
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    trainer = Watched(model, settings, train_dataset=DATA, data_collator=padded)
    trainer.seen = []
    trainer.train(resume_from_checkpoint=start and f"{strategy}/checkpoint-{start}")
    return trainer.seen


wrong = {}
for strategy in ("random", "group_by_length"):
    whole = run(strategy)
    wrong[strategy] = [step for step in range(1, 2 * EPOCH) if run(strategy, step) != whole[step:]]
    print(f"{strategy:16} resumed otherwise at steps {wrong[strategy]} of {2 * EPOCH}, {EPOCH} an epoch")
second, stop = whole[EPOCH:], EPOCH + 2
rows = sum(second[: stop - EPOCH] + run(strategy, stop), [])
print(f"resumed at step {stop}, the second epoch brings {len(rows)} rows, {len(set(rows))} different ones of {ROWS}")

assert wrong == {"random": [], "group_by_length": list(range(EPOCH + 1, 2 * EPOCH))}, wrong
assert len(rows) == ROWS and len(set(rows)) < ROWS
PY
"$tmp/v/bin/python" -W ignore seen.py 2>/dev/null | grep -v train_runtime
