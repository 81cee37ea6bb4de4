"""Steps with bad gradients are skipped, or end in a rewind, as the settings say; ranks that die are started again."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datastore.checkpoint.inspect import list_steps
from datastore.errors import DatastoreError, WaitError
from datastore.testing.examples import tiny_settings
from datastore.training.export.export import open_model
from datastore.training.metrics import TrainingProgress, read_metrics
from datastore.training.run.audit import trace
from datastore.training.run.changes import flatten
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.settings import Settings
from datastore.training.start import resume, train

HERE = Path(__file__).parent


def settings(language: str, *overrides: str, **poison: Any) -> Settings:
    """A rate that does not depend on the number of steps, and a gradient that is bad in some."""
    hooks = ({"use": "training_hooks:Poison", **poison},) if poison else ()
    return tiny_settings(language, "optim.warmup=0", "optim.floor=1", "eval.every=0", *overrides, hooks=hooks)


def lines(run: Path) -> list[dict[str, Any]]:
    return read_metrics(RunFolder.open(str(run)).storage)


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (open_model(str(run)).model.state_dict() for run in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("processes", "parallel"), [(1, []), (2, ["parallel.shard=2"])], ids=["alone", "sharded"])
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_told(
    processes: int, parallel: list[str], language: str, tmp_path: Path
) -> None:
    notes: list[str] = []

    def told(progress: TrainingProgress) -> None:
        notes.append(progress.note)

    skipping = settings(language, "train.steps=8", "faults.non_finite=skip", *parallel, steps=[4])
    train(skipping, str(tmp_path), processes=processes, on_progress=told)
    found = lines(tmp_path)
    assert [line.get("fault") for line in found] == [None] * 3 + ["non_finite"] + [None] * 4
    assert "grad_norm" not in found[3]
    assert found[-1]["faults_skip"] == 1
    assert any("step 4 moved nothing" in note for note in notes)
    proof = prove(str(tmp_path))
    assert (proof.holds, proof.skipped, proof.rewound) == (True, 1, 0)
    assert trace(str(tmp_path), 4, limit=1).fault == "skip"
    assert trace(str(tmp_path), 5, limit=1).fault == ""


def test_a_skipped_step_moves_neither_weights_nor_moments(language: str, tmp_path: Path) -> None:
    for name, steps in (("three", 3), ("four", 4)):
        chosen = settings(language, f"train.steps={steps}", "faults.non_finite=skip", steps=[4])
        train(chosen, str(tmp_path / name))
    assert_same_weights(tmp_path / "three", tmp_path / "four")


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_rewind_brings_back_the_last_checkpoint_and_goes_on_past_the_bad_samples(
    processes: int, language: str, tmp_path: Path
) -> None:
    once, twice, five = tmp_path / "once", tmp_path / "twice", tmp_path / "five"
    wanted = ["faults.non_finite=rewind"]
    train(settings(language, "train.steps=12", *wanted, steps=[8]), str(once), processes=processes)
    proof = prove(str(once))
    assert (proof.holds, proof.skipped, proof.rewound, proof.steps) == (True, 0, 1, 12)
    seen = trace(str(once), 8, limit=1)
    assert (seen.fault, seen.rewound_to) == ("rewind", 5)
    train(settings(language, "train.steps=8", *wanted, steps=[8]), str(twice), processes=processes)
    train(settings(language, "train.steps=5", *wanted, steps=[8]), str(five), processes=processes)
    assert_same_weights(twice, five)
    resume(str(twice), overrides=["train.steps=12"], processes=processes)
    assert_same_weights(once, twice)


def test_a_rewind_without_a_checkpoint_is_told(language: str, tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match="no checkpoint to rewind to"):
        train(settings(language, "faults.non_finite=rewind", steps=[3]), str(tmp_path))


def test_a_run_that_fails_before_its_first_checkpoint_is_told_so(language: str, tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match="not finite") as caught:
        train(settings(language, steps=[2]), str(tmp_path))
    assert "No step is saved: the run begins anew." in caught.value.hint


def test_bad_steps_without_end_end_the_run(language: str, tmp_path: Path) -> None:
    bad = settings(language, "faults.non_finite=skip", "faults.most=3", steps=list(range(7, 20)))
    with pytest.raises(DatastoreError, match="too many bad steps in a row") as caught:
        train(bad, str(tmp_path))
    assert caught.value.values["in_a_row"] == 4
    assert list_steps(RunFolder.open(str(tmp_path)).storage)[-1].step == 5


@pytest.mark.parametrize("policy", ["off", "skip", "rewind", "stop"])
def test_a_spike_is_what_the_settings_say(policy: str, language: str, tmp_path: Path) -> None:
    chosen = settings(language, "train.steps=28", "optim.lr=0.001", f"faults.spike={policy}", steps=[3, 27], by="1000")
    if policy == "stop":
        with pytest.raises(DatastoreError, match="far larger than usual"):
            train(chosen, str(tmp_path))
        return
    train(chosen, str(tmp_path))
    told = {line["step"]: line["fault"] for line in lines(tmp_path) if "fault" in line}
    assert told == ({} if policy == "off" else {27: "spike"})  # The third comes before there is a usual norm.


def test_a_policy_may_come_and_go_when_a_run_is_resumed(language: str, tmp_path: Path) -> None:
    train(settings(language, "train.steps=2"), str(tmp_path))
    resume(str(tmp_path), overrides=["train.steps=4", "faults.non_finite=skip"])
    resume(str(tmp_path), overrides=["train.steps=6", "faults.non_finite=stop"])
    assert prove(str(tmp_path)).steps == 6


def killing(language: str, folder: Path, *overrides: str) -> Settings:
    """Settings under which rank 0 dies in the middle of step 8, once."""
    file = folder / "kills.json"
    file.write_text(json.dumps([7]))
    hooks = ({"use": "training_hooks:Kill", "file": str(file)},)
    return tiny_settings(language, "train.steps=12", "checkpoint.every=3", *overrides, hooks=hooks)


def test_ranks_are_started_again_and_end_with_the_same_bits(language: str, tmp_path: Path) -> None:
    notes: list[str] = []

    def told(progress: TrainingProgress) -> None:
        notes.append(progress.note)

    chosen = killing(language, tmp_path, "faults.restarts=1")
    train(chosen, str(tmp_path / "killed"), processes=2, on_progress=told)
    assert any("a rank died (rank=0, cause=SIGKILL): started again" in note for note in notes)
    assert any("resumed at step" in note for note in notes)
    train(chosen, str(tmp_path / "whole"), processes=2)
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")
    assert prove(str(tmp_path / "killed")).sessions == 2


def test_without_restarts_left_the_dead_rank_is_named_and_the_way_on(language: str, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    chosen = killing(language, tmp_path)
    with pytest.raises(WaitError, match=r"rank=0, cause='SIGKILL'") as caught:
        train(chosen, run, processes=2)
    newest = list_steps(RunFolder.open(run).storage)[-1].step  # 6, or 3 if it died before that one was committed.
    assert caught.value.hint == f"All that was saved stands: `datastore resume {run}` goes on from step {newest}."
    chosen = killing(language, tmp_path, "checkpoint.every=0")
    with pytest.raises(WaitError, match=r"No checkpoint had been saved: train it again\."):
        train(chosen, str(tmp_path / "none"), processes=2)


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.1)


def test_a_signal_to_one_rank_alone_stops_all_of_them_in_order(language: str, tmp_path: Path) -> None:
    config, run = tmp_path / "run.toml", tmp_path / "run"
    config.write_text(toml_of(tiny_settings(language, "train.steps=100000", "checkpoint.every=0", "eval.every=0")))
    command = [sys.executable, "-m", "datastore", "train", str(config), "--to", str(run), "--processes", "2"]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_until(lambda: list((run / "sessions").glob("*.json")))
    threading.Event().wait(1)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGTERM)
    said, trouble = parent.communicate(timeout=60)
    assert parent.returncode == 0, trouble
    (saved,) = list_steps(RunFolder.open(str(run)).storage)
    assert f"stopped at step {saved.step:,} of 100,000" in said


def toml_of(chosen: Settings) -> str:
    values = {key: value for key, value in flatten(chosen).items() if value is not None and key != "hooks"}
    text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
    tables = ("".join(f"{key} = {json.dumps(value)}\n" for key, value in hook.items()) for hook in chosen.hooks)
    return text + "".join(f"[[hooks]]\n{table}" for table in tables)


@pytest.mark.slow
def test_the_agent_of_torchrun_starts_ranks_again_from_the_last_checkpoint(language: str, tmp_path: Path) -> None:
    config, run = tmp_path / "run.toml", tmp_path / "run"
    config.write_text(toml_of(killing(language, tmp_path)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    done = subprocess.run(
        [*torchrun, "-m", "datastore", "train", str(config), "--to", str(run)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stderr
    proof = prove(str(run))
    assert (proof.holds, proof.steps, proof.sessions) == (True, 12, 2)
