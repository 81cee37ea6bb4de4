"""The tasks of an ingest, done: by this process, by others of this machine, or by an engine.

A task is the same wherever it is done. Only one process at a time may use all cores for its encoder: this one, if it works alone.
"""

import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec

from datastore.dataset.journal import TaskDone
from datastore.document import Document
from datastore.engines.engine import Engine, Piece, Tell, spread
from datastore.ingestion.plan import WorkItem
from datastore.ingestion.tasks import Advance, Job, TaskRunner

__all__ = ["run_here", "run_on", "run_task"]

Report = Callable[[Advance | TaskDone], None]


class _Task(Document, frozen=True, kw_only=True):
    """All that one task needs. Never stored: the job may hold credentials."""

    job: Job
    item: WorkItem


_OWN = threading.local()
"""The runner that a thread has made last, and for which job: tokenizers take a while to load."""


def run_here(job: Job, items: Sequence[WorkItem], *, report: Report) -> None:
    """Do all `items` in this process, in order; call `report` with each step and each task done.

    Raises:
        DatastoreError: what a task raised.
    """
    runner = TaskRunner(msgspec.structs.replace(job, parallel=True))
    for item in items:
        report(runner.work(item, report))


def run_on(engine: Engine, job: Job, items: Sequence[WorkItem], *, report: Report) -> None:
    """Do all `items` by `engine`; call `report`, in this thread, with each step and each task done.

    The first error ends it; what is done stays done.

    Raises:
        DatastoreError: what a task raised; or the engine gave up, or left out a task.
    """

    def heard(step: bytes) -> None:
        report(msgspec.msgpack.decode(step, type=Advance))

    for _, answer in spread(engine, run_task, _pieces(job, items), heard=heard, path=job.path):
        report(msgspec.msgpack.decode(answer, type=TaskDone))


def _pieces(job: Job, items: Sequence[WorkItem]) -> Iterator[Piece]:
    for item in items:
        parts = item.parts
        about = {
            "task": item.task_id,
            "first_file": parts[0][0].path if parts else "",
            "last_file": parts[-1][0].path if parts else "",
        }
        yield Piece(msgspec.msgpack.encode(_Task(job=job, item=item)), about)


def run_task(order: bytes, tell: Tell) -> bytes:
    """Do one task, in any process and by any thread; `tell` gets its steps."""
    task = msgspec.msgpack.decode(order, type=_Task)
    runner: TaskRunner | None = getattr(_OWN, "runner", None)
    if runner is None or runner.job != task.job:
        runner = _OWN.runner = TaskRunner(task.job)
    return msgspec.msgpack.encode(runner.work(task.item, lambda step: tell(msgspec.msgpack.encode(step))))
