"""Which tasks an ingest has: a pure function of the listing and the settings.

Small files share a task, long ones are cut where their separator allows, and every task has about the same weight,
so that the last worker is not alone for long. A task's id is the digest of all that its shards depend on.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from datastore.dataset.journal import Part, Plan, SourceFile, Task
from datastore.dataset.log.manifest import Commit, Kind
from datastore.digest import digest_hex
from datastore.document import Document
from datastore.errors import ConfigError
from datastore.ingestion.reading.cutting import separator_of
from datastore.ingestion.reading.rows import is_cuttable, is_table
from datastore.ingestion.reading.sources import Listing
from datastore.ingestion.reading.streams import can_be_cut, cut_evenly
from datastore.ingestion.settings import IngestSettings

__all__ = [
    "Share",
    "WorkItem",
    "changed_since",
    "digest_after",
    "ingest_id_of",
    "known_files",
    "make_plan",
    "may_be_cut",
    "source_bytes",
    "work_items",
]

_FILE_WEIGHT = 4096
"""Opening a file costs as much as reading this many bytes of it."""

_TYPICAL_EXPANSION = 4
"""Text compresses to about a quarter."""


class WorkItem(Document, frozen=True, kw_only=True):
    """A task with all a worker needs to know of its files."""

    task_id: str
    parts: tuple[tuple[SourceFile, int, int], ...]


@dataclass(frozen=True, slots=True)
class Share:
    """Which tasks of a plan are for one of `count` that do them apart: every `count`-th from `index` on."""

    index: int
    count: int
    """0: none of them."""

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Return the share that `i/n` names, counted from 0; `none` is one without a task.

        Raises:
            ConfigError: it names none.
        """
        if text == "none":
            return cls(0, 0)
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise ConfigError("no such share", share=text, hint="Count from 0: of four, `0/4`, `1/4`, `2/4` and `3/4`.")
        return cls(int(index), int(count))

    def tasks(self, plan: Plan) -> tuple[str, ...]:
        """Return the ids of its tasks."""
        return tuple(task.id for task in plan.tasks[self.index :: self.count]) if self.count else ()


def ingest_id_of(files: Iterable[SourceFile], *, kind: Kind, reading_digest: str) -> str:
    """Return the name of the ingest of these files in this way: the same files and settings, the same ingest."""
    prints = "\n".join(file.fingerprint for file in files)
    return digest_hex(f"{kind}/{reading_digest}\n{prints}".encode())


def known_files(
    history: Iterable[tuple[Commit, Plan | None]], files: Iterable[SourceFile]
) -> tuple[frozenset[str], int]:
    """Return the fingerprints of files that the dataset has, and if one of `files` is as it once was, the version since which not.

    `history` are earlier ingests, newest first. The states that a file had before it was replaced are not known: their documents
    are deleted.
    """
    known, gone, replaced = set[str](), set[str](), set[str]()
    last = 0
    for commit, plan in history:
        for file in plan.files if plan else ():
            (gone if file.path in replaced else known).add(file.fingerprint)
        if commit.operation == "replace" and plan is not None:
            replaced |= {file.path for file in plan.files}
            last = last or commit.version
    is_back = any(file.fingerprint in gone and file.fingerprint not in known for file in files)
    return frozenset(known), last if is_back else 0


def digest_after(reading_digest: str, version: int) -> str:
    """Return the digest for reading files again that were as they are now before `version`.

    Their shards have to be others than those of then, whose rows are deleted.
    """
    return digest_hex(f"{reading_digest} after version {version}".encode())


def changed_since(
    files: Iterable[SourceFile], history: Iterable[tuple[int, Plan]], *, in_any_state: bool = False
) -> dict[str, int]:
    """Return the paths of `files` that were ingested in another state, never in this one, and the last version that did.

    With `in_any_state`, also those that were ingested in this one.

    `history` are earlier ingests with their versions, newest first.
    """
    states: dict[str, set[tuple[int, float]]] = {}
    versions: dict[str, int] = {}
    for version, plan in history:
        for file in plan.files:
            states.setdefault(file.path, set()).add((file.size_bytes, file.modified))
            versions.setdefault(file.path, version)
    return {
        file.path: versions[file.path]
        for file in files
        if file.path in states and (in_any_state or (file.size_bytes, file.modified) not in states[file.path])
    }


def make_plan(
    listing: Listing,
    *,
    settings: IngestSettings,
    kind: Kind,
    reading_digest: str,
    known: frozenset[str] = frozenset(),
    record_schema: bytes = b"",
) -> Plan:
    """Return the plan for the files whose fingerprints are not `known`."""
    files = tuple(file for file in listing.files if file.fingerprint not in known)
    parts = list(_parts(files, settings))
    total = sum(weight for _, weight in parts)
    target = total / max(1, math.ceil(total / settings.task_bytes))
    tasks = []
    for group in _groups(parts, target):
        ranges = "\n".join(f"{files[part.file].fingerprint} {part.start} {part.stop}" for part in group)
        task_id = digest_hex(f"{kind}/{reading_digest}\n{ranges}".encode())
        tasks.append(Task(id=task_id, parts=tuple(group)))
    return Plan(
        ingest_id=ingest_id_of(files, kind=kind, reading_digest=reading_digest),
        kind=kind,
        reading_digest=reading_digest,
        sources=listing.shown,
        skipped=listing.skipped,
        known=len(listing.files) - len(files),
        files=files,
        tasks=tuple(tasks),
        record_schema=record_schema,
    )


def work_items(plan: Plan, *, without: Iterable[str] = ()) -> Iterator[WorkItem]:
    """Yield the tasks of `plan`, in order, that are not called as one of `without`."""
    left_out = frozenset(without)
    for task in plan.tasks:
        if task.id not in left_out:
            parts = tuple((plan.files[part.file], part.start, part.stop) for part in task.parts)
            yield WorkItem(task_id=task.id, parts=parts)


def source_bytes(order: WorkItem) -> int:
    """Return how many stored bytes the task covers."""
    return sum(stop - start for _, start, stop in order.parts)


def _parts(files: tuple[SourceFile, ...], settings: IngestSettings) -> Iterator[tuple[Part, int]]:
    """Yield every part of every file with its weight."""
    for index, file in enumerate(files):
        ranges = [(0, file.size_bytes)]
        if is_cuttable(file) if is_table(file) else may_be_cut(file, settings):
            ranges = cut_evenly(file.size_bytes, settings.task_bytes)
        growth = _TYPICAL_EXPANSION if file.codec else 1
        for start, stop in ranges:
            yield Part(file=index, start=start, stop=stop), (stop - start) * growth + _FILE_WEIGHT


def may_be_cut(file: SourceFile, settings: IngestSettings) -> bool:
    """Return whether ranges of `file`, which is no table, can be read apart."""
    # Tokens of JSON lines are called after the number of their line, which who starts in the middle cannot know.
    return (
        not file.codec
        and file.format != "datastore"
        and settings.take != "tokens"
        and can_be_cut(separator_of(file, settings))
    )


def _groups(parts: Iterable[tuple[Part, int]], target: float) -> Iterator[list[Part]]:
    """Yield runs of parts that end where the running sum of weights comes closest to a multiple of `target`."""
    group: list[Part] = []
    done, border = 0.0, target
    for part, weight in parts:
        # Closing before this part leaves the border `border - done` behind; after it, `done + weight - border`.
        if group and done + weight / 2 > border:
            yield group
            group = []
            border += target * max(1, math.ceil((done - border) / target))
        group.append(part)
        done += weight
    if group:
        yield group
