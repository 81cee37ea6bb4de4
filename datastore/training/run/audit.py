"""The audit of a run: what a step consumed, down to file, byte and text.

`trace` computes it again rather than looking it up: the record says at which position a step began; dataset and order say the rest. Nothing was logged per sample.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from datastore.checkpoint.inspect import newest_values
from datastore.errors import ConfigError, MissingError
from datastore.loader.mixture.request import Data, Mixture
from datastore.loader.place.sources import source_numbers
from datastore.loader.rows.batch import Rows
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.loader.stream import open_stream
from datastore.loader.trace import DocumentSpan, Tracer, plan_step, tracer_of
from datastore.training.run.folder import RunConfig, RunFolder, RunSession, open_split, own_versions
from datastore.training.run.record import ConsumptionRecord, StepEntry, read_segments
from datastore.training.run.split import Split

__all__ = ["StepHistory", "StepTrace", "TracedSample", "TracedSpan", "read_history", "state_at", "trace"]


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
    """The stretches of documents that it is made of; none of a record."""

    dataset: str = ""
    """The source of a mixture that it is of."""

    row: dict[str, Any] = field(default_factory=dict)
    """The columns of a record that were learned from, as JSON has them."""


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

    fault: str = ""
    """"skip" or "rewind": the step moved nothing, as its gradient was bad."""

    rewound_to: int | None = None
    """Of a rewind: the step whose weights were brought back."""


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
    items, passed_over = newest_values(folder.storage, ("record", "data"))
    record = ConsumptionRecord()
    record.load_state_dict(items["record"])
    segments = read_segments(folder.storage, record.last)
    steps = [(_session_of(key), entry) for key, entries in segments for entry in entries]
    return StepHistory(items["data"], steps, passed_over)


def trace(run: str | os.PathLike[str], step: int, *, rank: int | None = None, limit: int = 0) -> StepTrace:
    """Return what `step` of `run` consumed, 1 being the first; on `rank` or all ranks; the first `limit` samples, 0 for all.

    Raises:
        MissingError: there is no run, or no checkpoint knows of that step (yet).
        ConfigError: `rank` did not take part in it.
        CorruptError: record or data are damaged.
    """
    run = os.fspath(run)
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
    split = _split_of(config, session)
    data = split.training
    if split.rows is not None:
        found = _rows_of(
            config,
            split,
            state_at(entry.cursor, history, session, data),
            entry,
            Rank() if rank is None else Rank(rank, world),
        )
        return StepTrace(
            step=step,
            cursor=entry.cursor,
            rows=len(found),
            world=world,
            rank=rank,
            session=name,
            fingerprint=entry.fingerprint,
            samples=found[: limit or None],
        )
    plan = plan_step(
        data,
        state_at(entry.cursor, history, session, data),
        global_batch=entry.samples,
        rank=Rank() if rank is None else Rank(rank, world),
    )
    chosen = np.argsort(plan.positions)[: limit or None]
    tracers = _Tracers(config, data)
    return StepTrace(
        step=step,
        cursor=entry.cursor,
        rows=len(plan.positions),
        world=world,
        rank=rank,
        session=name,
        fingerprint=entry.fingerprint,
        fault=entry.fault,
        rewound_to=entry.rewound_to,
        samples=[
            TracedSample(position, *tracers.trace(sample))
            for position, sample in zip(plan.positions[chosen].tolist(), plan.samples[chosen].tolist(), strict=True)
        ],
    )


def _split_of(config: RunConfig, session: RunSession) -> Split:
    """Return the data as `session` read them; if that version is gone, as they are now, without what was purged."""
    try:
        return open_split(config, session.data or own_versions(config))
    except MissingError:
        return open_split(config)


def _rows_of(
    config: RunConfig, split: Split, state: Mapping[str, Any], entry: StepEntry, rank: Rank
) -> list[TracedSample]:
    """Return the records of a step by position, with what their objective reads of them."""
    from datastore.training.objectives.catalog import make_objective  # noqa: PLC0415 - loads torch, which only records need
    from datastore.training.objectives.records import RecordObjective  # noqa: PLC0415

    settings, objective = config.settings, make_objective(config.settings.objective)
    assert split.rows is not None
    assert isinstance(objective, RecordObjective)
    with RowLoader(
        split.datasets[0],
        global_batch=settings.data.global_batch,
        seed=settings.data.seed,
        rank=rank,
        rows=Rows(numbers=np.arange(split.rows.kept)),
        options=msgspec.structs.replace(settings.loader, columns=tuple(dict.fromkeys(objective.columns))),
    ) as loader:
        loader.load_state_dict(state)
        batch = next(loader)
    assert batch.cursor == entry.cursor
    rows = msgspec.to_builtins([_shown(row) for row in batch.data.to_pylist()])
    found = [
        TracedSample(position, number, [], row=row)
        for position, number, row in zip(batch.positions.tolist(), batch.numbers.tolist(), rows, strict=True)
    ]
    return sorted(found, key=lambda sample: sample.position)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return `row` with the size of bytes in their place."""
    return {name: f"{len(value):,} bytes" if isinstance(value, bytes) else value for name, value in row.items()}


def state_at(cursor: int, history: StepHistory, session: RunSession, data: Data) -> dict[str, Any]:
    """Return a state of the loader at `cursor`, a position that `session` came to."""
    if isinstance(data, Mixture):
        return session.loader | {"cursor": cursor}
    return history.loader | {"cursor": cursor, "version": data.version}


class _Tracers:
    """Finds samples of one dataset or of several."""

    def __init__(self, config: RunConfig, data: Data) -> None:
        loader, seq_len = config.settings.loader, config.settings.data.seq_len
        options = LoaderSettings(deletions=loader.deletions, packing=loader.packing)
        stream = open_stream(data, seq_len=seq_len, seed=0, options=options)
        self._sources = stream.sources
        self._tracers = [tracer_of(source, stream) for source in stream.sources]

    def trace(self, sample: int) -> tuple[int, list[TracedSpan], str]:
        """Return the number of a sample in its source, what it is made of, and the name of the source."""
        number = int(source_numbers(self._sources, np.array([sample]))[0])
        source, tracer = self._sources[number], self._tracers[number]
        (origin,) = tracer.locate([sample - source.place.first_sample])
        known = source.dataset.commit.tokenizer is not None
        return origin.sample, [_traced(tracer, span, known=known) for span in origin.spans], source.name


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
