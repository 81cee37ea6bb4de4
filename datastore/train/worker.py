"""One rank that `launch.spawn` started: `python -m datastore.train.worker`, its task on stdin.

What goes on the pipe named in the task: `{"event": ...}` as often as it likes, then `{"result": ...}` or `{"error": ...}`.
"""

import importlib
import os
import sys
import threading
from typing import Any

import msgspec
import orjson

from datastore.errors import DatastoreError
from datastore.training.launcher import LOST_PEER, LostPeerError, Task, error_to

__all__ = ["main"]


def main() -> int:
    """Run the task that stdin names; return the exit status."""
    task = msgspec.json.decode(_read_line(), type=Task)
    sys.path[:] = task.path
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(task.events_fd, "wb", buffering=0) as pipe:
        try:
            result = _call(task, lambda event: _write(pipe, {"event": event}))
        except LostPeerError:
            return LOST_PEER
        except DatastoreError as error:
            _write(pipe, {"error": error_to(error)})
            return 1
        _write(pipe, {"result": result})
    return 0


def _read_line() -> bytes:
    """Read stdin up to a newline, without Python's buffer: a thread that waits on its lock would abort the exit."""
    line = bytearray()
    while not line.endswith(b"\n"):
        more = os.read(0, 1)
        if not more:
            sys.exit("this module is started by datastore.training.launcher")
        line += more
    return bytes(line)


def _call(task: Task, report: Any) -> Any:
    module, _, name = task.target.partition(":")
    function = getattr(importlib.import_module(module), name)
    return function(task.launch, task.arguments, report)


def _write(pipe: Any, message: dict[str, Any]) -> None:
    pipe.write(orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def _end_with_parent() -> None:
    """End this process when its parent has closed our stdin or is gone: there is nobody left to report to."""
    while os.read(0, 1):
        pass
    os._exit(LOST_PEER)


if __name__ == "__main__":
    sys.exit(main())
