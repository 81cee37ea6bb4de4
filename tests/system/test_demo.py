"""The demo, whole: interrupted once by Ctrl-C, it goes on where it was and ends with its table."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the demo's scripts; the package is the installed one."""
    shutil.copytree(ROOT / "tools", tmp_path / "clone" / "tools")
    return tmp_path / "clone"


def start(clone: Path) -> "subprocess.Popen[str]":
    """Start the demo as a terminal does: Ctrl-C is not ignored, whatever this process does with it."""
    return subprocess.Popen(
        ["env", "--default-signal=INT", sys.executable, "tools/demo.py"],
        cwd=clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_demo_survives_ctrl_c_and_ends_with_its_table(clone: Path) -> None:
    with start(clone) as first:
        metrics = clone / "demo" / "run" / "metrics"
        while not metrics.exists():
            assert first.poll() is None
            time.sleep(0.5)
        train = subprocess.run(["pgrep", "-P", str(first.pid)], check=True, capture_output=True, text=True)
        for pid in (*train.stdout.split(), str(first.pid)):  # As a terminal would: the whole foreground group.
            subprocess.run(["kill", "-INT", pid], check=True)
        said, _ = first.communicate(timeout=600)
    assert first.returncode == 130, said
    assert "goes on from here" in said

    with start(clone) as second:
        told, _ = second.communicate(timeout=1800)
    assert second.returncode == 0, told
    assert "=== 2 of 10" not in told
    assert "proven: every sample of the planned order was consumed exactly once" in told
    assert "are on disk as the step saw them" in told
    assert told.index("\ndense  ") < told.index("\npruned, int8  ")
    assert "Traceback" not in said + told


@pytest.mark.parametrize("arguments", [["--help"], ["--fresh", "now"]])
def test_the_demo_says_how_it_is_called(clone: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "tools/demo.py", *arguments], cwd=clone, check=False, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "usage: tools/demo [--fresh]\n"
    assert not (clone / "demo").exists()
