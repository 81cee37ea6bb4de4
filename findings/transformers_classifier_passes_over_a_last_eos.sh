#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0, CPU, 2026-11-28.
# The classifier on a decoder (LlamaForSequenceClassification and its like) finds the end of a
# text by looking for the last id that is not pad_token_id, and never asks the attention_mask it
# is given. With pad = eos, as is usual where a tokenizer has no pad token, a text that ends with
# eos is judged from the token before it: the eos that marks its end changes nothing, although
# the mask says that it is there.
# Why it matters: a reward model or classifier trained with appended eos never reads it, and one
# trained elsewhere to read it gives other scores here.
# Upstream: huggingface/transformers issue 35352, closed by 35911, which searches for the last id
# that is not pad instead of the first that is; the mask is still not asked.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

EOS = 2
shape = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=2)
torch.manual_seed(0)
model = LlamaForSequenceClassification(LlamaConfig(**shape, pad_token_id=EOS, eos_token_id=EOS)).eval()
with torch.no_grad():
    ids = torch.tensor([[5, 6, 7, EOS]])
    mask = torch.ones_like(ids)  # All four are part of the text.
    given = model(ids, attention_mask=mask).logits[0]
    each = model.score(model.model(ids, attention_mask=mask).last_hidden_state)[0]
    place = [torch.equal(given, one) for one in each].index(True)
    model.config.pad_token_id = 31
    other = model(ids, attention_mask=mask).logits[0]
print("judged from token", place, "of 0 to 3; with another pad id from the last:", torch.equal(other, each[3]))
sys.exit(0 if place == 2 and torch.equal(other, each[3]) else 1)
PY
"$tmp/v/bin/python" seen.py
