#!/usr/bin/env bash
# bitsandbytes 0.50.2 with torch 2.13.0, CPU with AVX-512, 2026-11-29.
# A 4-bit weight (NF4 and FP4, the default blocks of 64) whose rows are a multiple of 16 but not of 64 long comes back under the
# scales of other blocks: all rows but the first or two are wrong, and the further down the more. Blocks are counted through the
# whole matrix when it is quantized; the AVX-512 kernel of dequantize_4bit counts 4304 // 64 of them to a row. The NEON kernel
# beside it asks for whole blocks first. Other lengths take another path and are right, as are processors without AVX-512.
# Embedding4bit warns that a width which 64 does not divide is slower, and is wrong there too.
# Why it matters: 4304 is the inner width of the vision encoders of Qwen3-VL and of SigLIP so400m. A layer with rows of like size
# hides it (as random ones from nn.Linear do); rows of unlike size, as after training, lose a good part of the weight.
# Upstream: no issue known (https://github.com/bitsandbytes-foundation/bitsandbytes/issues/2047 is another one of this kernel).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import logging

import torch

logging.disable(logging.CRITICAL)
import bitsandbytes as bnb
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

if torch.backends.cpu.get_cpu_capability() != "AVX512":
    raise SystemExit("this processor has no AVX-512: bitsandbytes takes another kernel")


def by_hand(packed, state):
    """Codes times the scale of their block; blocks of 64 run through the whole matrix."""
    packed = packed.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1).long()
    scales = state.absmax.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes] * scales).reshape(state.shape)


def apart(one, other):
    return ((one - other).norm() / other.norm()).item()


torch.manual_seed(0)
for kind in ("nf4", "fp4"):
    wrong = []
    for width in range(2, 514, 2):
        packed, state = quantize_4bit(torch.randn(16, width), quant_type=kind)
        if apart(dequantize_4bit(packed, state), by_hand(packed, state)) > 1e-3:
            wrong.append(width)
    print(kind, "even widths up to 512 that come back wrong:", *wrong[:8], "...", *wrong[-2:])
    assert wrong == [n for n in range(2, 514, 2) if n % 16 == 0 and n % 64], wrong

sizes = torch.logspace(-1, 1, 32)[:, None]  # rows of unlike size, as after training
for width, right in ((4288, True), (4304, False)):
    weight = sizes * torch.randn(32, width) / width**0.5
    packed, state = quantize_4bit(weight, quant_type="nf4")
    hand, kernel = by_hand(packed, state), dequantize_4bit(packed, state)
    layer = bnb.nn.Linear4bit(width, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    rows = torch.randn(64, width)
    answer = layer.to("cpu")(rows)
    rows_wrong = int(((hand - kernel).abs() > 1e-6).any(1).sum())
    print(f"{width} wide: {rows_wrong} of 32 rows differ, weight {apart(kernel, weight):.1%} off the original "
          f"(by hand {apart(hand, weight):.1%}), answers of Linear4bit {apart(answer, rows @ weight.T):.1%} off")
    assert apart(hand, weight) < 0.11
    assert (rows_wrong == 0) == right and (apart(answer, rows @ weight.T) < 0.12) == right, width

for width, right in ((64, True), (96, False)):
    embedding = torch.nn.Embedding.from_pretrained(torch.logspace(-1, 1, 50)[:, None] * torch.randn(50, width))
    quantized = bnb.nn.EmbeddingNF4(50, width)
    quantized.load_state_dict(embedding.state_dict())
    ids = torch.arange(50)
    off = apart(quantized.to("cpu")(ids), embedding(ids))
    print(f"an embedding {width} wide: {off:.1%} off")
    assert (off < 0.12) == right, width
PY
"$tmp/v/bin/python" -W ignore seen.py 2> err || { cat err; exit 1; }
