"""The main job on real input, typed as a user would type it: every command is shown before it runs.

Python's own standard library becomes a dataset, a tokenizer, a model; the run is killed in the middle of a step, resumed on
two processes, proven complete, traced back to bytes, pruned, quantized, and asked for a few lines of Python. Called by
`tools/demo`. What is done is remembered in demo/progress.json, so an interrupted demo goes on.
"""

import json
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("demo")
PROGRESS = DEMO / "progress.json"
DATASTORE = str(Path(sys.executable).parent / "datastore")
LIBRARY = Path(sysconfig.get_paths()["stdlib"])

SOURCE = [str(LIBRARY), "--include", "*.py", "--exclude", "site-packages", "--exclude", "dist-packages"]
STEPS = 240
KILLED_AFTER = 100
PRUNE_FROM = 160
TRACED = 120
CONFIG = f"""\
# The demo's run. Every key is explained in docs/trainer.md.
[data]
url = "demo/data"
seq_len = 256
global_batch = 16
seed = 7
holdout = 0.01

[model]
layers = 4
width = 256
heads = 4
kv_heads = 2

[optim]
lr = 1.5e-3
warmup = 20

[train]
steps = {STEPS}

[checkpoint]
every = 40
keep = 100

[eval]
every = 80
samples = 64

[[hooks]]
use = "prune"
ratio = 2.0
start = {PRUNE_FROM}
stop = {STEPS - 30}

[[hooks]]
use = "demo_hook:PullThePlug"
step = {KILLED_AFTER}
marker = "demo/plug-pulled"
"""


@dataclass
class Progress:
    """What is done, and the figures for the table at the end."""

    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def load() -> "Progress":
        """Return what an interrupted demo left behind, or a clean start."""
        if not PROGRESS.exists():
            return Progress()
        return Progress(**json.loads(PROGRESS.read_text(encoding="utf-8")))

    def save(self) -> None:
        """Remember, for the case that the next phase is interrupted."""
        PROGRESS.write_text(json.dumps({"seconds": self.seconds, "figures": self.figures}, indent=2), encoding="utf-8")


def show(*words: str, expect: int = 0, path: bool = False) -> None:
    """Show and run one command line of `datastore`; it must end with `expect`."""
    prefix = "PYTHONPATH=tools " if path else ""
    print(f"\n$ {prefix}datastore {' '.join(shown(word) for word in words)}", flush=True)
    done = subprocess.run(command(words, path=path), check=False)
    if done.returncode != expect:
        sys.exit(
            f"demo: that command ended with {done.returncode}, not {expect}. Running tools/demo again goes on from here."
        )


def ask(*words: str) -> Any:
    """Run one command line with --json and return what it says."""
    done = subprocess.run(command((*words, "--json"), path=True), stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def command(words: tuple[str, ...], *, path: bool) -> list[str]:
    """Return the arguments that run `datastore`, with tools/ importable if `path`."""
    return [*(("env", "PYTHONPATH=tools") if path else ()), DATASTORE, *words]


def shown(word: str) -> str:
    """Return `word` as one would type it in a shell."""
    return f"'{word}'" if any(letter in word for letter in " *\n") else word
