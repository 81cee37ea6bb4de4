#!/usr/bin/env bash
# litdata 0.2.76 with torch 2.13.0, CPU, 2026-11-28.
# A CombinedStreamingDataset (a weighted mixture) read by a StreamingDataLoader with two
# workers and resumed from the loader's state dict repeats rows and leaves out others:
# the rows used of each dataset are shared out evenly over the workers, though each worker
# draws its own mixture. One dataset alone, or the mixture without workers, resumes exactly.
# Why it matters: mixtures with workers are how language models are pretrained, and
# resuming them is what the library is advertised for; counts and shapes look right.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq litdata==0.2.76 torch==2.13.0 numpy==2.4.6
cd "$tmp"
cat > seen.py <<'PY'
import os

os.environ["DATA_OPTIMIZER_CACHE_FOLDER"] = os.path.abspath("cache")
from litdata import CombinedStreamingDataset, StreamingDataLoader, StreamingDataset
from litdata.streaming.cache import Cache


def write(folder, rows):
    cache = Cache(folder, chunk_size=25)
    for i, row in enumerate(rows):
        cache[i] = row
    cache.done()
    cache.merge()


def loader(mixture, workers):
    web = StreamingDataset("web", shuffle=False)
    books = StreamingDataset("books", shuffle=False)
    mixed = CombinedStreamingDataset(
        [web, books], weights=[0.8, 0.2], seed=1, iterate_over_all=False)
    return StreamingDataLoader(mixed if mixture else web, batch_size=5, num_workers=workers)


def flat(batches):
    return [int(row) for batch in batches for row in batch]


def resumed(mixture, workers):
    whole = flat(loader(mixture, workers))
    first = loader(mixture, workers)
    batches = iter(first)
    seen = flat([next(batches) for _ in range(30)])
    state = first.state_dict()
    del batches, first
    second = loader(mixture, workers)
    second.load_state_dict(state)
    rest = flat(second)
    assert seen == whole[:150] and len(set(whole)) == len(whole)
    twice = sorted(set(seen) & set(rest))
    last = {row // 1000: row for row in sorted(rest)}  # of each dataset
    lost = sorted(row for row in set(whole) - set(seen + rest) if row < last[row // 1000])
    name = "mixture" if mixture else "one dataset"
    print(f"{name}, {workers} workers: {'exact' if rest == whole[150:] else 'not exact'}, "
          f"{len(twice)} rows twice {twice}, {len(lost)} skipped {lost}")
    return rest == whole[150:], twice, lost


if __name__ == "__main__":
    write("web", range(500))
    write("books", range(1000, 1200))
    assert resumed(False, 2) == (True, [], [])
    assert resumed(True, 0) == (True, [], [])
    exact, twice, lost = resumed(True, 2)
    assert not exact and twice and lost
PY
"$tmp/v/bin/python" -W ignore seen.py 2>err.txt || { cat err.txt; exit 1; }
