"""Ranks may be started from outside: torchrun and the command line train what one process trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from datastore.testing.examples import make_language, tiny_settings
from datastore.training.metrics import read_metrics
from datastore.training.run.audit import prove
from datastore.training.run.folder import RunFolder
from datastore.training.settings import Settings, flatten
from datastore.training.start import train


def toml_of(settings: Settings) -> str:
    values = {key: value for key, value in flatten(settings).items() if value is not None and key != "hooks"}
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


@pytest.mark.slow
def test_two_ranks_of_torchrun_train_what_one_process_trains(tmp_path: Path) -> None:
    make_language(tmp_path / "data")
    settings = tiny_settings(tmp_path / "data", "train.steps=6")
    train(settings, str(tmp_path / "one"))
    config = tmp_path / "run.toml"
    config.write_text(toml_of(settings))
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
