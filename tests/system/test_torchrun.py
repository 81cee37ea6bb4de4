"""Ranks may be started from outside: torchrun and the command line train what one process trains."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from datastore.checkpoint.inspect import list_steps
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.metrics import read_metrics
from datastore.training.run.changes import flatten
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.settings import Settings
from datastore.training.start import train


def toml_of(settings: Settings) -> str:
    values = {key: value for key, value in flatten(settings).items() if value is not None and key != "hooks"}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["data", "shard", "tensor", "pipeline", "context"])
def test_two_ranks_of_torchrun_train_what_one_process_trains(size: str, tmp_path: Path) -> None:
    make_language(tmp_path / "data")
    wanted = (str(tmp_path / "data"), "train.steps=6", "model.vocab_size=128")
    train(tiny_settings(*wanted), str(tmp_path / "one"))
    config = tmp_path / "run.toml"
    config.write_text(toml_of(tiny_settings(*wanted, f"parallel.{size}=2")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "datastore", "train", str(config), "--to", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished") == 1, "only rank 0 speaks"
    losses = [
        [line["loss"] for line in read_metrics(RunFolder.open(str(tmp_path / run)).storage)] for run in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert prove(str(tmp_path / "two")).worlds == [2]
    assert getattr(RunFolder.open(str(tmp_path / "two")).config().settings.parallel, size) == 2


@pytest.mark.slow
def test_a_signal_to_torchrun_and_all_its_ranks_finishes_the_step_and_saves(tmp_path: Path) -> None:
    make_language(tmp_path / "data")
    config, run = tmp_path / "run.toml", tmp_path / "run"
    config.write_text(toml_of(tiny_settings(tmp_path / "data", "train.steps=100000", "checkpoint.every=0")))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "datastore", "train", str(config), "--to", str(run)]
    agent = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((run / "sessions").glob("*.json")):
        assert time.monotonic() < deadline
        threading.Event().wait(0.1)
    threading.Event().wait(0.5)
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    assert len(children) == 2
    for pid in (*map(int, children), agent.pid):
        os.kill(pid, signal.SIGTERM)
    said, _ = agent.communicate(timeout=60)
    (saved,) = list_steps(RunFolder.open(str(run)).storage)
    assert f"stopped at step {saved.step:,} of 100,000" in said
