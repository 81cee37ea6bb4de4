"""The audit of a run: what a step consumed, down to file, byte and text, and the proof that each sample came once.

`trace` computes it again rather than looking it up: the record says at which position a step began; dataset and order say the rest. Nothing was logged per sample.

`prove` reads the run's own record. One process plans every step again from dataset, seed and settings, reads the tokens again, and compares: cursors follow
each other from 0, every step's fingerprint is that of the samples and tokens that were planned, and within an epoch no
sample comes twice. Neither the number of ranks nor the number of interruptions is known to it.

Each step is read from the version of the dataset that its session read. If that version has been purged, the samples of a
step are proven by the plan, which deletions do not change, and its tokens where none of them has been deleted since.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import msgspec
import numpy as np

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, MissingError
from datastore.loader.batch import Batch
from datastore.loader.loader import Loader
from datastore.loader.settings import Rank
from datastore.loader.trace import DocumentSpan, Tracer, plan_step
from datastore.training.run.data import Versions
from datastore.training.run.folder import RunConfig, RunFolder, RunSession, open_split, own_versions
from datastore.training.run.record import ConsumptionRecord, StepEntry, read_segments

__all__ = ["Proof", "StepHistory", "StepTrace", "TracedSample", "TracedSpan", "prove", "read_history", "trace"]


@dataclass(frozen=True, slots=True)
class TracedSpan:
    """A stretch of one document in a sample."""

    document: str
    source: str
    start: int
    stop: int
    """Bytes [start, stop) of the source."""

    exact: bool
    """Whether those are the bytes of the stretch; if the tokenizer does not tell, they are those of the document."""

    tokens: int
    text: str
    """Empty if the dataset names no tokenizer, or the document is deleted."""

    deleted: bool = False
    """Whether the document is deleted in the version that was read: the step saw end-of-text in its place."""


@dataclass(frozen=True, slots=True)
class TracedSample:
    """One row of a step."""

    position: int
    """Its place in the order."""

    sample: int
    """Its number in the dataset."""

    spans: list[TracedSpan]


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What a step consumed, on one rank or on all."""

    step: int
    cursor: int
    rows: int
    """Samples of the step, on that rank or on all."""

    world: int
    """Ranks that took this step."""

    rank: int | None
    session: str
    fingerprint: str
    """As recorded, of all ranks together."""

    samples: list[TracedSample]
    """By position, at most as many as were asked for."""


@dataclass(frozen=True, slots=True)
class StepHistory:
    """How the newest checkpoint came to be."""

    loader: dict[str, Any]
    """State of the loader in that checkpoint."""

    steps: list[tuple[str, StepEntry]]
    """Every step that led to it, in order, with the session that took it."""

    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that are damaged, each with its reason."""


def read_history(folder: RunFolder) -> StepHistory:
    """Return the history of a run up to its newest sound checkpoint.

    Raises:
        MissingError: the run has no checkpoint yet.
        CorruptError: the record or every checkpoint is damaged.
    """
    record = ConsumptionRecord()
    loader: dict[str, Any] = {}
    with Checkpointer(folder.storage) as checkpointer:
        if checkpointer.latest() is None:
            raise MissingError(
                "the run has no checkpoint yet", url=folder.url, hint="Let it train until the first one."
            )
        found = checkpointer.restore({"record": record, "data": loader}, partial=True)
    segments = read_segments(folder.storage, record.last)
    steps = [(_session_of(key), entry) for key, entries in segments for entry in entries]
    return StepHistory(loader, steps, found.passed_over)


def trace(run: str, step: int, *, rank: int | None = None, limit: int = 0) -> StepTrace:
    """Return what `step` (1 is the first) consumed, on `rank` or on all ranks; of the first `limit` samples, 0 for all.

    Raises:
        MissingError: there is no run, or no checkpoint knows of that step (yet).
        ConfigError: `rank` did not take part in it.
        CorruptError: record or data are damaged.
    """
    folder = RunFolder.open(run)
    config = folder.config()
    history = read_history(folder)
    if not 1 <= step <= len(history.steps):
        raise MissingError(
            "no checkpoint knows of this step",
            step=step,
            last=len(history.steps),
            hint="Name a step between 1 and the last.",
        )
    name, entry = history.steps[step - 1]
    session = folder.session(name)
    world = session.world
    if rank is not None and not 0 <= rank < world:
        raise ConfigError("no such rank took this step", rank=rank, world=world, hint=f"Name one below {world}.")
    dataset = _dataset_of(config, session)
    plan = plan_step(
        dataset,
        history.loader | {"cursor": entry.cursor, "version": dataset.version},
        global_batch=entry.samples,
        rank=Rank() if rank is None else Rank(rank, world),
    )
    chosen = np.argsort(plan.positions)[: limit or None]
    loader = config.settings.loader
    seq_len = config.settings.data.seq_len
    tracer = Tracer(dataset, seq_len=seq_len, deletions=loader.deletions, packing=loader.packing)
    known = dataset.commit.tokenizer is not None
    origins = tracer.locate(plan.samples[chosen].tolist())
    return StepTrace(
        step=step,
        cursor=entry.cursor,
        rows=len(plan.positions),
        world=world,
        rank=rank,
        session=name,
        fingerprint=entry.fingerprint,
        samples=[
            TracedSample(position, origin.sample, [_traced(tracer, span, known=known) for span in origin.spans])
            for position, origin in zip(plan.positions[chosen].tolist(), origins, strict=True)
        ],
    )


def _dataset_of(config: RunConfig, session: RunSession) -> Dataset:
    """Return the training data as `session` read it; if that version is gone, as it is now, without what was purged."""
    try:
        return open_split(config, session.data or own_versions(config)).training
    except MissingError:
        return open_split(config).training


def _traced(tracer: Tracer, span: DocumentSpan, *, known: bool) -> TracedSpan:
    found = tracer.text_range(span)
    start, stop = found or (0, span.length)
    return TracedSpan(
        document=span.document,
        source=span.source,
        start=span.offset + start,
        stop=span.offset + stop,
        exact=found is not None,
        tokens=span.sample_tokens[1] - span.sample_tokens[0],
        text=tracer.text(span) if known else "",
        deleted=span.deleted,
    )


def _session_of(key: str) -> str:
    return key.removesuffix(".jsonl").rpartition("-")[2]


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

    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that are damaged, each with its reason; problems, too."""

    problems: list[str] = field(default_factory=list)
    """Empty: every sample of the planned order was consumed exactly once."""

    @property
    def holds(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def prove(run: str) -> Proof:
    """Compare the record of `run` with its plan, up to its newest checkpoint. Reads all tokens of those steps again.

    If that checkpoint is damaged, the record up to the newest sound one is compared, and that the rest is not known is
    a problem.

    Raises:
        MissingError: there is no run, or it has no checkpoint yet.
        CorruptError: the record or the dataset is damaged.
    """
    folder = RunFolder.open(run)
    config = folder.config()
    history = read_history(folder)
    sessions = [folder.session(name) for name in dict.fromkeys(session for session, _ in history.steps)]
    count: _Count | None = None
    problems = list(history.passed_over)
    cursor = 0
    for session, (_, steps) in zip(sessions, groupby(history.steps, key=lambda step: step[0]), strict=True):
        with _reader_of(config, history, session.data or own_versions(config), cursor=cursor) as reader:
            count = count or _Count(reader.loader.samples_per_epoch)
            for _, entry in steps:
                problems += _compare(entry, reader, count)
            cursor = reader.loader.cursor
    count = count or _Count(0)
    return Proof(
        steps=len(history.steps),
        samples=count.samples,
        distinct=int(count.ever.sum()),
        epoch_samples=len(count.ever),
        sessions=len(sessions),
        worlds=[session.world for session in sessions],
        purged=count.purged,
        passed_over=history.passed_over,
        problems=problems[:_SHOWN],
    )


class _Count:
    """Which samples came, in this epoch and ever. Memory: two bytes for each sample of an epoch."""

    def __init__(self, epoch_samples: int) -> None:
        self.samples = self.purged = 0
        self.ever = np.zeros(epoch_samples, np.bool_)
        self._epoch = -1
        self._seen = np.zeros(epoch_samples, np.bool_)

    def add(self, batch: Batch) -> int:
        """Count the samples of `batch`; return how many of them had come before in their epoch."""
        again = 0
        epochs = batch.positions // len(self.ever)
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch = int(epoch)
                self._seen[:] = False
            samples = batch.samples[epochs == epoch]
            again += len(samples) - len(np.unique(samples[~self._seen[samples]]))
            self._seen[samples] = True
            self.ever[samples] = True
        self.samples += len(batch.samples)
        return again


@dataclass(frozen=True, slots=True)
class _Reader:
    """A loader of all samples of each step."""

    loader: Loader
    is_exact: bool
    """Whether it reads the version that was trained on, not a later one, with more deletions."""

    def hides(self, batch: Batch) -> bool:
        """Return whether tokens of `batch` are deleted that may not have been when they were trained on."""
        return not self.is_exact and batch.has_deleted


@contextmanager
def _reader_of(config: RunConfig, history: StepHistory, versions: Versions, *, cursor: int) -> Iterator[_Reader]:
    """Yield a reader of the steps from `cursor` on, of a session that read `versions`."""
    exact = True
    try:
        dataset = open_split(config, versions).training
    except MissingError:
        dataset, exact = open_split(config).training, False
    data = config.settings.data
    with Loader(
        dataset,
        seq_len=data.seq_len,
        global_batch=data.global_batch,
        seed=data.seed,
        options=config.settings.loader,
    ) as loader:
        loader.load_state_dict(history.loader | {"cursor": cursor, "version": dataset.version})
        yield _Reader(loader, exact)


def _compare(entry: StepEntry, reader: _Reader, count: _Count) -> list[str]:
    """Return what is wrong with one step."""
    batch = next(reader.loader)
    planned = StepEntry(
        step=entry.step,
        cursor=batch.cursor,
        samples=len(batch.samples),
        fingerprint=f"{batch.fingerprint():016x}",
    )
    if planned.fingerprint != entry.fingerprint and reader.hides(batch):
        count.purged += 1
        planned = msgspec.structs.replace(planned, fingerprint=entry.fingerprint)
    again = count.add(batch)
    problems = [f"step {entry.step} has samples that came before in this epoch: {again}"] if again else []
    if entry != planned:
        problems.append(f"step {entry.step} was planned as {planned}, and recorded as {entry}")
    return problems
