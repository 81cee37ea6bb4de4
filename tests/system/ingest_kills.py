"""Kills ingests at random moments, goes on, and holds the bytes against those of one that nobody disturbed.

    python ingest_kills.py FOLDER [--kills N] [--seed N] [--only NAME,...] [--to URL]

Each kind of ingest is run over and over on new datasets. A run is ended by SIGKILL after a random part of the time that a
whole one takes: the coordinator, one of its workers, or, from the moment that the last task is marked done, the coordinator
in its commit. Then it is started again until one gets through; the newest version must name the same files, in the same
order, with the same bytes, and its deletions be the same. With `--to`, the datasets are at that URL, such as a bucket's folder.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import orjson

from datastore.dataset.snapshot import open_dataset
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.storage.resolve import open_storage
from datastore.storage.urls import join_url

TEMPLATE = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"

COMMON = ("--set", "task_bytes=20000", "--set", "shard_bytes=8192", "--max-reject-ratio", "0.9")

FILTERS = '[[filters]]\nuse = "length"\nmin_words = 20\n'


def texts(folder: Path, rng: random.Random, *, files: int = 8) -> None:
    folder.mkdir(parents=True)
    words = [f"w{rng.randrange(10**6)}" for _ in range(300)]
    for number in range(files):
        rows = [
            {"id": f"{number}-{row % 95}", "text": " ".join(rng.choices(words, k=rng.randrange(5, 80)))}
            for row in range(100)
        ]
        (folder / f"{number}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows) + b"{bad\n")


def chats(folder: Path, rng: random.Random) -> None:
    folder.mkdir(parents=True)
    words = [f"w{rng.randrange(10**6)}" for _ in range(300)]
    for number in range(6):
        rows = [
            {
                "messages": [
                    {"role": role, "content": " ".join(rng.choices(words, k=rng.randrange(3, 60)))}
                    for role in ("user", "assistant", "user", "assistant")
                ]
            }
            for _ in range(60)
        ]
        (folder / f"{number}.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))


class Kind:
    """A kind of ingest: its sources, its options, and what lies in a dataset before it begins."""

    def __init__(self, root: Path, name: str, *, to: str = "") -> None:
        self.name = name
        self.root = root / name
        self.to = join_url(to or str(root), name)
        rng = random.Random(17)
        source = self.root / "src"
        (chats if name == "chats" else texts)(source, rng)
        raw = train_tokenizer([str(source)], settings=TokenizerSettings(vocab_size=500)) if name != "chats" else None
        if raw is None:
            texts(self.root / "words", rng, files=2)
            raw = train_tokenizer([str(self.root / "words")], settings=TokenizerSettings(vocab_size=500))
        (self.root / "tok.json").write_bytes(raw)
        (self.root / "template.jinja").write_text(TEMPLATE)
        (self.root / "filters.toml").write_text(FILTERS)
        self.before: str | None = None
        if name == "replace":
            self.before = join_url(self.to, "before")
            empty(self.before)
            settings = IngestSettings(tokenizer=str(self.root / "tok.json"), workers=1, max_reject_ratio=0.9)
            ingest(str(source), self.before, settings=settings)
            texts(self.root / "new", random.Random(23))
            for path in sorted((self.root / "new").iterdir())[::2]:
                shutil.copy(path, source / path.name)

    def options(self, workers: int) -> list[str]:
        found = ["--tokenizer", str(self.root / "tok.json"), "--workers", str(workers), *COMMON]
        if self.name == "chats":
            found += ["--chat", "--chat-template", str(self.root / "template.jinja")]
        if self.name == "filters":
            found += ["--config", str(self.root / "filters.toml")]
        return [*found, "--replace"] if self.name == "replace" else found

    def command(self, to: str, workers: int) -> list[str]:
        return [
            *(sys.executable, "-m", "datastore", "ingest", str(self.root / "src"), "--to", str(to)),
            *self.options(workers),
        ]

    def begin(self, to: str) -> None:
        empty(to)
        if self.before is not None:
            before, target = open_storage(self.before), open_storage(to)
            for each in before.list():
                target.put(each.key, before.get(each.key))


def empty(url: str) -> None:
    storage = open_storage(url)
    for each in list(storage.list()):
        storage.delete(each.key)


def contents(to: str) -> str:
    """Return the digest of all that the newest version says, and of the files that it names."""
    dataset, storage = open_dataset(to), open_storage(to)
    digest = hashlib.sha256(f"{dataset.version}".encode())
    for index in range(len(dataset.segments)):
        shard = dataset.segments.shard(index)
        paths = [path for path in (shard.path, shard.docs_path) if path]
        for path in paths:
            digest.update(path.encode() + hashlib.sha256(storage.get(path)).digest())
        digest.update(dataset.deletions.rows(shard.uid).tobytes())
    for key in sorted(each.key for each in storage.list("ingests") if "/rejects/" in each.key):
        digest.update(key.rpartition("/")[2].encode() + storage.get(key))
    return digest.hexdigest()


def done_in(to: str) -> int:
    """Return how many tasks are marked done."""
    return sum("/done/" in each.key for each in open_storage(to).list("ingests"))


def children(pid: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def wait_for(process: subprocess.Popen[bytes], condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.001)
    return False


def kill_once(kind: Kind, to: str, whole_s: float, tasks: int, rng: random.Random) -> str:
    """Start an ingest and kill something; return what, or `done` if it got through first."""
    what = rng.choice(("coordinator", "worker", "commit"))
    process = subprocess.Popen(kind.command(to, 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if what == "commit":
        # The last task is marked, so what goes on is the commit.
        ready = wait_for(process, lambda: done_in(to) >= tasks, 60)
        time.sleep(rng.uniform(0, 0.3 if "://" in to else 0.06) if ready else 0)
    else:
        wait_for(process, lambda: False, rng.uniform(0.15, 1) * whole_s)
    victim = process.pid
    if what == "worker":
        crew = children(process.pid)
        victim = rng.choice(crew) if crew else process.pid
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
    code = process.wait(120)
    return "done" if code == 0 else what


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="text,chats,filters,replace")
    parser.add_argument("--to", default="")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    kinds, expected = [], {}
    for name in options.only.split(","):
        kind = Kind(options.folder, name, to=options.to)
        to = join_url(kind.to, "undisturbed")
        kind.begin(to)
        started = time.monotonic()
        subprocess.run(kind.command(to, 2), check=True, stdout=subprocess.DEVNULL, timeout=120)
        kinds.append(kind)
        expected[name] = (contents(to), time.monotonic() - started, done_in(to))
    counts: Counter[str] = Counter()
    datasets = 0
    while sum(counts.values()) - counts["done"] < options.kills:
        kind = kinds[datasets % len(kinds)]
        wanted, whole_s, tasks = expected[kind.name]
        to = join_url(kind.to, "data")
        kind.begin(to)
        for _ in range(rng.randrange(1, 6)):
            counts[kill_once(kind, to, whole_s, tasks, rng)] += 1
        subprocess.run(kind.command(to, 1 + datasets % 3), check=True, stdout=subprocess.DEVNULL, timeout=120)
        assert contents(to) == wanted, f"{kind.name}: other bytes than undisturbed, seed {options.seed}, {to}"
        datasets += 1
        sys.stdout.write(json.dumps({"datasets": datasets, **counts}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
