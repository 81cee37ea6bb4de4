"""Every operation on a dataset is killed, and what is left is the old or the new version and a way on from there.

What is done and checked stands in `crash_program.py`. By hand, for the figures:

    .venv/bin/python tests/system/crash_program.py /tmp/crash --kills 1000
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from datastore.storage.resolve import join_url

PROGRAM = Path(__file__).with_name("crash_program.py")
A_FEW = 3
"""Kills of each operation in the fast suite; which ones is another choice for each operation."""


def kill(root: str, *, kills: int | None = None, timeout_s: float) -> None:
    """Kill so often in all, or each operation `A_FEW` times; check that all were killed and nothing else was found."""
    operations = subprocess.run(
        [sys.executable, PROGRAM, "--list"], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    kills = kills or A_FEW * len(operations)
    done = subprocess.run(
        [sys.executable, PROGRAM, root, "--kills", str(kills)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["operation"].replace(" ", "-") for line in found] == operations
    assert sum(line["old"] + line["new"] for line in found) == kills


@pytest.mark.skipif(sys.platform != "linux", reason="counts system calls as Linux names them")
@pytest.mark.parametrize(
    ("kills", "timeout_s"), [(None, 200), pytest.param(1000, 1200, marks=[pytest.mark.slow, pytest.mark.timeout(1300)])]
)
def test_a_killed_operation_leaves_the_old_or_the_new_version(
    tmp_path: Path, kills: int | None, timeout_s: float
) -> None:
    kill(str(tmp_path), kills=kills, timeout_s=timeout_s)


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_a_killed_operation_leaves_the_old_or_the_new_version_on_an_object_store(s3_url: str) -> None:
    kill(join_url(s3_url, "crash"), kills=200, timeout_s=1200)
