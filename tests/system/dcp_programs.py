"""Ranks that save and load by torch.distributed.checkpoint, with a run of ours behind it, one layout after another.

python dcp_programs.py RANK WORLD MEETING FOLDER JOB...        a job is `save:LAYOUT`, `LAYOUT>LAYOUT` or a name below
"""

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_shards import WAIT_S, model_of, sharded, train, truth
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from datastore.checkpoint.exchange.dcp import DcpReader, DcpWriter
from datastore.training.launcher import leave


def planes_of(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of four ranks, tensor-parallel within pairs and sharded across them; plain on one or two."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    if dist.get_world_size() == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(model, mesh=mesh["data"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "step": 3, "note": {"text": "done", "empty": [], "rates": [0.5, None]}}


def step_plane(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 24).reshape(4, 6)).square().mean().backward()
        optimizer.step()


def whole(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.full_tensor() if hasattr(tree, "full_tensor") else tree
    return {key: whole(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def save(folder: Path, layout: str) -> None:
    if layout in {"fsdp", "planes"}:
        model, optimizer = model_of(seed=0) if layout == "fsdp" else planes_of(seed=0)
        (train if layout == "fsdp" else step_plane)(model, optimizer)
        state = state_of(model, optimizer)
        if layout == "planes":
            seen = whole(state)
            if dist.get_rank() == 0:
                torch.save(seen, folder / "planes.pt")
    else:
        state = {"state": sharded(layout, filled=True)}
    dcp.save(state, checkpoint_id=folder / layout / "step-1", storage_writer=DcpWriter())
    if layout == "fsdp":
        torch.save(train(model, optimizer), folder / "losses.pt")


def load(folder: Path, saved: str, layout: str) -> None:
    reader = DcpReader()
    if saved in {"fsdp", "planes"}:
        model, optimizer = model_of(seed=1) if saved == "fsdp" else planes_of(seed=1)
        state = state_of(model, optimizer) | {"step": 0, "note": {"text": "", "empty": [1], "rates": []}}
        dcp.load(state, checkpoint_id=folder / saved / "step-1", storage_reader=reader)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        assert state["step"] == 3
        assert state["note"] == {"text": "done", "empty": [], "rates": [0.5, None]}
        if saved == "planes":
            expected = torch.load(folder / "planes.pt", weights_only=True)
            found = whole(state_of(model, optimizer))
            for key in expected["model"]:
                assert torch.equal(found["model"][key], expected["model"][key]), key
                for moment, value in expected["optim"]["state"][key].items():
                    assert torch.equal(found["optim"]["state"][key][moment], value), (key, moment)
        else:
            expected = torch.load(folder / "losses.pt", weights_only=True)
            assert all(abs(a - b) < 1e-6 for a, b in zip(train(model, optimizer), expected, strict=True))
        return
    tensors = sharded(layout, filled=False)
    dcp.load({"state": tensors}, checkpoint_id=folder / saved, storage_reader=reader)
    for name, value in truth().items():
        assert torch.equal(tensors[name].full_tensor(), value), (saved, layout, name)


def flipped(folder: Path) -> None:
    """One bit is wrong, in what only one rank reads: no rank writes to a tensor."""
    if dist.get_rank() == 0:
        part = max((folder / "rows" / "parts").glob("*-00001.safetensors"))
        raw = bytearray(part.read_bytes())
        raw[-3] ^= 4
        part.write_bytes(raw)
    dist.barrier()
    tensors = sharded("rows", filled=False)
    try:
        dcp.load({"state": tensors}, checkpoint_id=folder / "rows" / "step-1", storage_reader=DcpReader())
    except CheckpointException as error:
        assert "does not match its digest" in str(error)  # noqa: PT017 - BaseException, and every rank has its own
    else:
        raise AssertionError("a flipped bit was loaded")
    assert all(not tensor.to_local().any() for tensor in tensors.values())


def main(rank: int, world: int, meeting: str, folder: Path, jobs: list[str]) -> None:
    timeout = timedelta(seconds=WAIT_S)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=timeout)
    for job in jobs:
        if job == "flipped":
            flipped(folder)
        elif job.startswith("save:"):
            save(folder, job.removeprefix("save:"))
        else:
            load(folder, *job.split(">"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), sys.argv[5:])
    leave(0)
