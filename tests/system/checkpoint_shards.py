"""Ranks that hold shards: one process each over gloo, started by the test, which saves and restores one layout after another.

python checkpoint_shards.py RANK WORLD MEETING FOLDER JOB...        a job is `save:LAYOUT` or `SAVED>LAYOUT`
"""

import ast
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.steps import CheckpointerSettings
from datastore.training.launcher import leave

WAIT_S = 100
ROWS, COLUMNS = 7, 5
"""Odd on purpose: two or three ranks get shards of different sizes."""

LAYOUTS: dict[str, Callable[[int], tuple[tuple[int, ...], list[Shard | Replicate]]]] = {
    "rows": lambda world: ((world,), [Shard(0)]),
    "columns": lambda world: ((world,), [Shard(1)]),
    "copies": lambda world: ((world,), [Replicate()]),
    "grid": lambda world: ((world // 2, 2), [Shard(0), Shard(1)]),
    "copied rows": lambda world: ((2, world // 2), [Replicate(), Shard(0)]),
}


def truth() -> dict[str, torch.Tensor]:
    numbers = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    return {"f32": numbers, "bf16": numbers.to(torch.bfloat16), "i64": numbers.to(torch.int64) * 10**12}


def crossed(*, filled: bool) -> dict[str, DTensor]:
    """Return the truth as FSDP2 over tensor parallelism has it along the rows: in strided shards."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
    found = {}
    for name, value in truth().items():
        if value.is_floating_point():
            layer = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False, dtype=value.dtype))
            with torch.no_grad():
                layer[0].weight.copy_(value if filled else torch.zeros_like(value))
            parallelize_module(layer, mesh["tensor"], {"0": ColwiseParallel()})
            fully_shard(layer, mesh=mesh["data"])
            found[name] = layer[0].weight
    return found


def sharded(layout: str, *, filled: bool) -> dict[str, DTensor]:
    if layout == "crossed":
        return crossed(filled=filled)
    shape, placements = LAYOUTS[layout](dist.get_world_size())
    mesh = init_device_mesh("cpu", shape)
    whole = truth()
    return {
        name: distribute_tensor(value if filled else torch.zeros_like(value), mesh, placements)
        for name, value in whole.items()
    }


def model_of(*, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    if dist.get_world_size() > 1:
        fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.linspace(-1, 1, 20).reshape(4, 5)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(folder: Path, layout: str, open_run: Callable[[Path], Checkpointer]) -> None:
    with open_run(folder / layout) as ck:
        if layout == "fsdp":
            model, optimizer = model_of(seed=0)
            train(model, optimizer)
            items: dict[str, object] = {"model": model, "optim": optimizer}
        else:
            items = {"state": sharded(layout, filled=True)}
        ck.save(1, items).committed(timeout_s=WAIT_S)
        if layout == "fsdp":
            (folder / "losses").write_text(repr(train(model, optimizer)))


def restore(folder: Path, saved: str, layout: str, open_run: Callable[[Path], Checkpointer]) -> None:
    with open_run(folder / saved) as ck:
        if saved == "fsdp":
            model, optimizer = model_of(seed=1)
            ck.restore({"model": model, "optim": optimizer})
            expected = ast.literal_eval((folder / "losses").read_text())
            assert train(model, optimizer) == pytest.approx(expected, rel=1e-6)
            return
        known = {name: value for name, value in truth().items() if saved != "crossed" or value.is_floating_point()}
        tensors = {**sharded("rows", filled=False), **sharded(layout, filled=False)}
        tensors = {name: tensors[name] for name in known}
        ck.restore({"state": tensors})
        for name, value in known.items():
            assert torch.equal(tensors[name].full_tensor(), value), (saved, layout, name)
        plain = {name: torch.zeros_like(value) for name, value in known.items()}
        ck.restore({"state": plain})
        assert all(torch.equal(plain[name], value) for name, value in known.items())


def main(rank: int, world: int, meeting: str, folder: Path, jobs: list[str]) -> None:
    timeout = timedelta(seconds=WAIT_S)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timeout)
    options = CheckpointerSettings(wait_s=WAIT_S)
    for number, job in enumerate(jobs):
        session = f"{Path(meeting).name}-{number}"

        def open_run(run: Path, session: str = session) -> Checkpointer:
            return Checkpointer(run, rank=rank, world=world, session=session, options=options)

        if job.startswith("save:"):
            save(folder, job.removeprefix("save:"), open_run)
        else:
            restore(folder, *job.split(">"), open_run)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5:])
    leave(0)
