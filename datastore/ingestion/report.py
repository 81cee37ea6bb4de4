"""The report of an ingest: how far it is, and at the end what it did."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from datastore.dataset.journal import TaskDone
from datastore.dataset.log.manifest import Kind
from datastore.ingestion.plan import WorkItem, source_bytes
from datastore.ingestion.quality.sieve import Sample
from datastore.ingestion.tasks import Advance
from datastore.storage.statistics import OperationStatistics, add_statistics

__all__ = ["IngestProgress", "IngestReport", "Tally", "changed_in", "filtered_in", "rejected_in", "skipped_in"]


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """How far an ingest is. What an interrupted run did counts as done."""

    tasks_done: int
    tasks: int
    source_bytes: int
    source_bytes_total: int
    documents: int
    tokens: int
    rejects: int


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What an ingest did. Counts are of this ingest, not of the dataset."""

    url: str
    version: int
    """The dataset's version that has it all; 0 if there is none yet."""

    added: bool
    """Whether that version is new; false if there was nothing to add."""

    ingest_id: str
    """Where its journal is: `ingests/<id>/`; empty if there was nothing to add."""

    kind: Kind
    files: int
    """Files that were read."""

    known_files: int
    """Files that the dataset had."""

    overtaken_files: int
    """Of those, files that another ingest has brought since this one began."""

    changed_files: int
    """Of those that were read, files that the dataset has in another state, whose documents stay."""

    changed_since: int
    """The last version that brought such a state; 0 if no file has changed."""

    skipped: Mapping[str, int]
    """Files and folders that were left out."""

    documents: int
    tokens: int
    text_bytes: int
    shards: int
    shard_bytes: int
    rejected: Mapping[str, int]
    rejects: str
    """The folder in which the rejected documents are described; empty if there are none."""

    filtered: Mapping[str, int]
    """Documents that filters have dropped, by filter and rule."""

    changed: Mapping[str, int]
    """What filters have changed, by filter."""

    samples: tuple[Sample, ...]
    """Of what each rule has dropped, as many as `trace_filters` asks for."""

    escaped: int
    """Chats in which a message spells a special token, which was made of ordinary ones."""

    tasks: int
    tasks_resumed: int
    """How many of them an interrupted run had done."""

    encoder: str
    """Which libraries encoded, such as `gigatoken`; empty for text."""

    seconds: float

    storage: Mapping[str, OperationStatistics]
    """What the storages of sources and dataset were asked for, in all processes, by kind of operation."""


class Tally:
    """Adds up the steps of all tasks, and passes the sum on after each."""

    def __init__(
        self, tasks: Iterable[WorkItem], done: Mapping[str, TaskDone], tell: Callable[[IngestProgress], None] | None
    ) -> None:
        weights = {order.task_id: source_bytes(order) for order in tasks}
        self._tell = tell
        self.storage: dict[str, OperationStatistics] = {}
        self._now = IngestProgress(
            tasks_done=len(done),
            tasks=len(weights),
            source_bytes=sum(weights[task] for task in done),
            source_bytes_total=sum(weights.values()),
            documents=sum(task.documents for task in done.values()),
            tokens=sum(task.tokens for task in done.values()),
            rejects=sum(rejected_in(done.values()).values()),
        )
        self._pass_on()

    def take(self, step: Advance | TaskDone) -> None:
        """Count one step, or the end of a task, whose steps were counted before."""
        now = self._now
        advance = step if isinstance(step, Advance) else Advance()
        self.storage = add_statistics((self.storage, advance.storage))
        self._now = IngestProgress(
            tasks_done=now.tasks_done + isinstance(step, TaskDone),
            tasks=now.tasks,
            source_bytes=now.source_bytes + advance.source_bytes,
            source_bytes_total=now.source_bytes_total,
            documents=now.documents + advance.documents,
            tokens=now.tokens + advance.tokens,
            rejects=now.rejects + advance.rejects,
        )
        self._pass_on()

    def _pass_on(self) -> None:
        if self._tell is not None:
            self._tell(self._now)


def rejected_in(tasks: Iterable[TaskDone]) -> Counter[str]:
    """Return the number of rejects of `tasks` by reason."""
    return sum((Counter(task.rejected) for task in tasks), Counter())


def skipped_in(tasks: Iterable[TaskDone]) -> Counter[str]:
    """Return the number of files that `tasks` found not to be text, by reason."""
    return sum((Counter(task.skipped) for task in tasks), Counter())


def filtered_in(tasks: Iterable[TaskDone]) -> Counter[str]:
    """Return how many documents of `tasks` filters have dropped, by filter and rule."""
    return sum((Counter(task.filtered) for task in tasks), Counter())


def changed_in(tasks: Iterable[TaskDone]) -> Counter[str]:
    """Return what filters have changed in `tasks`, by filter."""
    return sum((Counter(task.changed) for task in tasks), Counter())
