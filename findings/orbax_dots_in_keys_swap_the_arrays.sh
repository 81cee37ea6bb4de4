#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 (tensorstore 0.1.86, jax 0.10.2, numpy 2.4.6), CPU, 2026-11-29.
# A tree that has a key with a dot beside a nested one that reads alike, {"encoder.bias": x, "encoder": {"bias": y}},
# is saved without an error and comes back with one of the two arrays under both keys: names are joined by dots to
# places in the store, so both arrays are written to one place. Which one is left is chance. If their shapes differ, the
# save fails, with a message about a zarr driver.
# Why it matters: a flat dict of a PyTorch model ("encoder.bias") beside its nested form, or beside an average with the
# other form, is a usual thing in a conversion; the weights that come back are of the other one. No error, no warning.
# A way out: put each form into an item of its own, or join keys by another character.
# Upstream: none known (searched 2026-11-29).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax==0.10.2 jaxlib==0.10.2 flax==0.12.8 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

lost = []
for name, kind in (("numpy", np), ("jax", jnp)):
    tree = {"encoder.bias": kind.arange(3.0), "encoder": {"bias": kind.full(3, 7.0)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(name), tree)
        checkpointer.wait_until_finished()
        found = checkpointer.restore(os.path.abspath(name), tree)
    flat, nested = np.asarray(found["encoder.bias"]).tolist(), np.asarray(found["encoder"]["bias"]).tolist()
    print(f"{name}: saved [0, 1, 2] and [7, 7, 7], restored {flat} and {nested}", flush=True)
    lost.append(flat == nested)
sys.exit(not all(lost))
PY
"$tmp/v/bin/python" seen.py 2>"$tmp/log" || { tail -5 "$tmp/log"; echo "orbax behaves otherwise now"; exit 1; }
