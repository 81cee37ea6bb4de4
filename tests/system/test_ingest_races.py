"""Ingests of overlapping sources at once: every file is in the dataset once, whoever commits first, and the report says so."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.snapshot import open_dataset
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer

BARRIER = """
import sys, time
from pathlib import Path
import datastore.ingestion.ingest as module

_, mine, folder, count, *command = sys.argv
commit = module.commit_ingest

def commit_together(*args, **options):
    Path(folder, mine).touch()
    while len(list(Path(folder).iterdir())) < int(count):
        time.sleep(0.005)
    return commit(*args, **options)

module.commit_ingest = commit_together
"""

CLI = (
    BARRIER
    + """
from datastore.cli.main import main
sys.argv = ["datastore", *command]
main()
"""
)

API = (
    BARRIER
    + """
import json
from dataclasses import asdict
from datastore.ingestion.settings import IngestSettings

at = command.index("--to")
sources, to, rest = command[1:at], command[at + 1], command[at + 2:]
given = {"tokenizer": rest[rest.index("--tokenizer") + 1]} if "--tokenizer" in rest else {}
if "take=rows" in rest:
    given = {"take": "rows"}
print(json.dumps(asdict(module.ingest(sources, to, settings=IngestSettings(**given))), default=str))
"""
)


class Ground:
    """Files `src/<letter>` of texts, and tables of rows."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for letter in "abc":
            folder = root / "src" / letter
            folder.mkdir(parents=True)
            for number in range(3):
                (folder / f"{letter}{number}.txt").write_text(f"{letter}{number} " * (5 + number))
            pq.write_table(pa.table({"name": [f"{letter}{n}" for n in range(3)]}), root / "src" / f"{letter}.parquet")
        tokenizer = train_tokenizer([str(root / "src")], settings=TokenizerSettings(vocab_size=300))
        (root / "tok.json").write_bytes(tokenizer)

    def command(self, kind: str, letters: str) -> list[str]:
        names = [str(self.root / "src" / letter) for letter in letters]
        if kind == "rows":
            return [
                "ingest",
                *(f"{name}.parquet" for name in names),
                "--to",
                str(self.root / "set"),
                "--set",
                "take=rows",
            ]
        tokenizer = ["--tokenizer", str(self.root / "tok.json")] if kind == "tokens" else []
        return ["ingest", *names, "--to", str(self.root / "set"), *tokenizer]

    def found(self, kind: str) -> Counter[str]:
        dataset = open_dataset(self.root / "set")
        assert verify(dataset, deep=True).ok
        if kind == "rows":
            return Counter(dataset.to_arrow().column("name").to_pylist())
        return Counter(Path(str(name)).stem for name in dataset.to_arrow().column("source").to_pylist())


def run_at_once(ground: Ground, program: str, kind: str, *letters: str) -> list[dict[str, int]]:
    """Run an ingest of each of `letters`; none commits before all are ready to. Return their reports."""
    barrier = ground.root / "barrier"
    barrier.mkdir()
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                program,
                str(index),
                str(barrier),
                str(len(letters)),
                *ground.command(kind, each),
                "--json",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, each in enumerate(letters)
    ]
    outputs = []
    for process in started:
        try:
            outputs.append(process.communicate(timeout=120))
        except subprocess.TimeoutExpired:  # It waits for one that has ended: what that said is what matters.
            process.kill()
            outputs.append(process.communicate())
    assert [process.returncode for process in started] == [0] * len(letters), outputs
    return [json.loads(out) for out, _ in outputs]


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


@pytest.mark.parametrize("program", [CLI, API], ids=["cli", "api"])
@pytest.mark.parametrize("kind", ["tokens", "text", "rows"])
def test_of_two_ingests_at_once_each_shared_file_is_there_once(ground: Ground, program: str, kind: str) -> None:
    reports = run_at_once(ground, program, kind, "ab", "bc")
    assert ground.found(kind) == Counter(f"{letter}{number}" for letter in "abc" for number in range(3))
    shared = 1 if kind == "rows" else 3
    assert sorted(report["overtaken_files"] for report in reports) == [0, shared]
    assert sum(report["files"] for report in reports) == 3 * shared


def test_of_many_ingests_at_once_each_file_is_there_once(ground: Ground) -> None:
    reports = run_at_once(ground, CLI, "tokens", "ab", "bc", "ca", "abc")
    assert ground.found("tokens") == Counter(f"{letter}{number}" for letter in "abc" for number in range(3))
    assert sum(report["files"] for report in reports if report["added"]) == 9
