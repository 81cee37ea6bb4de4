"""What a rank of `tools/bench/memory` does: one step of a GPT under FSDP2, and a look at the storages that are there after it."""

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from datastore.training.launcher import Launch
from datastore.training.models.gpt import GPT
from datastore.training.objectives.base import MicroBatch
from datastore.training.objectives.language import Causal
from datastore.training.optim import make_optimizer
from datastore.training.parallel.choose import choose
from datastore.training.parallel.layout import Layout
from datastore.training.parallel.lesson import Lesson, Piece
from datastore.training.parallel.norm import local_part
from datastore.training.parallel.ranks import connect
from datastore.training.settings import ModelSettings, OptimSettings

Report = Callable[[dict[str, Any]], None]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages under `tensors`, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({one.data_ptr(): one.nbytes() for one in storages if one.nbytes()}.values())


def held_after_a_step(launch: Launch, arguments: dict[str, Any], report: Report) -> dict[str, int]:  # noqa: ARG001
    """Return what this rank holds between the step of the optimizer and the end of the gradients, in bytes."""
    torch.set_num_threads(1)
    with connect(launch, device=torch.device("cpu"), timeout_s=300) as ranks:
        model: Any = GPT(ModelSettings(**arguments["model"]))
        model.initialize(torch.Generator().manual_seed(1))
        whole = sum(one.numel() for one in model.parameters())
        strategy = choose(Layout(shard=launch.world), ranks)
        model = strategy.distribute(model)
        optimizer = make_optimizer(strategy.owned(model), OptimSettings())
        rows = MicroBatch(torch.zeros((1, arguments["tokens"] + 1), dtype=torch.int64))
        strategy.backward(
            [Piece(rows, 1.0 / launch.world)], Lesson(Causal(), {}, torch.device("cpu"), arguments["precision"])
        )
        strategy.clip(model, 1.0)
        optimizer.step()
        gc.collect()
        parameters = [local_part(one.detach()) for one in model.parameters()]
        gradients = [local_part(one.grad) for one in model.parameters() if one.grad is not None]
        state = [local_part(one) for found in optimizer.state.values() for one in found.values()]
        everything = [one for one in gc.get_objects() if issubclass(type(one), Tensor) and not hasattr(one, "to_local")]
        return {
            "parameters": storage_bytes(parameters),
            "gradients": storage_bytes(gradients),
            "optimizer": storage_bytes(state),
            "all": storage_bytes([*parameters, *gradients, *state, *everything]),
            "theory": 16 * whole // launch.world,
        }
