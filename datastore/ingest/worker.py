"""A worker process: `python -m datastore.ingest.worker FD`, where FD is its end of a pipe.

It takes a job and then orders, as JSON, and answers with what it did. It ends with the pipe, at once: whoever started
it may be gone, and a task that is cut off is done again by the next run.
"""

import os
import sys
import threading
from multiprocessing.connection import Connection
from queue import SimpleQueue

import msgspec

from datastore.dataset.journal import TaskDone
from datastore.document import Document
from datastore.errors import DatastoreError
from datastore.ingestion.plan import Order
from datastore.ingestion.tasks import Advance, Job, Workbench

__all__ = ["Answer", "Failed", "Finished", "serve"]


class Finished(Document, frozen=True, kw_only=True, tag=True):
    """A task is done."""

    done: TaskDone


class Failed(Document, frozen=True, kw_only=True, tag=True):
    """A task has failed with an error of ours."""

    code: str
    fact: str
    hint: str
    values: dict[str, msgspec.Raw]


Answer = Advance | Finished | Failed


def serve(pipe: Connection) -> None:
    """Do the orders that come through `pipe` until it ends or a task fails."""
    waiting: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, waiting), daemon=True).start()
    bench = Workbench(msgspec.json.decode(waiting.get(), type=Job))
    while True:
        order = msgspec.json.decode(waiting.get(), type=Order)
        try:
            done = bench.work(order, lambda step: _send(pipe, step))
        except DatastoreError as error:
            values = {name: msgspec.Raw(_as_json(value)) for name, value in error.values.items()}
            _send(pipe, Failed(code=error.code, fact=error.fact, hint=error.hint, values=values))
        else:
            _send(pipe, Finished(done=done))


def _listen(pipe: Connection, waiting: "SimpleQueue[bytes]") -> None:
    """Put what comes into `waiting`; end the process with the pipe, whatever it is doing."""
    try:
        while True:
            waiting.put(pipe.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


def _send(pipe: Connection, answer: Answer) -> None:
    pipe.send_bytes(msgspec.json.encode(answer))


def _as_json(value: object) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, OverflowError, UnicodeEncodeError):
        return msgspec.json.encode(ascii(value))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
