"""The workers of an ingest: the tasks of a job, run in this process or in several beside it.

Workers are fresh processes that import this package, not copies of the caller: nothing of the caller's threads, locks
or `__main__` gets into them, which is why it works from a notebook, too. They get a pipe and end when it ends, so a
caller that is killed leaves nobody behind, and Ctrl-C reaches the caller alone.

A worker process is `python -m datastore.ingestion.engines.processes FD`, where FD is its end of a pipe. It takes a job and then orders, as JSON, and answers with what it did. It ends with the pipe, at once: whoever started
it may be gone, and a task that is cut off is done again by the next run.
"""

import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from typing import Any

import msgspec

from datastore.dataset.journal import TaskDone
from datastore.document import Document
from datastore.errors import DatastoreError, error_from_dict
from datastore.ingestion.plan import WorkItem
from datastore.ingestion.tasks import Advance, Job, TaskRunner

__all__ = ["Answer", "Failed", "Finished", "run_orders", "serve"]

Report = Callable[[Advance | TaskDone], None]


class Failed(Document, frozen=True, kw_only=True, tag=True):
    """A task has failed with an error of ours."""

    error: dict[str, Any]
    """As `DatastoreError.as_dict` gives it."""


class Finished(Document, frozen=True, kw_only=True, tag=True):
    """A task is done."""

    done: TaskDone


Answer = Advance | Finished | Failed

_ANSWERS: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def run_orders(job: Job, orders: Sequence[WorkItem], *, workers: int, report: Report) -> None:
    """Do all `orders`, in about their order; call `report`, in this thread, with each step and each task done.

    The first error ends it; tasks that are under way are cut off, what is done stays done.

    Raises:
        DatastoreError: what a task raised; or a worker process died.
    """
    if workers == 1:
        bench = TaskRunner(msgspec.structs.replace(job, parallel=True))
        for order in orders:
            report(bench.work(order, report))
        return
    with _workers(job, workers) as crew:
        _serve(crew, deque(orders), report)


class _Worker:
    """One process, and the task that it has."""

    def __init__(self, job: Job) -> None:
        self.pipe, theirs = Pipe()
        self.order: WorkItem | None = None
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "datastore.ingestion.engines.processes", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in the terminal is for the process that can answer it.
            )
        self._send(job)

    def give(self, order: WorkItem) -> None:
        self.order = order
        self._send(order)

    def _send(self, message: Document) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # It died; reading its answer will tell.
            self.pipe.send_bytes(msgspec.json.encode(message))

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()


@contextmanager
def _workers(job: Job, count: int) -> Iterator[list[_Worker]]:
    crew: list[_Worker] = []
    try:
        for _ in range(count):
            crew.append(_Worker(job))  # noqa: PERF401 - the cleanup needs those that were started before one fails
        yield crew
    finally:
        for worker in crew:
            worker.stop()


def _serve(crew: Sequence[_Worker], pending: deque[WorkItem], report: Report) -> None:
    by_pipe = {worker.pipe: worker for worker in crew}
    for worker in crew:
        _give_next(worker, pending)
    while any(worker.order for worker in crew):
        for pipe in wait([worker.pipe for worker in crew if worker.order]):
            assert isinstance(pipe, Connection)
            worker = by_pipe[pipe]
            match _answer(worker):
                case Finished(done=done):
                    _give_next(worker, pending)
                    report(done)
                case Failed() as failure:
                    raise error_from_dict(failure.error)
                case Advance() as step:
                    report(step)


def _give_next(worker: _Worker, pending: deque[WorkItem]) -> None:
    worker.order = None
    if pending:
        worker.give(pending.popleft())


def _answer(worker: _Worker) -> Answer:
    try:
        return _ANSWERS.decode(worker.pipe.recv_bytes())
    except (EOFError, ConnectionResetError):
        raise _died(worker) from None


def _died(worker: _Worker) -> DatastoreError:
    code = worker.process.wait()
    parts = worker.order.parts if worker.order else ()
    return DatastoreError(
        "a worker process died",
        how=signal.Signals(-code).name if code < 0 else f"exit {code}",
        task=worker.order.task_id if worker.order else "",
        first_file=parts[0][0].path if parts else "",
        last_file=parts[-1][0].path if parts else "",
        hint="Run the same command again; if it was out of memory, with fewer `workers` or a smaller `task_bytes`.",
    )


def serve(pipe: Connection) -> None:
    """Do the orders that come through `pipe` until it ends or a task fails."""
    waiting: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, waiting), daemon=True).start()
    job = msgspec.json.decode(waiting.get(), type=Job)
    sys.path[:] = job.path or sys.path
    bench = TaskRunner(job)
    while True:
        order = msgspec.json.decode(waiting.get(), type=WorkItem)
        try:
            done = bench.work(order, lambda step: _send(pipe, step))
        except DatastoreError as error:
            _send(pipe, Failed(error=error.as_dict()))
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


if __name__ == "__main__":
    # The classes of this module as others import it, not those of `__main__`: the answers are told apart by class.
    from datastore.ingestion.engines.processes import serve as imported_serve

    imported_serve(Connection(int(sys.argv[1])))
