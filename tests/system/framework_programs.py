"""What tests let several processes do with torch and Accelerate; imported by the processes that `spawn` starts."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader

from datastore.dataset.snapshot import open_dataset
from datastore.loader.loader import Loader
from datastore.testing.examples import make_dataset
from datastore.torch import SampleDataset, rank_of, stream
from datastore.training.launcher import Launch

SEQ, BATCH = 16, 8
Report = Callable[[dict[str, Any]], None]


def read_in_a_mesh(launch: Launch, arguments: dict[str, Any], report: Report) -> dict[str, Any]:  # noqa: ARG001
    """Take steps from the saved state on; save after each, and die in the middle of step `die_at`."""
    folder = Path(arguments["folder"])
    where = f"file://{folder / arguments['name']}"
    dist.init_process_group("gloo", init_method=where, rank=launch.rank, world_size=launch.world)
    sizes: dict[str, int] = arguments["mesh"]
    mesh = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    loader = Loader(open_dataset(folder / "data"), seq_len=SEQ, global_batch=BATCH, seed=3, rank=rank_of(mesh))
    state = folder / "state.json"
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    batches = stream(loader, mesh=mesh)
    seen = []
    for step in range(arguments["steps"]):
        batch = next(batches)
        if step == arguments.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(batch.tokens.tolist())
        dist.barrier()
        if launch.rank == 0:
            state.write_text(json.dumps(batches.state_dict()))
    dist.destroy_process_group()
    return {"place": mesh.get_coordinate(), "rank": [loader.rank.rank, loader.rank.world], "seen": seen}


def read_by_accelerate(launch: Launch, arguments: dict[str, Any], report: Report) -> dict[str, Any]:  # noqa: ARG001
    """Return what this process is given of an epoch, under each of the ways that Accelerate divides batches."""
    os.environ |= {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.world), "LOCAL_RANK": str(launch.rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(arguments["port"])}
    from accelerate import Accelerator, skip_first_batches
    from accelerate.state import AcceleratorState, GradientState
    from accelerate.utils import DataLoaderConfiguration

    dataset = make_dataset(Path(arguments["folder"]) / f"data-{launch.rank}", [[100], [61, 7]], block_bytes=4096)

    def prepared(batch: int, how: dict[str, bool]) -> Any:
        AcceleratorState._reset_state()
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**how))
        return accelerator.prepare(DataLoader(SampleDataset(dataset, seq_len=SEQ, seed=3), batch_size=batch))

    return {
        name: {
            "whole": [rows["input_ids"].tolist() for rows in prepared(*way)],
            "later": [rows["input_ids"].tolist() for rows in skip_first_batches(prepared(*way), 1)],
        }
        for name, way in arguments["ways"].items()
    }
