#!/usr/bin/env bash
# grain 0.2.18 (ConcatThenSplitIterDataset), numpy 2.4.6, 2026-11-28.
# The iterator's state holds a tuple (-1, -1) that says "no document was cut in two".
# grain's own CheckpointHandler writes the state as JSON, which brings it back as a list;
# that no longer equals the tuple, so a restore takes the next document for one that
# was cut and drops it. Resumed in memory with the same state, nothing is lost.
# Why it matters: concat-and-split is how language-model rows are packed. Depending on the
# step of the checkpoint, a resumed run silently loses a document and every later row
# holds other tokens than in the run that was not interrupted.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq grain==0.2.18 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import logging

import grain
import numpy as np
from etils import epath

logging.disable(logging.CRITICAL)
LENGTHS = [3, 4, 2, 5, 1, 3, 6, 2]


def rows():
    documents = [{"t": np.full(n, i)} for i, n in enumerate(LENGTHS, 1)]
    dataset = grain.MapDataset.source(documents).to_iter_dataset()
    return iter(grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct={"t": 5}))


def text(iterator):
    return ["".join(map(str, row["t"])) for row in iterator]


full = text(rows())
print("not interrupted  ", full)
handler = grain.checkpoint.CheckpointHandler()
wrong = []
for cut in range(len(full)):
    first = rows()
    for _ in range(cut):
        next(first)
    memory = rows()
    memory.set_state(first.get_state())
    assert text(memory) == full[cut:]
    folder = epath.Path(f"step{cut}")
    folder.mkdir()
    handler.save(folder, first)
    rest = text(handler.restore(folder, rows()))
    if rest != full[cut:]:
        wrong.append(cut)
        print(f"resumed at row {cut}", rest, "instead of", full[cut:])
assert wrong == [0, 1, 4], wrong
PY
"$tmp/v/bin/python" seen.py 2>/dev/null
