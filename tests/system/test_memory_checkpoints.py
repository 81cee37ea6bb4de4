"""Four processes whose steps are in one another's memory: whichever is killed, at whatever moment, the newest whole step comes back."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("memory_kills.py")


def run(*arguments: object, timeout_s: float) -> str:
    done = subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_rank_that_is_killed_is_replaced_and_all_go_on_from_the_newest_whole_step(
    tmp_path: Path, layout: str
) -> None:
    assert "6 kills" in run(tmp_path, layout, "--kills", 6, timeout_s=280)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_hundred_kills_lose_no_committed_step(tmp_path: Path, layout: str) -> None:
    assert "100 kills" in run(tmp_path, layout, "--kills", 100, "--seed", 5, timeout_s=1700)
