#!/usr/bin/env bash
# datatrove 0.10.1 (MinHash deduplication, default configuration), 2026-11-28.
# Before it compares documents, MinHash replaces every number by 0. So documents that differ in
# their numbers are the same to it: of 200 tables of measurements with not one number in common
# one is left, and of 60 weather reports of different days that all say the same sentences
# around other values as well. Tables of numbers of different length, too: the only run of
# five words that they have is "0 0 0 0 0", so they agree in all of nothing.
# Why it matters: logs, measurements, prices, statistics and worked examples in arithmetic are
# thrown away as duplicates, and what a model could learn of numbers with them.
# TextNormConfig(norm_numbers=False) keeps them, and is not the default.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq datatrove==0.10.1 spacy==3.8.18 regex==2026.11.19 xxhash==3.8.2 numpy==2.4.6 tokenizers==0.23.3
cd "$tmp"
cat > seen.py <<'PY'
import random
import tempfile
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.utils.text import TextNormConfig
from loguru import logger

logger.remove()


def removed(texts, config):
    folder = tempfile.mkdtemp()
    documents = (Document(text=text, id=str(i)) for i, text in enumerate(texts))
    MinhashDedupSignature(f"{folder}/sig", config).run(documents, 0, 1)
    buckets = MinhashDedupBuckets(f"{folder}/sig", f"{folder}/dup", config=config)
    for rank in range(config.num_buckets):
        buckets.run(None, rank, config.num_buckets)
    MinhashDedupCluster(f"{folder}/dup", f"{folder}/out", config=config).run(None, 0, 1)
    return sum(path.stat().st_size for path in Path(folder).glob("out/*")) // 4


draw = random.Random(0)
numbers = iter(draw.sample(range(100_000, 1_000_000), 200 * 130))
tables = [
    "\n".join(" ".join(f"{next(numbers) / 1000:.3f}" for _ in range(4)) for _ in range(draw.randint(8, 30)))
    for _ in range(200)
]
values = [number for table in tables for number in table.split()]
assert len(values) == len(set(values)), "no number is there twice"
say = (
    "On day {} of {} the station at {} metres had {} degrees in the morning and {} at noon, "
    "{} millimetres of rain, {} hours of sun and wind of {} kilometres an hour from {} degrees."
)
reports = [say.format(*(draw.randint(1, 9999) for _ in range(9))) for _ in range(60)]
for name, texts in (("tables", tables), ("reports", reports)):
    seen = removed(texts, MinhashConfig())
    kept = removed(texts, MinhashConfig(norm_config=TextNormConfig(norm_numbers=False)))
    print(f"{len(texts)} {name:8} removed {seen}, with norm_numbers=False {kept}")
    assert seen == len(texts) - 1, seen
    assert kept == 0, kept
PY
"$tmp/v/bin/python" seen.py 2>/dev/null
