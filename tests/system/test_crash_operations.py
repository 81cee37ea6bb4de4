"""Every operation on a dataset is killed, and what is left is the old or the new version and a way on from there.

What is done and checked stands in `crash_program.py`. By hand, for the figures:

    .venv/bin/python tests/system/crash_program.py /tmp/crash
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from datastore.storage.urls import join_url

PROGRAM = Path(__file__).with_name("crash_program.py")


def kill(root: str, *options: str, timeout_s: float) -> list[dict[str, int]]:
    """Kill all operations; return a line on each, after nothing was found that should not be."""
    done = subprocess.run(
        [sys.executable, PROGRAM, root, *options], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line["old"] + line["new"] == line["kills"] for line in found)
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="counts system calls as Linux names them")
def test_a_killed_operation_leaves_the_old_or_the_new_version(tmp_path: Path) -> None:
    kill(str(tmp_path), "--kills", "40", timeout_s=250)


@pytest.mark.slow
@pytest.mark.timeout(2000)
@pytest.mark.skipif(sys.platform != "linux", reason="as above")
def test_whatever_change_an_operation_is_killed_before_the_old_or_the_new_version_is_left(tmp_path: Path) -> None:
    found = kill(str(tmp_path), timeout_s=1900)
    assert all(line["visited"] == line["points"] for line in found)
    assert sum(line["kills"] for line in found) >= 1000


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.timeout(2500)
def test_a_killed_operation_leaves_the_old_or_the_new_version_on_an_object_store(s3_url: str) -> None:
    found = kill(join_url(s3_url, "crash"), "--kills", "200", timeout_s=2400)
    assert sum(line["kills"] for line in found) == 200
