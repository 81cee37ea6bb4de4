#!/usr/bin/env bash
# megatron-energon 7.4.1 with torch 2.13.0, CPU, one worker, 2026-11-29.
# A blend by epochs (`blend_epochized`) takes fractional repetitions: a dataset of 20 rows with 1.5 is to give 30 rows an epoch, and
# the length of the loader says so. It does in the first epoch. Every later one gives 20: RepeatDataset stops in
# the middle of the dataset, the next epoch goes on from there, and counts the ten rows that were left as a whole
# repetition. With 0.5 every third epoch has no row of the dataset at all. Whole numbers are right.
# Why it matters: the mixture that is trained on is not the one in the file; of a dataset with 0.5 a third is missing in a long
# run, of one with 1.5 as well. The usual endless loader shows no epochs, so only a count of rows finds it.
# Upstream: no issue known; fractions came with https://github.com/NVIDIA/Megatron-Energon/pull/56
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq megatron-energon==7.4.1 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import contextlib
import io
import os
import tarfile

from megatron.energon import WorkerConfig, get_loader, get_train_dataset
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory

SAMPLES = "sample_type:\n  __module__: megatron.energon\n  __class__: TextSample\nfield_map:\n  text: txt\n"
BLEND = """__module__: megatron.energon
__class__: MetadatasetV2
splits:
  train:
    blend_epochized:
    - {repetitions: 1, path: forty}
    - {repetitions: %s, path: twenty}
"""


def make(name, rows):
    os.makedirs(name)
    shards = [f"{number}.tar" for number in range(2)]
    for number, shard in enumerate(shards):
        with tarfile.open(f"{name}/{shard}", "w") as tar:
            for row in range(number, rows, 2):
                member = tarfile.TarInfo(f"{row:04}.txt")
                member.size = len(name)
                tar.addfile(member, io.BytesIO(name.encode()))
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(EPath(name), shards, split_parts_ratio=[("train", 1.0)], workers=1)
    with open(f"{name}/.nv-meta/dataset.yaml", "w") as file:
        file.write(SAMPLES)


def loader(repetitions, repeat):
    with open("blend.yaml", "w") as file:
        file.write(BLEND % repetitions)
    dataset = get_train_dataset("blend.yaml", worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
                                batch_size=1, shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=repeat)
    return get_loader(dataset)


make("forty", 40)
make("twenty", 20)
seen = {}
for repetitions in (0.5, 1, 1.5, 2, 2.5):
    epochs = loader(repetitions, repeat=False)
    counts = [[batch.text[0] for batch in epochs].count("twenty") for _ in range(6)]
    endless = iter(loader(repetitions, repeat=True))
    names = [next(endless).text[0] for _ in range(6000)]
    mean = 40 * names.count("twenty") / names.count("forty")
    seen[repetitions] = counts
    print(f"repetitions: {repetitions:<3}  rows of the 20 in epochs 1 to 6: {counts}, to 40 of the other in 6,000 rows: "
          f"{mean:.1f} ({20 * repetitions:g} asked for)")
    assert len(epochs) == 40 + 20 * repetitions
    assert (abs(mean - 20 * repetitions) < 0.5) == (repetitions in (1, 2)), mean
assert seen[1] == [20] * 6 and seen[2] == [40] * 6
assert seen[0.5] == [10, 10, 0, 10, 10, 0], seen[0.5]
assert seen[1.5] == [30] + [20] * 5 and seen[2.5] == [50] + [40] * 5, seen
PY
"$tmp/v/bin/python" -W ignore seen.py 2> err || { cat err; exit 1; }
