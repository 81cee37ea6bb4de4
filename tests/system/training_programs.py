"""What tests let several ranks do with torch; imported by the processes that `datastore.training.launcher.spawn` starts."""

import os
import signal
import sys
from collections.abc import Callable
from itertools import repeat
from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn import functional
from typing_extensions import override

from datastore.document import convert
from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook, RunState
from datastore.training.launcher import Launch
from datastore.training.machine import Machine
from datastore.training.models.gpt import GPT
from datastore.training.objectives.base import Context, MicroBatch, Objective
from datastore.training.objectives.language import Causal
from datastore.training.optim import Sentry, make_optimizer
from datastore.training.parallel.choose import choose
from datastore.training.parallel.layout import Layout
from datastore.training.parallel.lesson import Lesson, Piece
from datastore.training.parallel.ranks import connect
from datastore.training.parallel.strategy import Strategy
from datastore.training.settings import (
    DataSettings,
    FaultSettings,
    ModelSettings,
    OptimSettings,
    Settings,
    StepSettings,
    SyncSettings,
)
from datastore.training.trainer import Observer, StepOutcome, Trainer

Report = Callable[[dict[str, Any]], None]


def wait_for_a_peer_that_dies(launch: Launch, arguments: dict[str, Any], report: Report) -> None:  # noqa: ARG001
    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        ranks.least(1)
        if launch.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.least(2)


def agree(launch: Launch, arguments: dict[str, Any], report: Report) -> dict[str, Any]:  # noqa: ARG001
    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        values = torch.tensor([2**63 - 1, ranks.rank], dtype=torch.int64)
        return {
            "shared": ranks.share("word", lambda: f"from rank {ranks.rank}"),
            "least": ranks.least(10 - ranks.rank),
            "sum": ranks.sum(values)().tolist(),
        }


def refuse_on_rank_0(launch: Launch, arguments: dict[str, Any], report: Report) -> None:  # noqa: ARG001
    def make() -> str:
        raise ConfigError("rank 0 refuses", hint="Ask another one.")

    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        ranks.share("word", make)


class Rows:
    """What the loop asks of a batch, without a dataset."""

    def __init__(self, tokens: np.ndarray[Any, np.dtype[np.uint16]]) -> None:
        self.tokens = tokens
        self.valid = np.ones(len(tokens), np.bool_)
        self.loss_mask = None
        self.cursor = 0

    def fingerprint(self) -> int:
        return 0


class Ledger(Observer):
    """Remembers losses and prints each."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.losses: list[float] = []

    @override
    def stopping(self) -> bool:
        return False

    @override
    def settled(self, outcome: StepOutcome) -> None:
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


class Line(nn.Module):
    """The linear layer with a plan for tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x)  # type: ignore[no-any-return]

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        return {"line": ColwiseParallel(output_layouts=Replicate())}


def learn(strategy: Strategy, model: nn.Module, objective: Objective, *, lr: float, steps: int) -> Ledger:
    """Take `steps` steps of plain gradient descent with the same 8 rows of each reader every time."""
    ranks, readers, reader = strategy.ranks, strategy.layout.readers, strategy.place.reader
    model = strategy.distribute(model)
    optimizer = make_optimizer(strategy.owned(model), OptimSettings(use="sgd", lr=lr, weight_decay=0))
    tokens = np.arange(8 * reader, 8 * reader + 8, dtype=np.uint16)
    rows = Rows(np.stack([tokens, tokens], axis=1))

    trainer = Trainer(
        settings=Settings(
            data=DataSettings(url="none", global_batch=8 * readers),
            optim=OptimSettings(use="sgd", lr=lr, warmup=0, floor=1, weight_decay=0, clip=0),
            train=StepSettings(steps=steps, micro_batch=8),
        ),
        context=Context(seed=0, seq_len=1, vocab_size=2**16),
        strategy=strategy,
        machine=Machine("fp32", compiled=False, threads=1),
        state=RunState(model, optimizer, 0, steps, ranks.rank, ranks.world, ranks.device),
        hooks={},
        objective=objective,
        sentry=Sentry(FaultSettings(), scaled=False),
        loader=repeat(rows),  # type: ignore[arg-type]
    )
    ledger = Ledger(ranks.rank)
    trainer.run(ledger)
    return ledger


def linear_layer(launch: Launch, arguments: dict[str, Any], report: Report) -> list[float]:  # noqa: ARG001
    sync = convert(SyncSettings, arguments.pop("sync", {}), where="the test")
    layout = Layout(**{"data": launch.world, **arguments})
    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        torch.manual_seed(launch.rank)  # Other weights on each rank: those of rank 0 must win.
        return learn(choose(layout, ranks, sync), Line(), Regression(), lr=0.2, steps=10).losses


def eight_parameters(launch: Launch, arguments: dict[str, Any], report: Report) -> list[float]:  # noqa: ARG001
    with connect(launch, device=torch.device("cpu"), timeout_s=120) as ranks:
        model = Eight()
        learn(choose(Layout(launch.world), ranks), model, Constant(), lr=arguments["lr"], steps=1)
        return model.values.tolist()


class Smoothed(Causal):
    """A cross-entropy that looks at all logits of a token."""

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        logits = outputs.flatten(0, 1).float()
        return functional.cross_entropy(logits, batch.targets.flatten(), label_smoothing=0.1)


def messages_of_a_step(launch: Launch, arguments: dict[str, Any], report: Report) -> list[int]:  # noqa: ARG001
    """Return how often gradients are reduced for a batch of one piece, and of three."""
    lesson = Lesson(Causal(), {}, torch.device("cpu"), "fp32")
    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        strategy = choose(Layout(shard=2), ranks)
        model = GPT(ModelSettings(layers=2, width=16, heads=2, vocab_size=32))
        model.initialize(torch.Generator().manual_seed(1))
        strategy.distribute(model)
        reduce = Mock(wraps=dist.reduce_scatter_single)
        found = []
        with patch.object(dist, "reduce_scatter_single", reduce):
            for count in (1, 3):
                reduce.reset_mock()
                strategy.backward(
                    [Piece(MicroBatch(torch.zeros((2, 9), dtype=torch.int64)), 1 / count)] * count, lesson
                )
                found.append(reduce.call_count)
        return found


class Spare(Hook):
    """Gives the model a parameter that nothing uses."""

    takes_parts = True

    @override
    def model(self, model: nn.Module) -> nn.Module:
        model.register_parameter("spare", nn.Parameter(torch.zeros(4)))
        return model
