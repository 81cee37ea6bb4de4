#!/usr/bin/env bash
# tensorizer 2.12.1 with torch 2.13.0, CPU, 2026-11-29.
# A model with a frozen layer and a buffer that is not persistent is written with write_module and loaded with
# load_into_module into a model that was made alike. All values are right. But the frozen weights require gradients now, and
# an optimizer made from what requires gradients changes them; the buffer became a Parameter that requires gradients, too,
# and it is in state_dict(), so a checkpoint of the loaded model is refused by the model that was written.
# Expected: as with load_state_dict, values change, and what is trained and what is saved stay as they were.
# Why it matters: a frozen base under an adapter, or a frozen encoder, is trained in silence; and rotary embeddings keep
# their frequencies in just such a buffer.
# Way out: freeze after loading; write with include_non_persistent_buffers=False.
# Upstream: coreweave/tensorizer #57 has the choice to leave such buffers out when writing; nothing known of what loading does.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6 tensorizer==2.12.1
cd "$tmp"
cat > seen.py <<'PY'
import warnings

import torch
from tensorizer import TensorDeserializer, TensorSerializer

warnings.filterwarnings("ignore")


def make():
    model = torch.nn.Module()
    model.base, model.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
    model.base.requires_grad_(False)
    model.register_buffer("frequencies", torch.tensor([1.0, 0.1]), persistent=False)
    return model


def trained(model):
    return sorted(name for name, one in model.named_parameters() if one.requires_grad)


written, loaded = make(), make()
serializer = TensorSerializer("model.tensors")
serializer.write_module(written)
serializer.close()
count = TensorDeserializer("model.tensors", device="cpu").load_into_module(loaded)
print("loaded", count, "tensors, values equal:",
      all(torch.equal(value, loaded.state_dict()[name]) for name, value in written.state_dict().items()))
print("trained before:", trained(written))
print("trained after: ", trained(loaded))
print("buffer after:  ", type(loaded.frequencies).__name__, "requires_grad", loaded.frequencies.requires_grad)
extra = sorted(set(loaded.state_dict()) - set(written.state_dict()))
print("new in state_dict:", extra)

optimizer = torch.optim.SGD([one for one in loaded.parameters() if one.requires_grad], lr=0.1)
loaded.head(loaded.base(torch.ones(1, 4))).sum().backward()
optimizer.step()
moved = not torch.equal(loaded.base.weight, written.base.weight)
print("frozen weights moved by one step:", moved)
try:
    make().load_state_dict(loaded.state_dict())
    refused = False
except RuntimeError as error:
    refused = "frequencies" in str(error)
print("checkpoint of the loaded model refused:", refused)

assert trained(written) == ["head.bias", "head.weight"]
assert trained(loaded) == ["base.bias", "base.weight", "head.bias", "head.weight"], "frozen weights stay frozen"
assert isinstance(loaded.frequencies, torch.nn.Parameter) and extra == ["frequencies"], "the buffer stays what it was"
assert moved and refused
PY
"$tmp/v/bin/python" seen.py
