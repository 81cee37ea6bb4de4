#!/usr/bin/env bash
# bitsandbytes 0.50.2 with transformers 5.24.0, peft 0.21.2, accelerate 1.15.0 and torch 2.13.0, CPU with AVX512_BF16,
# 2026-11-29.
# A 4-bit model on such a processor (Sapphire Rapids, Zen 4 and later) that has been asked once in evaluation mode is
# merged or dequantized into other weights: the first call of each Linear4bit repacks its weight for a faster kernel, in
# place, and keeps a flag of that. `dequantize_4bit`, on which `merge_and_unload()` of peft and `dequantize()` of
# transformers stand, does not look at the flag and reads the new order of the nibbles as the old one.
# The same calls on a model that has not answered yet are right, and so are its answers before and after.
# Why it matters: train, evaluate, merge, save is how every QLoRA run ends. What was evaluated is good, what is
# saved is noise, and no step of it fails or warns.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq bitsandbytes==0.50.2 transformers==5.24.0 peft==0.21.2 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import torch
from bitsandbytes.functional import has_avx512bf16
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

if not has_avx512bf16():
    raise SystemExit("this processor has no AVX512_BF16: bitsandbytes repacks nothing")

torch.manual_seed(0)
config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=4, vocab_size=256)
LlamaForCausalLM(config).save_pretrained("tiny")
full = LlamaForCausalLM.from_pretrained("tiny")
ids = torch.arange(64).reshape(2, 32)


def four_bits():
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    return LlamaForCausalLM.from_pretrained("tiny", quantization_config=how, dtype=torch.bfloat16)


def apart(one, other):
    return ((one.float() - other.float()).norm() / other.float().norm()).item()


def answers(model):
    with torch.no_grad():
        return model(input_ids=ids).logits


def dequantized(evaluate):
    model = four_bits()
    if evaluate:
        assert apart(answers(model), answers(full)) < 0.25, "the quantized model itself is wrong"
    model = model.dequantize()
    name = "model.layers.0.mlp.up_proj"
    return apart(model.get_submodule(name).weight, full.get_submodule(name).weight)


def merged(evaluate):
    torch.manual_seed(1)
    model = get_peft_model(four_bits(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    trained = answers(model)
    if evaluate:
        model.eval()
        assert apart(answers(model), trained) < 0.05, "evaluation itself is wrong"
    return apart(answers(model.merge_and_unload().train()), trained)


seen = {}
for evaluate in (False, True):
    seen[evaluate] = dequantized(evaluate), merged(evaluate)
    print(f"asked in evaluation mode before: {evaluate!s:5}  a dequantized weight is {seen[evaluate][0]:.0%} off the "
          f"original, the merged model's answers {seen[evaluate][1]:.0%} off the adapter's")
assert seen[False][0] < 0.12 and seen[False][1] < 0.06, "wrong without an evaluation"
assert seen[True][0] > 1.0 and seen[True][1] > 0.2, "right after an evaluation"
PY
TQDM_DISABLE=1 TRANSFORMERS_VERBOSITY=error HF_HUB_DISABLE_PROGRESS_BARS=1 "$tmp/v/bin/python" -W ignore seen.py 2> err || { cat err; exit 1; }
