"""A run of format version 1, saved by two ranks: every later version of this package must read these very bytes.

Written once, by running this file; a folder that exists is left alone.
"""

import math
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.format.manifest import StepCommit
from datastore.checkpoint.items import PerRank

ROOT = Path(__file__).parents[3] / "schemas" / "golden"
STEPS = (10, 20)


def items(step: int, rank: int) -> dict[str, Any]:
    """What was saved: each kind of leaf, a tensor that changes and one that does not."""
    weights = {f"layer.{i}": torch.arange(6.0).reshape(2, 3) + i * step for i in range(3)}
    weights["half"] = torch.tensor([0.5, -2.0, step], dtype=torch.bfloat16)
    weights["frozen"] = torch.arange(5, dtype=torch.int64)
    values = {"cursor": 64 * step, "pair": (1, 2.5), "odd": math.inf, "big": 2**70, 3: "three", "none": None}
    return {"model": weights, "data": values, "rng": PerRank({"seed": 100 + rank})}


def empty(rank: int) -> dict[str, Any]:
    model = {name: torch.zeros_like(tensor) for name, tensor in items(STEPS[0], rank)["model"].items()}
    return {"model": model, "data": {}, "rng": PerRank({"seed": 0})}


def make(folder: Path) -> None:
    def rank(number: int) -> None:
        with Checkpointer(folder, rank=number, world=2, session="golden") as ck:
            for step in STEPS:
                ck.save(step, items(step, number), metrics={"loss": 1 / step}).committed(timeout_s=60)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))


@pytest.fixture(params=range(1, StepCommit.newest_format + 1), ids=lambda version: f"v{version}")
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy, so that no test can touch the original."""
    return Path(shutil.copytree(ROOT / f"v{request.param}" / "run", tmp_path / "run"))


@pytest.mark.parametrize("step", STEPS)
def test_a_golden_run_is_restored_bit_for_bit(golden: Path, step: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        for found, expected in pool.map(lambda rank: restore(golden, step, rank), range(2)):
            assert found["data"] == expected["data"]
            assert list(found["data"]) == list(expected["data"])
            assert found["rng"].state == expected["rng"].state
            for name, tensor in expected["model"].items():
                assert found["model"][name].dtype == tensor.dtype
                assert torch.equal(found["model"][name], tensor)


def restore(golden: Path, step: int, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    into = empty(rank)
    with Checkpointer(golden, rank=rank, world=2, session="reader") as ck:
        info = ck.restore(into, step=step)
    assert (info.step, info.world, info.session, info.metrics) == (step, 2, "golden", {"loss": 1 / step})
    return into, items(step, rank)


def test_a_golden_run_verifies_and_its_second_step_points_into_the_first(golden: Path) -> None:
    with Checkpointer(golden) as ck:
        assert ck.steps() == list(STEPS)
        assert [ck.verify(step).bad for step in STEPS] == [(), ()]
        report = ck.inspect(STEPS[1])
    assert all("/0000000010-" in part for part in report.uses)
    assert report.uses
    assert report.parent == STEPS[0]


if __name__ == "__main__":
    target = ROOT / f"v{StepCommit.newest_format}" / "run"
    if target.exists():
        sys.exit(f"{target} exists and must stay as it is")
    make(target)
