#!/usr/bin/env bash
# litdata 0.2.76 (ParallelStreamingDataset) with torch 2.13.0, CPU, no worker processes, 2026-11-28.
# Two shuffled streams of 37 and 23 rows are read side by side with length=30 and resume=True (the
# default): each epoch goes on where the last one ended. A state dict saved at the end of an epoch and
# loaded into a new loader goes on with rows of another permutation: rows come twice in one pass
# over a stream, others never, and the pairs are others than in the run that was not interrupted.
# Saved in the middle of an epoch, or without a shuffle, it resumes exactly.
# Why it matters: the end of an epoch is where checkpoints are made, and pairs (speech and noise,
# image and distractor) are what this class is for; counts and shapes look right.
# Upstream: akin to https://github.com/Lightning-AI/litData/issues/760 (open: leaving an epoch early).
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq litdata==0.2.76 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import os
from pathlib import Path

os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = str(Path("cache").resolve())
from litdata import ParallelStreamingDataset, StreamingDataLoader, StreamingDataset
from litdata.streaming import Cache


def folder(name, rows, first):
    cache = Cache(str(Path(name).resolve()), chunk_size=5)
    for i in range(rows):
        cache[i] = first + i
    cache.done()
    cache.merge()
    return name


def pair(samples):
    return samples[0] * 10_000 + samples[1]


FOLDERS = [folder("a", 37, 0), folder("b", 23, 1000)]


def loader(shuffle):
    streams = [StreamingDataset(name, shuffle=shuffle, seed=7) for name in FOLDERS]
    both = ParallelStreamingDataset(streams, length=30, transform=pair)
    return StreamingDataLoader(both, batch_size=3, num_workers=0)


def epoch(batches):
    return [divmod(int(row), 10_000) for batch in batches for row in batch]


def check(shuffle, after):
    whole = loader(shuffle)
    epochs = [epoch(whole) for _ in range(after + 1)]
    first = loader(shuffle)
    for number in range(after):
        assert epoch(first) == epochs[number], "it is not repeatable"
    resumed = loader(shuffle)
    resumed.load_state_dict(first.state_dict())
    rows = epoch(resumed)
    used = [b for _, b in sum(epochs[:after], [])]
    begun = used[len(used) // 23 * 23 :]  # what this pass over the second stream has had
    again = set(begun) & {b for _, b in rows[: 23 - len(begun)]}
    print(f"shuffle={shuffle}, saved after epoch {after}: {rows[:3]}..., not interrupted "
          f"{epochs[after][:3]}...; of the second stream {len(again)} rows come twice in one pass")
    # In the middle of the epoch before it is right:
    first, resumed = loader(shuffle), loader(shuffle)
    for _ in range(after - 1):
        epoch(first)
    batches = iter(first)
    for _ in range(4):
        next(batches)
    resumed.load_state_dict(first.state_dict())
    assert epoch(resumed) == epochs[after - 1][12:], "the middle of an epoch is wrong too"
    return rows == epochs[after], len(again)


for after in (1, 2, 3):
    assert check(False, after) == (True, 0), "it is wrong without a shuffle too"
    exact, again = check(True, after)
    assert not exact, "it resumes exactly"
PY
"$tmp/v/bin/python" seen.py 2>/dev/null
