"""Remove what nobody can read any more: files that no readable version names, and what writers that died have left.

Everything from the oldest readable version to the newest is kept, tagged versions among it, and so is what a writer may
be about to commit: any file younger than a day, all that was written since a running ingest began, and a file that was
written again since it was listed. What is no file of ours is never touched, nor is the log. The storage is listed once;
the price of a vacuum is that listing, and the segments of all readable versions.

A writer that takes longer than `older_than_s` from its first shard to its commit, and is no ingest, is not protected.
"""

import logging
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice

from datastore.dataset.log.keys import JOURNALS_FOLDER, KINDS, PROBE_FOLDER, kind_of_key
from datastore.dataset.log.manifest import oldest_readable
from datastore.dataset.operations.expire import time_of
from datastore.dataset.operations.purge.purge import finish_purges
from datastore.dataset.operations.transaction import DatasetLike, open_for_change
from datastore.dataset.shards.inventory import KeySet, keys_of_versions
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, MissingError, StorageError
from datastore.storage.base import Stat, Storage
from datastore.threads import in_parallel
from datastore.units import Progress

__all__ = ["DAY_S", "Amount", "VacuumReport", "vacuum"]

DAY_S = 86_400.0
"""An ingest that has written nothing for so long is abandoned; other files of that age belong to no writer at work."""

_LOGGER = logging.getLogger(__name__)

_UNFINISHED = "unfinished_writes"

_PLAN = "/plan.json"

_OFJOURNALS_FOLDER = {"shards", "documents", "tokenizers"}

_AT_ONCE = 4096
"""Keys that are looked up together."""

Found = tuple[str, Stat]
"""The kind of a file, and what the listing says of it."""


@dataclass(frozen=True, slots=True)
class Amount:
    """How much there is of something."""

    files: int = 0
    bytes: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.files + other.files, self.bytes + other.bytes)


@dataclass(frozen=True, slots=True)
class VacuumReport:
    """What was removed, or would be."""

    url: str
    oldest: int
    """The oldest version that can be read."""

    newest: int
    dry_run: bool
    listed: int
    """Files looked at."""

    removed: dict[str, Amount]
    """By kind: shards, documents, segments, deletions, parity, tokenizers, ingests, probes, unfinished_writes."""

    young: Amount
    """Named by no version, but kept for their age."""

    of_ingests: Amount
    """Named by no version, but kept for an ingest that goes on."""

    running: tuple[str, ...]
    """The ids of these ingests."""

    seconds: float

    @property
    def total(self) -> Amount:
        """The sum of `removed`."""
        return sum(self.removed.values(), Amount())


@dataclass(slots=True)
class _Findings:
    """What a look at the storage has found."""

    unnamed: list[Found] = field(default_factory=list)
    """Kind and facts of each file that no version names."""

    listed: int = 0
    young: Amount = field(default_factory=Amount)
    of_ingests: Amount = field(default_factory=Amount)


@dataclass(frozen=True, slots=True)
class _Ingest:
    id: str
    files: list[Stat]

    @property
    def begun(self) -> float:
        return min(stat.modified for stat in self.files)

    @property
    def touched(self) -> float:
        return max(stat.modified for stat in self.files)


def vacuum(
    target: DatasetLike, *, dry_run: bool = True, older_than_s: float = DAY_S, progress: Progress | None = None
) -> VacuumReport:
    """Remove the files of the dataset `target` that no readable version names; with `dry_run`, the default, only say which.

    Files younger than `older_than_s` stay; 0 is safe only while nobody writes. Memory: 8 bytes per file that stays,
    some 200 per file that goes. May be run again, or beside itself. `progress` gets the files removed, and all that go.

    Raises:
        ConfigError: the URL names a version, or the age is negative.
        MissingError, CorruptError: a version that can be read is damaged, so what it needs is not known; nothing was removed.
        StorageError: the storage cannot be listed or written; what is removed by then was not needed.
    """
    if older_than_s < 0:
        raise ConfigError("not an age", older_than_s=older_than_s, hint="Give a number of seconds from 0.")
    started = time.monotonic()
    dataset = open_for_change(target)
    storage = dataset.storage
    now = time.time() if dry_run else _clock_of(storage)
    before = now - older_than_s
    commits = list(dataset.log.readable_versions(dataset.commit, info=dataset.info))
    found = _look(storage, KeySet(keys_of_versions(storage, commits)), before)
    ingests = _unfinished_ingests(dataset, {commit.ingest_id for commit in commits})
    running = [ingest for ingest in ingests if not 0 < ingest.touched < min(before, now - DAY_S)]
    _spare(found, running)
    _spare_named_since(found, dataset)
    journals = [(JOURNALS_FOLDER, stat) for ingest in ingests if ingest not in running for stat in ingest.files]
    left = storage.clear_unfinished(before=before, dry_run=dry_run)
    if not dry_run:
        _remove(storage, _in_order(journals, found.unnamed), before=before, progress=progress)
        _finish_purges(dataset)
    return VacuumReport(
        url=dataset.url,
        oldest=oldest_readable(dataset.info, dataset.commit),
        newest=dataset.version,
        dry_run=dry_run,
        listed=found.listed,
        removed=_amounts([*found.unnamed, *journals, *((_UNFINISHED, stat) for stat in left)]),
        young=found.young,
        of_ingests=found.of_ingests,
        running=tuple(ingest.id for ingest in running),
        seconds=time.monotonic() - started,
    )


def _finish_purges(dataset: Dataset) -> None:
    """Finish purges that were cut off; one that a lost place holds up is the next purge's."""
    try:
        finish_purges(dataset)
    except StorageError as error:
        _LOGGER.warning("a purge that was cut off is still not finished: %s", error)


def _look(storage: Storage, named: KeySet, before: float) -> _Findings:
    """List the storage; return what is not in `named` and older than `before`."""
    found = _Findings()
    listing = storage.list()
    while part := list(islice(listing, _AT_ONCE)):
        found.listed += len(part)
        for stat, stays in zip(part, named.has([stat.key for stat in part]), strict=True):
            kind = kind_of_key(stat.key)
            if stays or kind is None:
                continue
            if _is_old(stat, before):
                found.unnamed.append((kind, stat))
            else:
                found.young += Amount(1, stat.size_bytes)
    return found


def _is_old(stat: Stat, before: float) -> bool:
    """Return whether the file was written before that; one whose time the storage does not know never was."""
    return 0 < stat.modified < before


def _unfinished_ingests(dataset: Dataset, committed: set[str]) -> list[_Ingest]:
    """Return the ingests that no version was made by; `committed` are those of the readable ones."""
    ingests = [
        _Ingest(name, list(files))
        for name, files in groupby(dataset.storage.list(JOURNALS_FOLDER), key=lambda stat: stat.key.split("/")[1])
    ]
    unknown = {ingest.id: ingest for ingest in ingests if ingest.id not in committed}
    log = dataset.log
    version = oldest_readable(dataset.info, dataset.commit) - 1
    while version and unknown:
        commit = log.read(version)
        unknown.pop(commit.ingest_id, None)
        # An ingest is committed after it was begun; a day is for clocks that differ.
        if all(time_of(commit) < ingest.begun - DAY_S for ingest in unknown.values()):
            break
        version -= 1
    return list(unknown.values())


def _spare(found: _Findings, running: Sequence[_Ingest]) -> None:
    """Keep what was written since the first of the `running` ingests began: their shards are written after that."""
    since = min((ingest.begun for ingest in running), default=float("inf"))
    kept = [pair for pair in found.unnamed if pair[0] in _OFJOURNALS_FOLDER and pair[1].modified >= since]
    found.of_ingests += _total(stat for _, stat in kept)
    found.unnamed = [
        pair for pair in found.unnamed if not (pair[0] in _OFJOURNALS_FOLDER and pair[1].modified >= since)
    ]


def _spare_named_since(found: _Findings, dataset: Dataset) -> None:
    """Keep what versions name that were committed after `dataset` was opened."""
    log = dataset.log
    newest = log.newest() or dataset.commit
    later = [log.read(version) for version in range(dataset.version + 1, newest.version + 1)]
    if later:
        named = KeySet(keys_of_versions(dataset.storage, later)).has([stat.key for _, stat in found.unnamed])
        found.unnamed = [pair for pair, stays in zip(found.unnamed, named, strict=True) if not stays]


def _in_order(journals: Sequence[Found], unnamed: Sequence[Found]) -> tuple[list[Stat], ...]:
    """Return what to remove, one list after the other.

    An ingest that goes on just now looks for its plan once more before it commits. Tasks that it might take for done go
    before the plan, and shards after it: whenever it began, it either has all its shards, or does not find its plan.
    """
    plans = [stat for _, stat in journals if stat.key.endswith(_PLAN)]
    tasks = [stat for _, stat in journals if not stat.key.endswith(_PLAN)]
    return tasks, plans, [stat for _, stat in unnamed]


def _remove(storage: Storage, lists: Sequence[Sequence[Stat]], *, before: float, progress: Progress | None) -> None:
    def remove(stat: Stat) -> None:
        try:
            now = storage.stat(stat.key)
        except MissingError:
            return
        # Who writes a file again, because its content is the same, is about to commit it.
        if _is_old(now, before):
            storage.delete(stat.key)

    total, done = sum(len(files) for files in lists), 0
    for files in lists:
        for _ in in_parallel(remove, files):
            done += 1
            if progress is not None:
                progress(done, total)


def _clock_of(storage: Storage) -> float:
    """Return the time by the clock that dates the files, which is another machine's on a network."""
    key = f"{PROBE_FOLDER}/clock-{uuid.uuid4().hex}"
    storage.put(key, b"now")
    try:
        return storage.stat(key).modified or time.time()
    finally:
        storage.delete(key)


def _amounts(files: Iterable[Found]) -> dict[str, Amount]:
    amounts = dict.fromkeys([*KINDS.values(), JOURNALS_FOLDER, _UNFINISHED], Amount())
    for kind, stat in files:
        amounts[kind] += Amount(1, stat.size_bytes)
    return {kind: amount for kind, amount in amounts.items() if amount.files}


def _total(files: Iterable[Stat]) -> Amount:
    return sum((Amount(1, stat.size_bytes) for stat in files), Amount())
