"""What tests let several ranks do; imported by the child processes that `datastore.train.launch.spawn` starts."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from datastore.errors import ConfigError
from datastore.train.launch import Launch

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
    import torch

    from datastore.train.parallel import connect

    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        ranks.least(1)
        if launch.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.least(2)


def wait_for_ever(launch: Launch, arguments: dict[str, Any], report: Report) -> None:  # noqa: ARG001
    report({"pid": os.getpid()})
    threading.Event().wait()


def agree(launch: Launch, arguments: dict[str, Any], report: Report) -> dict[str, Any]:  # noqa: ARG001
    import torch

    from datastore.train.parallel import connect

    with connect(launch, device=torch.device("cpu"), timeout_s=60) as ranks:
        values = torch.tensor([2**63 - 1, ranks.rank], dtype=torch.int64)
        return {
            "shared": ranks.share("word", f"from rank {ranks.rank}"),
            "least": ranks.least(10 - ranks.rank),
            "sum": ranks.sum(values)().tolist(),
        }
