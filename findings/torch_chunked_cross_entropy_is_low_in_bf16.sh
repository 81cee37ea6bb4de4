#!/usr/bin/env bash
# torch 2.13.0, CPU, 2026-11-29.
# torch.nn.functional.linear_cross_entropy with LinearCrossEntropyOptions() makes the logits some rows at a time. In bfloat16 the loss
# that it returns is 3 % too low, here by 0.32 nats per token: much more than rounding the right one to bfloat16 (0.02). That is so
# for reduction "mean" and "sum", and with acc_dtype=torch.float32; with acc_policy="accurate" it is 0.2 too low. The gradients are right to
# 0.4 %. As it is without options, the loss is 0.11 too high.
# Under torch.autocast with float32 inputs the chunked form is exact, for it computes in float32 all the same.
# Expected: the loss of the documented reference, cross_entropy(linear(input, weight), target), as exact as its dtype can say it.
# Why it matters: a run that switches to it for its memory shows another loss from that step on, and is compared with others by it.
# Way out: cast inputs and weight to float32.
# Upstream: pytorch/pytorch pull requests 176338 and 181574 measure its errors in float16; nothing known of the loss in bfloat16.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6 setuptools==80.9.0
cat > "$tmp/seen.py" <<'PY'
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear, linear_cross_entropy

tokens, width, vocabulary = 2048, 256, 16384
torch.manual_seed(0)
inputs, weight = torch.randn(tokens, width).bfloat16(), (torch.randn(vocabulary, width) * 0.02).bfloat16()
targets = torch.randint(0, vocabulary, (tokens,))


def loss_and_gradient(dtype, **named):
    x, w = (one.to(dtype, copy=True).requires_grad_() for one in (inputs, weight))
    loss = linear_cross_entropy(x, w, targets, **named) / (tokens if named.get("reduction") == "sum" else 1)
    loss.backward()
    return loss.item(), w.grad.float()


exact = cross_entropy(linear(inputs.float(), weight.float()), targets).item()
_, right = loss_and_gradient(torch.float32)
found = {}
for name, named in {
    "no options": {},
    "options": {"options": LinearCrossEntropyOptions()},
    "options, sum": {"options": LinearCrossEntropyOptions(), "reduction": "sum"},
    "options, acc_dtype": {"options": LinearCrossEntropyOptions(acc_dtype=torch.float32)},
    "options, accurate": {"options": LinearCrossEntropyOptions(acc_policy="accurate")},
}.items():
    loss, gradient = loss_and_gradient(torch.bfloat16, **named)
    found[name] = loss - exact
    off = ((gradient - right).norm() / right.norm()).item()
    print(f"bfloat16, {name}: loss {loss:.4f}, {found[name]:+.4f}; gradient off by {off:.2%}")
    assert off < 0.01, "the gradient is wrong, too"
with torch.autocast("cpu", torch.bfloat16):
    chunked, _ = loss_and_gradient(torch.float32, options=LinearCrossEntropyOptions())
print(f"float32 under autocast, options: loss {chunked:.4f}, {chunked - exact:+.4f}")
assert abs(torch.tensor(exact).bfloat16().item() - exact) < 0.03
assert all(found[name] < -0.3 for name in ("options", "options, sum", "options, acc_dtype")), "the loss is better"
assert found["options, accurate"] < -0.15 and found["no options"] > 0.05, "the loss is better"
assert abs(chunked - exact) < 1e-4, "autocast counts"
PY
"$tmp/v/bin/python" "$tmp/seen.py"
