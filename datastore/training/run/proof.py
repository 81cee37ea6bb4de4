"""The proof of a run: each sample of the planned order was consumed once.

It reads the run's own record. One process plans every step again from dataset, seed and settings, reads the tokens again, and compares: cursors
follow each other from 0, every step's fingerprint is that of the samples and tokens that were planned, and within an epoch of a
dataset no sample comes twice. Neither the number of ranks nor the number of interruptions is known to it.

Each step is read from the version of the dataset that its session read. If that version has been purged, the samples of a
step are proven by the plan, which deletions do not change, and its tokens where none of them has been deleted since.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import cast

import msgspec
import numpy as np

from datastore.errors import MissingError
from datastore.loader.batch import Batch
from datastore.loader.loader import Loader
from datastore.loader.order.lanes import I64
from datastore.loader.settings import Rank
from datastore.training.objectives.catalog import make_objective
from datastore.training.run.architecture import context_of
from datastore.training.run.audit import StepHistory, read_history, state_at
from datastore.training.run.feed import AnyFeed, RecordBatch, RecordFeed, open_feed
from datastore.training.run.folder import RunConfig, RunFolder, RunSession, open_split, own_versions
from datastore.training.run.record import StepEntry
from datastore.units import Progress

__all__ = ["Proof", "prove"]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared, and what differs."""

    steps: int
    """Taken up to the newest sound checkpoint: its number."""

    samples: int
    """Consumed by all steps."""

    distinct: int
    """Different ones among them."""

    epoch_samples: int
    """Samples in one pass over the training data."""

    sessions: int
    """Sessions that took these steps."""

    worlds: list[int]
    """How many ranks each of them had."""

    purged: int = 0
    """Steps with tokens that cannot be compared any more: their version is gone, and they have been deleted since."""

    skipped: int = 0
    """Steps that moved nothing, as their gradient was bad."""

    rewound: int = 0
    """Steps after which the weights of an earlier one were brought back, for the same reason."""

    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that are damaged, each with its reason; problems, too."""

    problems: list[str] = field(default_factory=list)
    """Empty: every sample of the planned order was consumed exactly once."""

    @property
    def holds(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def prove(run: str | os.PathLike[str], *, progress: Progress | None = None) -> Proof:
    """Compare the record of `run` with its plan, up to its newest checkpoint. Reads all tokens of those steps again.

    `progress` gets the steps that were compared, and all.

    If that checkpoint is damaged, the record up to the newest sound one is compared, and that the rest is not known is
    a problem.

    Raises:
        MissingError: there is no run, or it has no checkpoint yet.
        CorruptError: the record or the dataset is damaged.
    """
    run = os.fspath(run)
    folder = RunFolder.open(run)
    config = folder.config()
    history = read_history(folder)
    sessions = [folder.session(name) for name in dict.fromkeys(session for session, _ in history.steps)]
    counts = _Counts()
    problems = list(history.passed_over)
    cursor = done = 0
    for session, (_, steps) in zip(sessions, groupby(history.steps, key=lambda step: step[0]), strict=True):
        with _reader_of(config, history, session, cursor=cursor) as reader:
            for _, entry in steps:
                problems += _compare(entry, reader, counts)
                done += 1
                if progress is not None:
                    progress(done, len(history.steps))
            cursor = reader.loader.cursor
    return Proof(
        steps=len(history.steps),
        samples=sum(count.drawn for count in counts.by_name.values()),
        distinct=sum(int(count.ever.sum()) for count in counts.by_name.values()),
        epoch_samples=sum(len(count.ever) for count in counts.by_name.values()),
        sessions=len(sessions),
        worlds=[session.world for session in sessions],
        purged=counts.purged,
        skipped=counts.skipped,
        rewound=counts.rewound,
        passed_over=history.passed_over,
        problems=problems[:_SHOWN],
    )


class _Count:
    """Which samples of one source came, in this epoch and ever. Memory: two bytes for each sample of an epoch."""

    def __init__(self, epoch_samples: int) -> None:
        self.drawn = 0
        self.ever = np.zeros(epoch_samples, np.bool_)
        self._epoch = -1
        self._seen = np.zeros(epoch_samples, np.bool_)

    def add(self, samples: I64, positions: I64 | None = None) -> int:
        """Count `samples`, in the order of their positions; return how many of them had come before in their epoch.

        Where some may be missing, `positions` say of which epoch each is.
        """
        again = 0
        drawn = self.drawn + np.arange(len(samples)) if positions is None else positions
        epochs = drawn // len(self.ever)
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch = int(epoch)
                self._seen[:] = False
            own = samples[epochs == epoch]
            again += len(own) - len(np.unique(own[~self._seen[own]]))
            self._seen[own] = True
            self.ever[own] = True
        self.drawn += len(samples)
        return again


class _Counts:
    """The same for all sources of a run, by name: a session may have had others than the one before."""

    def __init__(self) -> None:
        self.purged = self.skipped = self.rewound = 0
        self.by_name: dict[str, _Count] = {}

    def add_records(self, batch: RecordBatch, *, rows_per_epoch: int) -> int:
        """Count the records of `batch`, of which deleted ones are missing; return as `add`."""
        count = self.by_name.setdefault("", _Count(rows_per_epoch))
        return count.add(batch.numbers, batch.positions)

    def add(self, batch: Batch) -> int:
        """Count the samples of `batch`; return how many of them had come before in their epoch."""
        order = np.argsort(batch.positions)
        samples, numbers = batch.samples[order], batch.sources[order]
        again = 0
        for number, source in enumerate(batch.stream.sources):
            own = samples[numbers == number] - source.place.first_sample
            count = self.by_name.setdefault(source.name, _Count(source.runs.samples))
            again += count.add(own) if len(own) else 0
        return again


@dataclass(frozen=True, slots=True)
class _Reader:
    """A loader of all samples of each step."""

    loader: AnyFeed
    is_exact: bool
    """Whether it reads the version that was trained on, not a later one, with more deletions."""

    def count(self, batch: Batch | RecordBatch, counts: _Counts) -> int:
        """Add `batch` to `counts`."""
        if isinstance(batch, RecordBatch):
            assert isinstance(self.loader, RecordFeed)
            return counts.add_records(batch, rows_per_epoch=self.loader.rows_per_epoch)
        return counts.add(batch)

    def hides(self, batch: Batch | RecordBatch) -> bool:
        """Return whether tokens of `batch` are deleted that may not have been when they were trained on."""
        return not self.is_exact and (isinstance(batch, RecordBatch) or batch.has_deleted)


@contextmanager
def _reader_of(config: RunConfig, history: StepHistory, session: RunSession, *, cursor: int) -> Iterator[_Reader]:
    """Yield a reader of the steps that `session` took, from `cursor` on."""
    exact = True
    try:
        split = open_split(config, session.data or own_versions(config))
    except MissingError:
        split, exact = open_split(config), False
    objective = make_objective(config.settings.objective)
    feed = open_feed(split, config.settings, objective, context_of(config), rank=Rank())
    with closing(feed):
        state = state_at(cursor, history, session, split.training)
        if isinstance(feed, Loader):
            feed.replay(state)
        else:
            feed.load_state_dict(state)
        yield _Reader(feed, exact)


def _compare(entry: StepEntry, reader: _Reader, counts: _Counts) -> list[str]:
    """Return what is wrong with one step."""
    batch = next(cast("Iterator[Batch | RecordBatch]", reader.loader))
    planned = StepEntry(
        step=entry.step,
        cursor=batch.cursor,
        samples=int(batch.valid.sum()),
        fingerprint=f"{batch.fingerprint():016x}",
    )
    if planned.fingerprint != entry.fingerprint and reader.hides(batch):
        counts.purged += 1
        planned = msgspec.structs.replace(planned, fingerprint=entry.fingerprint)
    # What became of a step is no part of the plan.
    planned = msgspec.structs.replace(planned, fault=entry.fault, rewound_to=entry.rewound_to)
    counts.skipped += entry.fault == "skip"
    counts.rewound += entry.fault == "rewind"
    again = reader.count(batch, counts)
    problems = [f"step {entry.step} has samples that came before in this epoch: {again}"] if again else []
    if entry != planned:
        problems.append(f"step {entry.step} was planned as {planned}, and recorded as {entry}")
    return problems
