"""Checkpoints against the world: SIGKILL at any moment, a full disk, two writers; always one whole step, never a mixture."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer

PROGRAM = Path(__file__).with_name("checkpoint_programs.py")


def run(*arguments: object, timeout_s: float = 280) -> str:
    done = subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_a_random_moment_a_run_holds_exactly_its_newest_step(tmp_path: Path, world: int) -> None:
    assert "6 kills" in run("kill", tmp_path, 6, 7, world)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("world", "seed"), [(1, 1), (2, 2), (3, 3)])
def test_a_hundred_kills_lose_nothing(tmp_path: Path, world: int, seed: int) -> None:
    assert "100 kills" in run("kill", tmp_path, 100, seed, world, timeout_s=1700)


def check_the_last_step(folder: Path, said: str) -> None:
    step, code, error = said.strip().split("|", 2)
    assert int(step) > 0
    assert code == "storage"
    assert "disk is full" in error or "larger than allowed" in error
    saved = torch.zeros(int(step) * 100_000)
    with Checkpointer(folder) as ck:
        assert ck.restore({"model": {"w": saved}}).step == int(step)
        assert ck.steps()[-1] == int(step)
        ck.save(int(step) + 1, {"model": {"w": saved[:10].clone()}}, blocking=True)
    assert saved.eq(float(step)).all()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "none", folder], capture_output=True, check=False
    ).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs the right to mount")
def test_a_full_disk_is_heard_of_nothing_is_committed_and_the_step_before_is_whole(small_disk: Path) -> None:
    check_the_last_step(small_disk / "run", run("full", small_disk / "run"))


def test_a_limit_on_file_sizes_is_heard_of_likewise(tmp_path: Path) -> None:
    check_the_last_step(tmp_path, run("limited", tmp_path, 3_000_000))
