"""Checkpoints against the world: SIGKILL at any moment, a full disk, two writers; always one whole step, never a mixture."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer

SHARDS = Path(__file__).with_name("checkpoint_shards.py")
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


def on_ranks(world: int, folder: Path, *jobs: str) -> None:
    """Do `jobs` on `world` processes over gloo."""
    meeting = f"file://{folder}/meeting-{uuid.uuid4().hex}"
    ranks = [
        subprocess.Popen(
            [sys.executable, SHARDS, str(rank), str(world), meeting, folder, *jobs],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    said = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, "\n".join(said)


def test_shards_of_two_ranks_are_read_by_one_and_by_two_in_any_layout(tmp_path: Path) -> None:
    layouts = ("rows", "columns", "copies")
    saves = [f"save:{layout}" for layout in (*layouts, "fsdp")]
    on_ranks(2, tmp_path, *saves, *(f"{one}>{other}" for one in layouts for other in layouts), "fsdp>fsdp")
    on_ranks(1, tmp_path, *(f"{layout}>copies" for layout in layouts), "fsdp>fsdp")


@pytest.mark.slow
def test_shards_of_four_ranks_on_meshes_are_read_by_three_and_by_one(tmp_path: Path) -> None:
    layouts = ("rows", "columns", "copies", "grid", "copied rows")
    saves = [f"save:{layout}" for layout in (*layouts, "fsdp")]
    on_ranks(4, tmp_path, *saves, *(f"{one}>{other}" for one in layouts for other in layouts), "fsdp>fsdp")
    for world in (1, 3):
        on_ranks(world, tmp_path, *(f"{one}>{other}" for one in layouts for other in layouts[:3]), "fsdp>fsdp")


@pytest.mark.slow
def test_fsdp_over_tensor_parallelism_along_the_same_rows_is_read_in_any_layout(tmp_path: Path) -> None:
    on_ranks(
        4, tmp_path, "save:crossed", "save:rows", "crossed>crossed", "crossed>rows", "rows>crossed", "crossed>grid"
    )
    for world, layouts in ((1, ["copies"]), (3, ["rows", "columns"])):
        on_ranks(world, tmp_path, *(f"crossed>{layout}" for layout in layouts))
