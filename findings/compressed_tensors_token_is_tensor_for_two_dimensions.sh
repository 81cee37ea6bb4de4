#!/usr/bin/env bash
# compressed-tensors 0.20.0 with torch 2.13.0, CPU, 2026-11-28.
# Dynamic quantization of inputs with strategy "token" gives each token a scale if the input is
# batch x tokens x channels. The same numbers as tokens x channels get one scale for all: one token
# with large values, which most language models have, rounds all the others to zero. No error
# and no warning; the layer, the scheme and the numbers are the same.
# Why it matters: experts of a mixture, classifiers and packed sequences call their linear layers with
# two dimensions, so the loss measured of an int8 model here is not that of vLLM's kernels, which
# do have a scale per token.
# Upstream: akin to https://github.com/vllm-project/compressed-tensors/issues/394 (closed), whose fix
# is right for three dimensions.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq compressed-tensors==0.20.0 transformers==5.24.0 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import copy

import torch
from compressed_tensors.quantization import (QuantizationArgs, QuantizationConfig, QuantizationScheme,
                                             apply_quantization_config)

torch.manual_seed(0)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.up(x)


net = Net()
real = copy.deepcopy(net)
inputs = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True)
scheme = QuantizationScheme(targets=["Linear"], input_activations=inputs)
apply_quantization_config(net, QuantizationConfig(config_groups={"g": scheme}))
tokens = torch.randn(1, 512, 64)
tokens[0, 7] *= 1000.0
others = torch.arange(512) != 7


@torch.no_grad()
def error(x):
    """What is lost of the outputs of all tokens but the large one."""
    wanted, found = (model(x).reshape(-1, 64)[others] for model in (real, net))
    return float((found - wanted).norm() / wanted.norm())


three, two = error(tokens), error(tokens[0])
print(f"lost of the other tokens: batch x tokens x channels {three:.3f}, tokens x channels {two:.3f}")
assert three < 0.02, three
assert two > 0.9, two
PY
"$tmp/v/bin/python" -W ignore seen.py 2>/dev/null
