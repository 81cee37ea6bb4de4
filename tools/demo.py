"""The main job on real input, typed as a user would type it: every command is shown before it runs.

Python's own standard library becomes a dataset, a tokenizer, a model; the run is killed in the middle of a step, resumed on
two processes, proven complete, traced back to bytes, compared with a run that was not pruned, quantized, and asked for a few
lines of Python. Called by `tools/demo`. What is done is remembered in demo/progress.json, so an interrupted demo goes on.
"""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zstandard

from datastore.storage.resolve import open_storage
from datastore.training.metrics import read_metrics

ROOT = Path(__file__).resolve().parent.parent
DEMO = Path("demo")
PROGRESS = DEMO / "progress.json"
DATASTORE = str(Path(sys.executable).parent / "datastore")
SCRIPT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
"""Names this version of the demo: what another one has begun is not gone on with."""

ENVIRONMENT = os.environ | {"PYTHONPATH": "tools"}
"""Where the run finds its hook, `demo_hook:PullThePlug`."""

LIBRARY = Path(sysconfig.get_paths()["stdlib"])

SOURCE = [str(LIBRARY), "--include", "*.py", "--exclude", "site-packages", "--exclude", "dist-packages"]
STEPS = 240
KILLED_AFTER = 90
PRUNE_FROM = 160
TRACED = 85
DENSE = f"""\
# The demo's run, without its hooks. Every key is explained in docs/trainer.md.
[data]
url = "demo/data"
seq_len = 128
global_batch = 16
seed = 7
holdout = 0.01

[model]
layers = 4
width = 128
heads = 4
kv_heads = 2

[optim]
lr = 3e-3
warmup = 20

[train]
steps = {STEPS}
threads = 1

[checkpoint]
every = 20
keep = 100

[eval]
every = 40
samples = 128
"""
CONFIG = f"""\
{DENSE}
[[hooks]]
use = "prune"
ratio = 2.0
start = {PRUNE_FROM}
stop = {STEPS - 20}

[[hooks]]
use = "demo_hook:PullThePlug"
step = {KILLED_AFTER}
marker = "demo/plug-pulled"
"""


Figures = dict[str, Any]


@dataclass
class Progress:
    """What is done, and the figures for the table at the end."""

    script: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    figures: Figures = field(default_factory=dict)

    @staticmethod
    def load() -> "Progress":
        """Return what an interrupted demo left behind; a clean start if that was another demo, or there was none."""
        if not PROGRESS.exists():
            return Progress(SCRIPT)
        found = Progress(**json.loads(PROGRESS.read_text(encoding="utf-8")))
        return found if found.script == SCRIPT else Progress(SCRIPT)

    def save(self) -> None:
        """Remember, for the case that the next phase is interrupted."""
        PROGRESS.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")


def run(*words: str, expect: int = 0) -> None:
    """Show and run one command line of `datastore`; it must end with `expect`."""
    print(f"\n$ datastore {shlex.join(words)}", flush=True)
    with subprocess.Popen([DATASTORE, *words], env=ENVIRONMENT) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # It got the signal, too, and is putting its things in order.
            raise
    if status != expect:
        sys.exit(f"demo: that command ended with {status}, not {expect}. tools/demo goes on from here.")


def ask(*words: str) -> Any:
    """Run one command line with --json and return what it says."""
    done = subprocess.run([DATASTORE, *words, "--json"], env=ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def run_json(*words: str) -> Any:
    """Show and run one command line that reports; show and return what it says."""
    print(f"\n$ datastore {shlex.join(words)} --json", flush=True)
    found = ask(*words)
    print(json.dumps(found), flush=True)
    return found


def make_tokenizer(_figures: Figures) -> None:
    """A 16k byte-level BPE tokenizer, trained from the sources."""
    run("tokenizer", "train", *SOURCE, "--vocab", "16384", "--to", "demo/tokenizer.json")


def ingest(_figures: Figures) -> None:
    """The sources become one version of a dataset. Python's own tests hold a few files that are no UTF-8: they are set aside."""
    target = ("--to", "demo/data", "--tokenizer", "demo/tokenizer.json")
    run("ingest", *SOURCE, *target, "--max-reject-ratio", "0.01", "--set", "task_bytes=4194304")


def look(figures: Figures) -> None:
    """What is in it, and whether every byte is as it was written."""
    run("show", "demo/data")
    run("ls", "demo/data", "--documents", "--limit", "3")
    run("verify", "demo/data")
    figures["totals"] = ask("show", "demo/data")["totals"]


def train_and_die(_figures: Figures) -> None:
    """A small GPT learns, until the process is killed between a backward pass and its update."""
    Path("demo/run.toml").write_text(CONFIG, encoding="utf-8")
    if not Path("demo/plug-pulled").exists():
        run("train", "demo/run.toml", "--to", "demo/run", expect=-signal.SIGKILL)
    print(f"killed with SIGKILL in the middle of step {KILLED_AFTER + 1}; the last checkpoint is older than that")


def resume(figures: Figures) -> None:
    """The run goes on from its last checkpoint, now on two processes."""
    run("resume", "demo/run", "--processes", "2")
    lines = read_metrics(open_storage("demo/run"))
    figures["losses"] = [lines[0]["loss"], sum(line["loss"] for line in lines[-10:]) / 10]
    print("\nloss on the training data, over all restarts:")
    for line in (lines[0], *lines[19::20]):
        print(f"  step {line['step']:>3}  {line['loss']:6.3f}  {'#' * round(6 * line['loss'])}")


def prove(figures: Figures) -> None:
    """What the run recorded is compared with what the order plans: nothing lost, nothing twice."""
    run("prove", "demo/run")
    figures["proof"] = ask("prove", "demo/run")
    run("checkpoint", "ls", "demo/run")


def trace(figures: Figures) -> None:
    """One step, back to the files: its text is compared with the bytes on disk."""
    run("trace", "demo/run", "--step", str(TRACED), "--limit", "2")
    found = ask("trace", "demo/run", "--step", str(TRACED), "--limit", "0")
    figures["traced"] = check_trace(found)


def train_dense(_figures: Figures) -> None:
    """The same run without pruning: as many steps, and in each of them the same samples. The others are compared with it."""
    Path("demo/dense.toml").write_text(DENSE, encoding="utf-8")
    run("train", "demo/dense.toml", "--to", "demo/dense", "--processes", "2")


def compress(figures: Figures) -> None:
    """A hook pruned the layers from step 160 on, and quantization happens on export. All have seen the same: what does each cost?"""
    models: dict[str, Any] = {}
    for name, source, words in (
        ("dense", "demo/dense", ()),
        ("dense, int8", "demo/dense", ("--quantize", "int8")),
        ("pruned to half", "demo/run", ()),
        ("pruned, int8", "demo/run", ("--quantize", "int8")),
    ):
        folder = f"demo/model/{name.replace(', ', '-').replace(' ', '-')}"
        run("checkpoint", "export", source, folder, "--step", str(STEPS), "--replace", *words)
        weights = Path(folder, "model.safetensors").read_bytes()
        packed = len(zstandard.compress(weights, 3))
        loss = run_json("evaluate", folder, "--run", "demo/run")["loss"]
        models[name] = {"bytes": len(weights), "zstd_bytes": packed, "loss": loss}
    figures["models"] = models


def generate(_figures: Figures) -> None:
    """The smallest of them writes a few lines."""
    run("generate", "demo/model/pruned-int8", "--prompt", "def ", "--tokens", "80", "--seed", "3")


def check_trace(found: Any) -> dict[str, int]:
    """Compare the text of every passage of a traced step with the bytes of its file."""
    passages = [span for sample in found["samples"] for span in sample["spans"]]
    for passage in passages:
        raw = (LIBRARY.parent / passage["source"]).read_bytes()[passage["start"] : passage["stop"]]
        if raw.decode("utf-8", errors="replace") != passage["text"]:
            sys.exit(f"demo: {passage['source']}, byte {passage['start']}, is not what the step saw")
    files = len({passage["source"] for passage in passages})
    print(
        f"\nall {len(passages)} passages of step {found['step']}, from {files} files, are on disk as the step saw them"
    )
    return {"passages": len(passages), "files": files}


PHASES: dict[str, Callable[[Figures], None]] = {
    "train a tokenizer": make_tokenizer,
    "ingest": ingest,
    "look at it": look,
    "train, and die": train_and_die,
    "resume on two processes": resume,
    "prove": prove,
    "trace": trace,
    "train without pruning": train_dense,
    "prune and quantize": compress,
    "generate": generate,
}


def summary(progress: Progress) -> None:
    """Print what came out, in one table."""
    figures = progress.figures
    totals, proof, models = figures["totals"], figures["proof"], figures["models"]
    first, last = figures["losses"]
    ranks = ", then ".join(str(world) for world in proof["worlds"])
    told = {
        "train a tokenizer": "16,384 ids, byte-level BPE",
        "ingest": f"{totals['documents']:,} files, {totals['tokens']:,} tokens, {totals['shards']} shards",
        "look at it": "every byte is as it was written",
        "train, and die": f"SIGKILL in the middle of step {KILLED_AFTER + 1}",
        "resume on two processes": f"loss {first:.2f} at step 1, {last:.2f} over the last ten of {STEPS} steps",
        "prove": f"{proof['samples']:,} samples planned, each consumed exactly once, on {ranks} rank(s)",
        "trace": f"step {TRACED}: {figures['traced']['passages']} passages in {figures['traced']['files']} files, "
        "byte for byte",
        "train without pruning": f"the same samples, step by step, up to step {STEPS}",
        "prune and quantize": f"four models of {STEPS} steps, see below",
        "generate": "see above",
    }
    rule = "-" * 100
    print(f"\n{rule}\n{'phase':<26}{'seconds':>9}  result")
    for name, seconds in progress.seconds.items():
        print(f"{name:<26}{seconds:>9.1f}  {told[name]}")
    print(f"{'together':<26}{sum(progress.seconds.values()):>9.1f}\n")
    print(f"{'model':<26}{'MB':>9}{'MB, zstd':>11}{'validation loss':>18}")
    for name, model in models.items():
        sizes = f"{model['bytes'] / 1e6:>9.1f}{model['zstd_bytes'] / 1e6:>11.1f}"
        print(f"{name:<26}{sizes}{model['loss']:>18.4f}")
    used = sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file())
    print(
        f"{rule}\nEverything lies in demo/ ({used / 1e6:.0f} MB). tools/demo again begins anew; docs/tutorial.md goes on."
    )


def main(arguments: list[str]) -> int:
    """Do every phase that is not done yet, then print the table."""
    os.chdir(ROOT)
    progress = Progress.load()
    if arguments not in ([], ["--fresh"]):
        print("usage: tools/demo [--fresh]", file=sys.stderr)
        return 2
    if arguments or len(progress.seconds) in {0, len(PHASES)}:
        shutil.rmtree(DEMO, ignore_errors=True)
        progress = Progress(SCRIPT)
    DEMO.mkdir(exist_ok=True)
    try:
        for number, (name, phase) in enumerate(PHASES.items(), start=1):
            if name not in progress.seconds:
                print(f"\n=== {number} of {len(PHASES)}: {name}\n{phase.__doc__}", flush=True)
                started = time.monotonic()
                phase(progress.figures)
                progress.seconds[name] = time.monotonic() - started
                progress.save()
    except KeyboardInterrupt:
        print("\ndemo: interrupted. tools/demo goes on from here; tools/demo --fresh begins anew.", file=sys.stderr)
        return 130
    summary(progress)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
