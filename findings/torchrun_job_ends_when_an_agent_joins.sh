#!/usr/bin/env bash
# torch 2.13.0 (torchrun, c10d rendezvous), CPU, gloo, 2026-11-29.
# A job of `torchrun --nnodes 1:2` runs on one agent. A second agent with the same command joins, as the first line of torchrun's
# documentation of elastic jobs says it can: the first agent stops its worker for the new round, and no round begins. The agent that
# joined fails after the read timeout (60 s), and then the first one fails as well: the job is over.
# The same happens with `--nnodes 2` when an agent was killed and is started again (tried by hand).
# With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of all agents the two go on together.
# Expected: the same without it.
# Why it matters: a machine that is added, or comes back after a crash, ends the run that it should help.
# Cause, as far as read: since rendezvous and workers share a store, an agent announces the address of that store in its first round
# only, and who joins later waits for it in the second.
# Upstream: pytorch/pytorch pull request 128096 shares the store; issue 147064 is about agents that leave and come back.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6 setuptools==80.9.0
cd "$tmp"
cat > worker.py <<'PY'
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

dist.init_process_group("gloo", timeout=timedelta(seconds=30))
with open(sys.argv[1], "a") as log:
    log.write(f"met of {os.environ['WORLD_SIZE']}\n")
while True:
    dist.all_reduce(torch.ones(1))
    time.sleep(0.2)
PY
cat > seen.py <<'PY'
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def seen(name, **variables):
    """Return how many workers have met in twos, and how each agent has ended, None if it goes on."""
    log, port = Path(name), free_port()

    def agent(host):
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1"),
            *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"),
            *("--rdzv-conf", f"is_host={int(host)},last_call_timeout=2", "--local-addr", "127.0.0.1"),
            *("--monitor-interval", "0.5", "worker.py", str(log)),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        errors = open(f"{name}.errors.{int(host)}", "w")
        return subprocess.Popen(command, stdout=errors, stderr=errors, env=environment, start_new_session=True)

    def wait_for(wanted, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end and not wanted():
            time.sleep(0.2)

    def met(world):
        return log.read_text().count(f"met of {world}\n") if log.exists() else 0

    agents = [agent(True)]
    try:
        wait_for(lambda: met(1) == 1, 120)
        assert met(1) == 1, "the first agent does not start"
        agents.append(agent(False))
        wait_for(lambda: met(2) == 2 or all(one.poll() is not None for one in agents), 240)
        return met(2), [one.poll() for one in agents]
    finally:
        for one in agents:
            for pid in [one.pid, *workers_of(one.pid)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            one.wait()


def workers_of(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


found = seen("shared")
print(f"as it is: {found[0]} workers of 2 met, the agents ended with {found[1]}")
other = seen("apart", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
print(f"with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: {other[0]} workers of 2 met, the agents ended with {other[1]}")
assert found == (0, [1, 1]), "the job goes on, or ends otherwise"
assert other == (2, [None, None]), "the way out is none"
PY
"$tmp/v/bin/python" seen.py
