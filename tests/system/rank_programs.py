"""What tests let several ranks do; imported by the child processes that `datastore.train.launch.spawn` starts."""

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from datastore.document import Document
from datastore.errors import ConfigError
from datastore.train.hooks.base import Hook, RunState
from datastore.train.launch import Launch
from datastore.train.loop import Outcome, Watcher, Work, run_loop
from datastore.train.objectives import MicroBatch, Objective
from datastore.train.optim import make_optimizer
from datastore.train.parallel import Ranks, connect
from datastore.train.settings import OptimSettings

Report = Callable[[dict[str, Any]], None]


def introduce(launch: Launch, arguments: dict[str, Any], report: Report) -> dict[str, Any]:
    report({"rank": launch.rank})
    return {"rank": launch.rank, "world": launch.world, "given": arguments}


def refuse(launch: Launch, arguments: dict[str, Any], report: Report) -> None:  # noqa: ARG001
    if launch.rank == arguments["rank"]:
        raise ConfigError("this rank refuses", rank=launch.rank, hint="Ask another one.")


def die(launch: Launch, arguments: dict[str, Any], report: Report) -> None:  # noqa: ARG001
    if launch.rank == arguments["rank"]:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_a_peer_that_dies(launch: Launch, arguments: dict[str, Any], report: Report) -> None:  # noqa: ARG001
    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        ranks.least(1)
        if launch.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.least(2)


def wait_for_ever(launch: Launch, arguments: dict[str, Any], report: Report) -> None:  # noqa: ARG001
    report({"pid": os.getpid()})
    threading.Event().wait()


def agree(launch: Launch, arguments: dict[str, Any], report: Report) -> dict[str, Any]:  # noqa: ARG001
    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        values = torch.tensor([2**63 - 1, ranks.rank], dtype=torch.int64)
        return {
            "shared": ranks.share("word", f"from rank {ranks.rank}"),
            "least": ranks.least(10 - ranks.rank),
            "sum": ranks.sum(values)().tolist(),
        }


class KillSettings(Document, frozen=True, kw_only=True):
    file: str
    """Steps at which to die, as JSON; each is taken out of the file before."""


class Kill(Hook):
    """Dies in the middle of a step: gradients are there, parameters have not moved yet."""

    Settings: ClassVar[type[Document]] = KillSettings

    def __init__(self, settings: KillSettings) -> None:
        super().__init__(settings)
        self._file = Path(settings.file)

    @override
    def gradients(self, run: RunState) -> None:
        if run.rank or not self._file.exists():
            return
        steps = json.loads(self._file.read_text())
        if run.step in steps:
            self._file.write_text(json.dumps([step for step in steps if step != run.step]))
            os.kill(os.getpid(), signal.SIGKILL)


class Average(Hook):
    """Exports the mean of the weights after all steps rather than the last ones."""

    @override
    def start(self, run: RunState) -> None:
        self.sum = {name: torch.zeros_like(weight) for name, weight in run.model.named_parameters()}
        self.steps = torch.zeros(())

    @override
    @torch.no_grad()
    def updated(self, run: RunState) -> None:
        self.steps += 1
        for name, weight in run.model.named_parameters():
            self.sum[name] += weight

    @override
    @torch.no_grad()
    def export(self, model: nn.Module) -> nn.Module:
        for name, weight in model.named_parameters():
            weight.copy_(self.sum[name] / self.steps)
        return model

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum, "steps": self.steps}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps.copy_(state["steps"])
        for name, value in state["sum"].items():
            self.sum[name].copy_(value)


class Noise(Hook):
    """Draws random numbers in every step, as dropout does."""

    @override
    def loss(self, loss: Tensor, batch: MicroBatch, outputs: Tensor) -> Tensor:
        return loss * (1 + 0.1 * torch.rand(()))


class Rows:
    """What the loop asks of a batch, without a dataset."""

    def __init__(self, tokens: np.ndarray[Any, np.dtype[np.uint16]]) -> None:
        self.tokens = tokens
        self.valid = np.ones(len(tokens), np.bool_)
        self.cursor = 0

    def fingerprint(self) -> int:
        return 0


class Ledger(Watcher):
    """Remembers losses and prints each."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.losses: list[float] = []

    @override
    def stopping(self) -> bool:
        return False

    @override
    def settled(self, outcome: Outcome) -> None:
        self.losses.append(outcome.loss)
        sys.stdout.write(f"rank {self.rank} iteration {outcome.step} loss {outcome.loss!r}\n")
        sys.stdout.flush()

    @override
    def due(self, step: int) -> bool:
        return False

    @override
    def pause(self, run: RunState, *, last: bool) -> None:
        pass


class Regression(Objective):
    """Learn a fixed linear map from random inputs; the token of a row is the seed of its input."""

    def __init__(self) -> None:
        self.truth = torch.randn(10, 10, generator=torch.Generator().manual_seed(1))

    def inputs(self, batch: MicroBatch) -> Tensor:
        seeds = batch.inputs[:, 0].tolist()
        return torch.stack([torch.randn(10, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        return model(self.inputs(batch))  # type: ignore[no-any-return]

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        return (outputs - self.inputs(batch) @ self.truth).square().mean()


class Constant(Objective):
    """The gradient of every parameter is 0.1, whatever the batch."""

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        return model()  # type: ignore[no-any-return]

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        return 0.1 * outputs.sum()


class Eight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(8))

    def forward(self) -> Tensor:
        return self.values


def learn(ranks: Ranks, model: nn.Module, objective: Objective, *, lr: float, steps: int) -> Ledger:
    """Take `steps` steps of plain gradient descent with the same 8 rows of each rank every time."""
    optimizer = make_optimizer(model, OptimSettings(use="sgd", lr=lr, weight_decay=0))
    wrapped = ranks.distribute(model)
    tokens = np.arange(8 * ranks.rank, 8 * ranks.rank + 8, dtype=np.uint16)
    rows = Rows(np.stack([tokens, tokens], axis=1))

    run = RunState(model, optimizer, 0, steps, ranks.rank, ranks.world, ranks.device)
    work = Work(
        model=wrapped,
        objective=objective,
        hooks=(),
        ranks=ranks,
        batches=lambda: rows,  # type: ignore[arg-type,return-value]
        rows=8 * ranks.world,
        micro_rows=8,
        precision="fp32",
        clip=0.0,
        rate=lambda _step: lr,
        guard=contextlib.nullcontext,
    )
    ledger = Ledger(ranks.rank)
    run_loop(run, work, ledger)
    return ledger


def linear_layer(launch: Launch, arguments: dict[str, Any], report: Report) -> list[float]:  # noqa: ARG001
    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        torch.manual_seed(launch.rank)  # Other weights on each rank: those of rank 0 must win.
        return learn(ranks, nn.Linear(10, 10), Regression(), lr=0.2, steps=10).losses


def eight_parameters(launch: Launch, arguments: dict[str, Any], report: Report) -> list[float]:  # noqa: ARG001
    with connect(launch, device=torch.device("cpu"), timeout_s=120) as ranks:
        model = Eight()
        learn(ranks, model, Constant(), lr=arguments["lr"], steps=1)
        return model.values.tolist()
