"""What tests let several ranks do, without torch; imported by the processes that `datastore.training.launcher.spawn` starts."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from datastore.errors import ConfigError
from datastore.training.launcher import Launch

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


def wait_for_ever(launch: Launch, arguments: dict[str, Any], report: Report) -> None:  # noqa: ARG001
    report({"pid": os.getpid()})
    threading.Event().wait()
