"""What tests let several ranks do; imported by the child processes that `datastore.train.launch.spawn` starts."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from datastore.document import Document
from datastore.errors import ConfigError
from datastore.train.hooks.base import Hook, RunState
from datastore.train.launch import Launch
from datastore.train.objectives import MicroBatch
from datastore.train.parallel import connect

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


class Noise(Hook):
    """Draws random numbers in every step, as dropout does."""

    @override
    def loss(self, loss: Tensor, batch: MicroBatch, outputs: Tensor) -> Tensor:
        return loss * (1 + 0.1 * torch.rand(()))
