#!/usr/bin/env bash
# tensorboard 2.21.0 with torch 2.13.0 (torch.utils.tensorboard), CPU, 2026-11-29.
# A run logs steps 1 to 100, is killed, and goes on from step 51 with SummaryWriter(purge_step=51),
# which is there to hide what was logged from step 51 on. The Python server (--load_fast=false) hides nothing
# at the first resume:
# both lines are shown, end to end, so the curve goes back. At the second resume it works. It takes the first START record
# for the beginning of the run, and a run that began without purge_step has written none.
# The fast server (tensorboard-data-server 0.7.2) and EventAccumulator, which scripts read event files by, hide the steps.
# Why it matters: one folder of event files has two curves, depending on who serves it; the one with
# more steps than the run took has the loss of before the crash as its last steps.
# Way out: write a START record when a run begins, too (purge_step=0); shown below.
# Upstream: no issue known.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"${PYTHON:-python3}" -m venv "$tmp/v"
"$tmp/v/bin/pip" install -qq torch==2.13.0 numpy==2.4.6 tensorboard==2.21.0 tensorboard-data-server==0.7.2 setuptools==80.9.0
cd "$tmp"
cat > seen.py <<'PY'
import json
import socket
import subprocess
import sys
import time
from contextlib import suppress
from urllib.request import urlopen

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter


def session(folder, steps, loss, **options):
    with SummaryWriter(folder, filename_suffix=f".{time.time_ns()}", **options) as writer:
        for step in steps:
            writer.add_scalar("loss", loss, step)
    time.sleep(1.1)  # the names of event files begin with the second


def accumulated(folder):
    found = EventAccumulator(folder)
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars("loss")]


def served(folder, fast):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port), "--load_fast", fast]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    last = None
    try:
        for _ in range(60):
            time.sleep(1)
            with suppress(OSError):
                address = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=.&tag=loss"
                now = [(step, value) for _, step, value in json.load(urlopen(address))]
                if now and now == last:
                    return now
                last = now
        raise AssertionError("TensorBoard shows nothing")
    finally:
        server.terminate()
        server.wait()


session("run", range(1, 101), 1.0)
session("run", range(51, 61), 2.0, purge_step=51)
wanted = [(step, 1.0) for step in range(1, 51)] + [(step, 2.0) for step in range(51, 61)]
by_python, slow, fast = accumulated("run"), served("run", "false"), served("run", "true")
for name, points in {"EventAccumulator": by_python, "--load_fast=false": slow, "--load_fast=true": fast}.items():
    print(f"{name}: {len(points)} points of 60 steps, the largest step is {max(points)[0]}")
assert by_python == fast == wanted, "these readers show something else"
assert slow == [(step, 1.0) for step in range(1, 101)] + wanted[50:], "the Python server hides them"

session("run", range(56, 59), 3.0, purge_step=56)
again = served("run", "false")
print(f"after a second resume, from 56: {len(again)} points, the largest step is {max(again)[0]}")
assert max(again)[0] == 58, "the second resume hides nothing, either"

session("other", range(1, 101), 1.0, purge_step=0)
session("other", range(51, 61), 2.0, purge_step=51)
other = served("other", "false")
print(f"with purge_step=0 at the beginning: {len(other)} points")
assert other == wanted, "the way out is none"
PY
"$tmp/v/bin/python" -W ignore seen.py
