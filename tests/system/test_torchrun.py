"""Ranks may be started from outside: torchrun and the command line train what one process trains."""

import json
import os
import signal
import socket
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
    children = children_of(agent.pid)
    assert len(children) == 2
    for pid in (*children, agent.pid):
        os.kill(pid, signal.SIGTERM)
    said, _ = agent.communicate(timeout=60)
    (saved,) = list_steps(RunFolder.open(str(run)).storage)
    assert f"stopped at step {saved.step:,} of 100,000" in said


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_agent(config: Path, run: Path, *, port: int, host: bool) -> subprocess.Popen[str]:
    """Start an agent with one rank, which counts every machine that comes or goes."""
    quick = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:3", "--nproc-per-node", "1"),
        *("--max-restarts", "5", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"),
        *("--local-addr", "127.0.0.1", "--rdzv-conf", f"is_host={int(host)},{quick}", "--monitor-interval", "0.5"),
    ]
    return subprocess.Popen(
        [*torchrun, "-m", "datastore", "train", str(config), "--to", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


@pytest.mark.slow
def test_workers_of_rounds_leave_and_join_while_others_go_on(tmp_path: Path) -> None:
    """Two workers; one is killed with its agent; a third one comes: no sample is lost, and nothing is started by hand."""
    make_language(tmp_path / "data")
    config, run = tmp_path / "run.toml", tmp_path / "run"
    rounds = ["sync.use=diloco", "sync.every=5", "checkpoint.every=10", "eval.every=0"]
    config.write_text(toml_of(tiny_settings(tmp_path / "data", "train.steps=100000", *rounds)))

    def wait_for(sessions: int, steps: int) -> None:
        """Wait for so many sessions, and for a checkpoint that comes `steps` after the beginning of the newest."""
        deadline = time.monotonic() + 120
        while True:
            found = RunFolder.open(str(run)).sessions() if (run / "sessions").exists() else []
            saved = [int(one.stem) for one in (run / "steps").glob("*.json")] if found else []
            if len(found) == sessions and max(saved, default=0) >= found[-1].from_step + steps:
                return
            assert time.monotonic() < deadline, (sessions, steps, found, saved)
            threading.Event().wait(0.2)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [start_agent(config, run, port=port, host=host) for host in (True, False)]
    try:
        wait_for(1, 10)
        for pid in (agents[1].pid, *children_of(agents[1].pid)):
            os.kill(pid, signal.SIGKILL)
        wait_for(2, 10)
        agents.append(start_agent(config, run, port=port, host=False))
        wait_for(3, 10)
        ranks = [pid for agent in (agents[0], agents[2]) for pid in (*children_of(agent.pid), agent.pid)]
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        for agent in agents:
            agent.wait(60)
    finally:
        for agent in agents:
            agent.kill()
    proof = prove(str(run))
    assert proof.holds
    assert proof.worlds == [2, 1, 2]
