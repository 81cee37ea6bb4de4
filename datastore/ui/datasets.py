"""A dataset as its pages show it: versions, lengths and sources, shards, and what a loader would read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from datastore.dataset.diff import Diff, diff
from datastore.dataset.log.manifest import Commit, Totals
from datastore.dataset.log.tags import list_tags, read_tag
from datastore.dataset.shards.files import read_documents
from datastore.dataset.snapshot import Dataset
from datastore.display import upper_half
from datastore.errors import ConfigError
from datastore.loader.order.order import Planner
from datastore.loader.place.sources import course_of
from datastore.loader.settings import LoaderSettings, Rank
from datastore.loader.stream import open_stream
from datastore.threads import in_parallel

__all__ = [
    "Bar",
    "Cell",
    "PlannedStep",
    "Step",
    "bars_of_lengths",
    "change_in",
    "planned",
    "shard_map",
    "sources_of",
    "timeline",
]

_SAMPLED = 16
"""Shards that stand for all where documents are counted."""

_SAMPLED_ROWS = 1_000
"""Of each of those, where their sources are looked at."""

_SOURCES = 12

_CELLS = 2048
"""Of a map of shards; each stands for as many as it takes."""

_MOST_RANKS, _MOST_STEPS = 64, 64


@dataclass(frozen=True, slots=True)
class Step:
    """One version of a dataset in its timeline."""

    commit: Commit
    tags: tuple[str, ...]
    documents: int
    """More than the version before; deleted ones are not there."""

    tokens: int
    shards: int
    first: bool = False


def timeline(dataset: Dataset, *, before: int | None = None, most: int = 30) -> list[Step]:
    """Return `most` versions up to the newest, or those before a version, newest first: one small read for each.

    Raises:
        DatastoreError: a commit cannot be read.
    """
    newest = dataset.commit if before is None else dataset.log.read(before)
    names: dict[int, list[str]] = {}
    for name in list_tags(dataset.storage):
        names.setdefault(read_tag(dataset.storage, name).version, []).append(name)
    commits = list(islice(dataset.log.history(newest), most + 1))
    steps = []
    for place, commit in enumerate(commits[:most]):
        older = commits[place + 1].totals if place + 1 < len(commits) else Totals()
        known = place + 1 < len(commits) or commit.version == 1
        steps.append(
            Step(
                commit=commit,
                tags=tuple(names.get(commit.version, ())),
                documents=_live(commit.totals) - _live(older) if known else 0,
                tokens=_live_tokens(commit.totals) - _live_tokens(older) if known else 0,
                shards=commit.totals.shards - older.shards if known else 0,
                first=commit.version == 1,
            )
        )
    return steps


def _live(totals: Totals) -> int:
    return totals.documents - totals.deleted_documents


def _live_tokens(totals: Totals) -> int:
    return totals.tokens - totals.deleted_tokens


def change_in(dataset: Dataset, version: int) -> Diff | None:
    """Return what a version added and removed; None of the first, or if the one before has expired.

    Raises:
        DatastoreError: a segment cannot be read.
    """
    if version <= max(1, dataset.commit.min_version):
        return None
    return diff(dataset.at(dataset.log.read(version - 1)), dataset.at(dataset.log.read(version)))


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar of a histogram."""

    name: str
    count: int
    share: float
    """Of the largest."""


def bars_of_lengths(dataset: Dataset) -> tuple[list[Bar], int]:
    """Return how many documents have so many tokens, by powers of two, and up to how many at least half of them have.

    Of a large dataset some shards stand for all. Of records there are none.

    Raises:
        DatastoreError: a file cannot be read.
    """
    if dataset.kind != "tokens" or not dataset.totals.documents:
        return [], 0
    found = dataset.lengths(most_shards=_SAMPLED)
    low = next((bits for bits, count in enumerate(found) if count), 0)
    names = [f"{1 << bits >> 1:,}" if bits > 1 else str(bits) for bits in range(low, len(found))]
    return _bars(names, found[low:]), (1 << upper_half(found)) - 1 if any(found) else 0


def sources_of(dataset: Dataset) -> list[Bar]:
    """Return how many documents come from where, the largest first: by the first part of their source that tells them apart.

    Of a large dataset some documents of some shards stand for all; deleted ones do not count.

    Raises:
        DatastoreError: a file cannot be read.
    """
    chosen = spread(len(dataset.segments), _SAMPLED)

    def read(index: int) -> list[str]:
        if dataset.kind == "tokens":
            table = read_documents(dataset.storage, dataset.segments.shard(index), columns=["source"])
        elif "source" in dataset.schema.names:
            table = dataset.record_shard(index).select(["source"])
        else:
            return []
        column, alive = table.column("source"), dataset.live_rows(index)
        rows = np.arange(len(column)) if alive is None else np.flatnonzero(alive)
        return [str(column[int(rows[place])].as_py()) for place in spread(len(rows), _SAMPLED_ROWS)]

    sources = [source for part in in_parallel(read, chosen) for source in part if source]
    for depth in range(1, 6):
        counts = Counter("/".join(source.split("/")[:depth]) for source in sources)
        if len(counts) > 1:
            break
    else:
        counts = Counter(sources)
    most = counts.most_common(_SOURCES)
    rest = sum(counts.values()) - sum(count for _, count in most)
    if rest:
        most.append((f"{len(counts) - _SOURCES:,} others", rest))
    return _bars([name for name, _ in most], [count for _, count in most])


def _bars(names: Sequence[str], counts: Sequence[int]) -> list[Bar]:
    largest = max(counts, default=0) or 1
    return [Bar(name, count, count / largest) for name, count in zip(names, counts, strict=True)]


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers below `count`, evenly spread.

    >>> spread(10, 3)
    [0, 4, 9]
    """
    if not count:
        return []
    return [int(place) for place in np.unique(np.linspace(0, count - 1, min(count, most), dtype=np.int64))]


@dataclass(frozen=True, slots=True)
class Cell:
    """Some neighbouring shards in a map."""

    start: int
    stop: int
    size_bytes: int
    documents: int
    deleted: int


def shard_map(dataset: Dataset) -> list[Cell]:
    """Return all shards, in order, as some two thousand cells at most. O(shards) in NumPy, no object for each.

    Raises:
        DatastoreError: a segment or a table of deletions cannot be read.
    """
    segments = dataset.segments
    count = len(segments)
    if not count:
        return []
    deleted = np.zeros(count, dtype=np.int64)
    uids = sorted(dataset.deletions.uids)
    for uid, place in zip(uids, segments.find(uids).tolist(), strict=True):
        if place >= 0:
            deleted[place] = dataset.deletions.rows(uid).size
    starts = np.unique(np.linspace(0, count, min(count, _CELLS), endpoint=False).astype(np.int64))
    stops = np.append(starts[1:], count)
    columns = [np.add.reduceat(values, starts) for values in (segments.size_bytes, segments.documents, deleted)]
    return [Cell(*map(int, row)) for row in zip(starts, stops, *columns, strict=True)]


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """Which shards one rank reads in one step, each with how many samples of it."""

    step: int
    rank: int
    shards: tuple[tuple[int, int], ...]


def planned(
    dataset: Dataset, *, ranks: int, steps: int, seq_len: int, global_batch: int, seed: int = 0
) -> list[PlannedStep]:
    """Return which shards `ranks` ranks read in the first `steps` steps of a run, as their loaders plan them; nothing is read.

    Raises:
        ConfigError: a number is out of range, or does not suit the dataset.
    """
    if not (1 <= ranks <= _MOST_RANKS and 1 <= steps <= _MOST_STEPS):
        raise ConfigError(
            "too much for a picture",
            ranks=ranks,
            steps=steps,
            hint=f"Up to {_MOST_RANKS} ranks and {_MOST_STEPS} steps.",
        )
    stream = open_stream(dataset, seq_len=seq_len, seed=seed, options=LoaderSettings())
    order, end = course_of(stream.sources, stream.start, epochs=None)
    found = []
    for rank in range(ranks):
        planner = Planner(order, rank=Rank(rank, ranks), global_batch=global_batch, total=end)
        for step, plan in enumerate(planner.plan(0, batches=steps)):
            shards, counts = np.unique(plan.shards[plan.valid], return_counts=True)
            found.append(PlannedStep(step, rank, tuple(zip(shards.tolist(), counts.tolist(), strict=True))))
    return found
