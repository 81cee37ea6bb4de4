"""The report of an ingest: how far it is, at the end what it did, and later what it has rejected.

A record is repaired in its source, which keeps it whole; the next ingest finds the file changed and, with `replace`, takes it in
the place of what it was. The rejects of its earlier state are then over, and not shown any more.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Literal, NamedTuple

from datastore.dataset.journal import Journal, Plan, TaskDone
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.keys import JOURNALS_FOLDER
from datastore.dataset.log.manifest import Kind
from datastore.dataset.roots import open_roots
from datastore.errors import CorruptError
from datastore.ingestion.destination import made_by_ingest
from datastore.ingestion.plan import WorkItem, source_bytes
from datastore.ingestion.quality.sieve import Sample
from datastore.ingestion.reading.rejects import decode_rejects
from datastore.ingestion.tasks import Advance
from datastore.storage.base import Storage
from datastore.storage.statistics import OperationStatistics, add_statistics

__all__ = [
    "IngestProgress",
    "IngestReport",
    "RejectedRecord",
    "Stage",
    "Tally",
    "changed_in",
    "filtered_in",
    "lengths_in",
    "rejected_in",
    "rejected_records",
    "skipped_in",
]


Stage = Literal["plan", "work", "commit"]


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """How far an ingest is. What an interrupted run did counts as done."""

    stage: Stage
    """`plan`: sources are listed, and looked at; `work`; `commit`: all is done, and becomes a version."""

    tasks_done: int
    tasks: int
    source_bytes: int
    source_bytes_total: int
    documents: int
    tokens: int
    rejects: int

    @classmethod
    def at_first(cls) -> "IngestProgress":
        """Return how far it is before anything is known."""
        return cls("plan", 0, 0, 0, 0, 0, 0, 0)


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
    """Of those that were read, files that the dataset has in another state, whose documents stay unless `replace` is set."""

    replaced_documents: int
    """Documents of such states that were deleted, as `replace` says."""

    changed_since: int
    """The last version that brought such a state; 0 if no file has changed."""

    skipped: Mapping[str, int]
    """Files and folders that were left out."""

    documents: int
    tokens: int
    text_bytes: int
    lengths: tuple[int, ...]
    """How many texts are how long: number i counts those of 2**(i - 1) up to 2**i bytes. Rows that were taken over are not counted."""

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

    tasks_open: int
    """How many of them are in shares that are not done yet; only then is the ingest not over."""

    encoder: str
    """Which libraries encoded, such as `gigatoken`; empty for text."""

    seconds: float

    cpu_s: Mapping[str, float]
    """CPU seconds of all tasks that this run did, by what they went into: `read`, `filter`, `encode`, `write`."""

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
        self.cpu_s: dict[str, float] = {}
        self._now = IngestProgress(
            stage="work",
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
        for stage, seconds in advance.cpu_s.items():
            self.cpu_s[stage] = self.cpu_s.get(stage, 0.0) + seconds
        self._now = replace(
            now,
            tasks_done=now.tasks_done + isinstance(step, TaskDone),
            source_bytes=now.source_bytes + advance.source_bytes,
            documents=now.documents + advance.documents,
            tokens=now.tokens + advance.tokens,
            rejects=now.rejects + advance.rejects,
        )
        self._pass_on()

    def commit(self) -> None:
        """Say that all is done, and becomes a version."""
        self._now = replace(self._now, stage="commit")
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


def lengths_in(tasks: Iterable[TaskDone]) -> tuple[int, ...]:
    """Return how many texts of `tasks` are how long, by powers of two."""
    return tuple(map(sum, zip_longest(*(task.lengths for task in tasks), fillvalue=0)))


def filtered_in(tasks: Iterable[TaskDone]) -> Counter[str]:
    """Return how many documents of `tasks` filters have dropped, by filter and rule."""
    return sum((Counter(task.filtered) for task in tasks), Counter())


def changed_in(tasks: Iterable[TaskDone]) -> Counter[str]:
    """Return what filters have changed in `tasks`, by filter."""
    return sum((Counter(task.changed) for task in tasks), Counter())


class RejectedRecord(NamedTuple):
    """One record that gave no document."""

    version: int
    """Of the dataset, by which the others of its ingest came in; 0 if that was refused, or has not ended."""

    source: str
    offset: int
    reason: str
    excerpt: str
    """How it begins."""


def rejected_records(url: str | os.PathLike[str]) -> Iterator[RejectedRecord]:
    """Yield what the ingests of the dataset at `url` have rejected and kept: those that added nothing first, then newest first.

    Raises:
        MissingError: there is no dataset.
        CorruptError: a file of rejects is damaged.
    """
    storage, info = open_roots(os.fspath(url))
    log = CommitLog(storage, exclusive=info.exclusive)
    newest = log.newest()
    commits = [commit for commit in log.history(newest) if made_by_ingest(commit)] if newest else []
    versions = {commit.ingest_id: commit.version for commit in commits}
    found = {stat.key.split("/")[1] for stat in storage.list(JOURNALS_FOLDER)}
    read_later: set[str] = set()
    for ingest_id in [*sorted(found - versions.keys()), *(commit.ingest_id for commit in commits)]:
        version = versions.get(ingest_id, 0)
        for record in _of_ingest(storage, ingest_id, version):
            if record.source not in read_later:
                yield record
        plan = _plan(storage, ingest_id)
        if version and plan is not None:
            read_later |= {file.path for file in plan.files}


def _of_ingest(storage: Storage, ingest_id: str, version: int) -> Iterator[RejectedRecord]:
    for key, raw in Journal(storage, ingest_id).rejects():
        for each in decode_rejects(raw, where=key):
            yield RejectedRecord(version, *each)


def _plan(storage: Storage, ingest_id: str) -> Plan | None:
    try:
        return Journal(storage, ingest_id).find_plan()
    except CorruptError:
        return None
