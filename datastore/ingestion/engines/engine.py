"""An engine: something that calls a function in other processes, on this machine or on many.

That is all an ingest asks of it. An order is bytes, the answer is bytes, and the function is one that every process can import; so
an engine need know nothing of tasks, and is a few lines on top of whatever runs functions. What a task writes goes to the
dataset's storage, never through the engine: no memory is shared, and only the storage must be the same for all.

A task may be done twice, or be given up in the middle and done elsewhere: the bytes are the same, and only the coordinator commits.
"""

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from datastore.dataset.journal import TaskDone
from datastore.document import Document
from datastore.errors import DatastoreError, error_from_dict
from datastore.ingestion.engines.processes import Failed
from datastore.ingestion.plan import WorkItem
from datastore.ingestion.tasks import Advance, Job, TaskRunner
from datastore.storage.statistics import add_statistics

__all__ = ["Engine", "run_on", "work"]


class Engine(ABC):
    """Runs the tasks of an ingest somewhere else."""

    @abstractmethod
    def map(self, work: Callable[[bytes], bytes], orders: Iterable[bytes]) -> Iterator[bytes]:
        """Yield `work(order)` for each of `orders`, in any order and from any process; take orders only as they are needed.

        If it is closed early, what has not begun need not be done any more. `work` raises nothing that is of use elsewhere: an
        error of a task is an answer, too.

        Raises:
            DatastoreError: an order was given up, since its process died again and again, say.
        """


class _Order(Document, frozen=True, kw_only=True):
    """All that one task needs, as it goes to another process. Never stored: the job may hold credentials."""

    job: Job
    item: WorkItem


class _Done(Document, frozen=True, kw_only=True, tag=True):
    """A task is done; `advance` adds up its steps."""

    done: TaskDone
    advance: Advance


_ANSWERS: msgspec.json.Decoder[_Done | Failed] = msgspec.json.Decoder(_Done | Failed)

_OWN = threading.local()
"""The runner that a thread has made last, and for which job: tokenizers take a while to load."""


def run_on(
    engine: Engine, job: Job, orders: Sequence[WorkItem], *, report: Callable[[Advance | TaskDone], None]
) -> None:
    """Do all `orders` by `engine`; call `report`, in this thread, with each task done.

    Raises:
        DatastoreError: what a task raised; or the engine gave up, or left out an order.
    """
    left = {order.task_id for order in orders}
    answers = engine.map(work, (msgspec.json.encode(_Order(job=job, item=order)) for order in orders))
    for raw in answers:
        answer = _ANSWERS.decode(raw)
        if isinstance(answer, Failed):
            raise error_from_dict(answer.error)
        left.discard(answer.done.task_id)
        report(answer.advance)
        report(answer.done)
    if left:
        raise DatastoreError(
            "the engine has not done all tasks",
            engine=type(engine).__name__,
            open=len(left),
            first=min(left),
            hint="`map` must yield an answer to each order.",
        )


def work(order: bytes) -> bytes:
    """Do one task, and return what it made, or the error that ended it. It is called in any process, and by any thread."""
    found = msgspec.json.decode(order, type=_Order)
    steps: list[Advance] = []
    try:
        done = _runner(found.job).work(found.item, steps.append)
    except DatastoreError as error:
        return msgspec.json.encode(Failed(error=error.as_dict()))
    return msgspec.json.encode(_Done(done=done, advance=_sum(steps)))


def _runner(job: Job) -> TaskRunner:
    runner: TaskRunner | None = getattr(_OWN, "runner", None)
    if runner is None or runner.job != job:
        sys.path += [each for each in job.path if each not in sys.path]
        runner = _OWN.runner = TaskRunner(job)
    return runner


def _sum(steps: Sequence[Advance]) -> Advance:
    return Advance(
        source_bytes=sum(step.source_bytes for step in steps),
        documents=sum(step.documents for step in steps),
        tokens=sum(step.tokens for step in steps),
        rejects=sum(step.rejects for step in steps),
        storage=add_statistics(step.storage for step in steps),
    )
