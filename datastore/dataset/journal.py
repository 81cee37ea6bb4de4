"""The journal of an ingest, in the dataset itself: `ingests/<id>/` says what was planned and what is done.

`plan.json` and `done/<task>.json` are put-if-absent, and a task is marked done only after its shards, rejects and ids
are stored. So a process may be killed at any moment, and several may work on one ingest without knowing of each
other: at worst a task is done twice, with the same bytes. Nothing in here makes a shard visible; only a commit does.

Nothing in here is beyond help either. Once an ingest is committed nobody needs its journal to go on; before that, a task
whose document or files are not what was written is not done, and is done again.
"""

import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from datastore.dataset.log.keys import is_data, journal_folder
from datastore.dataset.log.manifest import Kind
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.inventory import files_of
from datastore.dataset.shards.segments import checked_shards
from datastore.digest import check_digest, digest_hex
from datastore.document import Count, Document, Sealed, seal, unseal
from datastore.errors import ConflictError, CorruptError, MissingError
from datastore.formats.decompression import Codec
from datastore.host import utc_now
from datastore.storage.base import Stat, Storage
from datastore.storage.verified import first_sound, read_checked
from datastore.threads import in_parallel

__all__ = [
    "Journal",
    "Part",
    "Plan",
    "SourceFile",
    "Task",
    "TaskDone",
    "read_task",
]

D = TypeVar("D")

_LOGGER = logging.getLogger(__name__)

SourceFormat = Literal[
    "text",
    "lines",
    "jsonl",
    "json",
    "warc",
    "datastore",
    "parquet",
    "arrow",
    "csv",
    "tsv",
    "hf",
    "mds",
    "litdata",
    "megatron",
    "webdataset",
]
"""How the records of a file are read; all but the first six are formats of `interop`."""


class TaskDone(Sealed, frozen=True, kw_only=True):
    """`done/<task>.json`: what a task has made."""

    task_id: str
    shards: tuple[ShardInfo, ...]
    documents: Count
    tokens: Count
    text_bytes: Count
    """UTF-8 bytes of the documents' texts, or bytes of the rows that were taken over."""

    rejected: dict[str, Count]
    skipped: dict[str, Count]
    rejects_digest: str
    """xxh3_128 of `rejects/<task>.jsonl`; empty if there is none."""

    ids_digest: str
    """xxh3_128 of `ids/<task>.bin`; empty if no document brought an id of its own, so that none can be there twice."""

    encoder: str
    """Which library encoded; the ids are the same."""

    escaped: Count = 0
    """Chats in which a message spells a special token, which was made of ordinary ones."""

    filtered: dict[str, Count] = msgspec.field(default_factory=dict)
    """Documents that filters have dropped, by filter and rule."""

    changed: dict[str, Count] = msgspec.field(default_factory=dict)
    """What filters have changed in documents, by filter."""

    lengths: tuple[Count, ...] = ()
    """How many documents have a text of so many bits: number i counts those of 2**(i - 1) up to 2**i bytes."""


class SourceFile(Document, frozen=True, kw_only=True):
    """One file to read."""

    path: str
    """`<name of the source>/<path below it>`; a source that is one file has no second part."""

    size_bytes: Count
    modified: float
    """Seconds since the epoch, by the clock of its storage; 0.0 if unknown."""

    format: SourceFormat
    codec: Codec
    lone: bool
    """Whether the user named this very file, so that nothing about it is skipped."""

    fingerprint: str


class Part(Document, frozen=True, kw_only=True):
    """A byte range of a file, as stored."""

    file: Count
    """Index in the plan's files."""

    start: Count
    stop: Count


class Task(Document, frozen=True, kw_only=True):
    """What one worker does in one go."""

    id: str
    parts: tuple[Part, ...]


class Plan(Sealed, frozen=True, kw_only=True):
    """`ingests/<id>/plan.json`: written once; whoever continues the ingest follows it."""

    ingest_id: str
    kind: Kind
    reading_digest: str
    """Of the settings that shard bytes depend on."""

    sources: tuple[str, ...]
    """As the user named them, without credentials."""

    skipped: dict[str, Count]
    """Files and folders left out, by reason; later versions may know more reasons."""

    known: Count
    """Files that an earlier ingest of the dataset brought, left out here."""

    files: tuple[SourceFile, ...]
    tasks: tuple[Task, ...]
    record_schema: bytes = b""
    """The columns of records that are taken over, as an encapsulated IPC message; empty if there are none."""

    filters_digest: str = ""
    """Of the filters and what they depend on; empty if there are none."""

    settings: dict[str, Any] = msgspec.field(default_factory=dict)
    """Those that are not what they are if left out, without credentials; for the card only."""


class Journal:
    """The journal of the ingest `ingest_id` of the dataset in `storage`."""

    def __init__(self, storage: Storage, ingest_id: str) -> None:
        self.storage = storage
        self.ingest_id = ingest_id
        self.folder = journal_folder(ingest_id)

    def find_plan(self) -> Plan | None:
        """Return the plan, or None if none was made.

        Raises:
            CorruptError, FormatError: it is damaged, or newer than this package.
        """
        try:
            return first_sound(self.storage, self._plan_key, self._read_plan, is_good=bool)
        except MissingError:
            return None

    def keep_plan(self, plan: Plan) -> Plan:
        """Store `plan` unless there is one; return the one that holds.

        One that is damaged, or in which a purge has blanked names, which the same files and settings have brought back,
        gives way.
        """
        try:
            self.storage.put_new(self._plan_key, seal(plan))
        except ConflictError:
            found = self._unless_damaged(self.find_plan)
            if found is not None and all(file.path for file in found.files):
                return found
            self.storage.put(self._plan_key, seal(plan))
        return plan

    def begin(self, plan: Plan, *, only: Collection[str] | None = None) -> dict[str, TaskDone]:
        """Say that the ingest goes on, store `plan` unless there is one, and return those of its tasks that are done.

        `only` are the ids of those that matter; None: all of them do.

        A vacuum keeps what an ingest has written that said so within a day.
        """
        self.storage.put(f"{self.folder}/running", utc_now().encode())
        self.keep_plan(plan)
        done = self.done(only=only)
        return {task.id: done[task.id] for task in plan.tasks if task.id in done}

    def ended(self) -> set[str]:
        """Return the ids of the tasks that are marked done; only their names are looked at."""
        return {_task_of(stat.key) for stat in self.storage.list(f"{self.folder}/done")}

    def done(self, *, only: Collection[str] | None = None) -> dict[str, TaskDone]:
        """Return the tasks that are done, by id: those of whose files every byte is what was written.

        A purge or a vacuum may have removed some, and a disk may have failed. All that was done is read, or all of `only`.
        """

        def load(stat: Stat) -> TaskDone | None:
            found = self._unless_damaged(lambda: self.task(stat.key))
            return found if found is not None and self._is_whole(found) else None

        found = self.storage.list(f"{self.folder}/done")
        tasks = in_parallel(load, [stat for stat in found if only is None or _task_of(stat.key) in only])
        return {task.task_id: task for task in tasks if task is not None}

    def task(self, key: str) -> TaskDone:
        """Return what `done/<task>.json`, which lies under `key`, says.

        Raises:
            MissingError: it is gone.
            CorruptError, FormatError: it is damaged, or newer than this package.
        """
        return first_sound(self.storage, key, lambda place: read_task(place, key), is_good=bool)

    def require_plan(self) -> None:
        """Raise unless the plan is still there: it is the last of an abandoned ingest that a vacuum removes.

        Raises:
            ConflictError: it is gone, and some of what was done may be, too.
        """
        if self.find_plan() is None:
            raise ConflictError(
                "a vacuum took this ingest for abandoned while it went on",
                where=self.folder,
                hint="Nothing was committed. Run the same command again.",
            )

    def finish(self, done: TaskDone, *, rejects: bytes, ids: bytes) -> TaskDone:
        """Mark a task done, its shards being stored; return what is on record: the first one, if it has made the same."""
        if rejects:
            self.storage.put(self._rejects_key(done.task_id), rejects)
        if ids:
            self.storage.put(self._ids_key(done.task_id), ids)
        done = msgspec.structs.replace(
            done,
            rejects_digest=digest_hex(rejects) if rejects else "",
            ids_digest=digest_hex(ids) if ids else "",
        )
        key = f"{self.folder}/done/{done.task_id}.json"
        try:
            self.storage.put_new(key, seal(done))
        except ConflictError:
            found = self._unless_damaged(lambda: self.task(key))
            # The files are those that were written last, which may be ours.
            if found is not None and (found.shards, found.ids_digest) == (done.shards, done.ids_digest):
                return found
            self.storage.put(key, seal(done))
        return done

    def ids(self, done: TaskDone) -> npt.NDArray[np.uint64]:
        """Return the xxh3_128 of the id of each document of a task, as rows of two numbers.

        Raises:
            CorruptError: the file is damaged.
        """
        key = self._ids_key(done.task_id)
        raw = self.storage.get(key)
        check_digest(raw, done.ids_digest, where=key)
        if len(raw) % 16:
            raise CorruptError("not digests of 16 bytes each", where=key, hint="Remove the ingest, and run it again.")
        return np.frombuffer(raw, dtype="<u8").reshape(-1, 2)

    def put_rejects(self, name: str, rejects: bytes) -> None:
        """Store rejects that no task has found, as JSON lines."""
        self.storage.put(self._rejects_key(name), rejects)

    def rejects(self) -> Iterator[tuple[str, bytes]]:
        """Yield the files of what was rejected and kept, each with its key; `ingestion` knows what their lines say."""
        for stat in self.storage.list(f"{self.folder}/rejects"):
            yield stat.key, self.storage.get(stat.key)

    def put_samples(self, task_id: str, samples: bytes) -> None:
        """Store samples of what the filters of a task have dropped, as JSON lines."""
        self.storage.put(f"{self.folder}/filtered/{task_id}.jsonl", samples)

    def put_contamination(self, raw: bytes) -> None:
        """Store the runs of tokens that evaluations have."""
        self.storage.put(f"{self.folder}/contamination", raw)

    def contamination(self, digest: str) -> bytes:
        """Return them.

        Raises:
            CorruptError: they are damaged.
        """
        key = f"{self.folder}/contamination"
        raw = self.storage.get(key)
        check_digest(raw, digest, where=key)
        return raw

    def samples(self) -> Iterator[bytes]:
        """Yield the files of samples; `ingestion` knows what their lines say."""
        for stat in self.storage.list(f"{self.folder}/filtered"):
            yield self.storage.get(stat.key)

    @property
    def _plan_key(self) -> str:
        return f"{self.folder}/plan.json"

    def _read_plan(self, place: Storage) -> Plan:
        plan = unseal(Plan, place.get(self._plan_key), where=self._plan_key)
        parts = [part for task in plan.tasks for part in task.parts]
        sizes = [file.size_bytes for file in plan.files]
        fits = all(part.file < len(sizes) and part.start <= part.stop <= sizes[part.file] for part in parts)
        if plan.ingest_id != self.ingest_id or not fits:
            raise _nonsense("plan", self._plan_key)
        return plan

    def _unless_damaged(self, read: Callable[[], D]) -> D | None:
        try:
            return read()
        except (CorruptError, MissingError) as error:
            _LOGGER.warning("the journal of ingest %s is damaged, and made again: %s", self.ingest_id, error)
            return None

    def _is_whole(self, task: TaskDone) -> bool:
        """Return whether every file of `task` has the bytes that were written; each is read."""
        try:
            for file in files_of(task.shards):
                read_checked(self.storage, file.key, size_bytes=file.size_bytes, digest=file.digest)
            if task.ids_digest:
                self.ids(task)
            if task.rejects_digest:
                key = self._rejects_key(task.task_id)
                check_digest(self.storage.get(key), task.rejects_digest, where=key)
        except (CorruptError, MissingError) as error:
            _LOGGER.warning("a task of ingest %s is done again: %s", self.ingest_id, error)
            return False
        return True

    def _rejects_key(self, name: str) -> str:
        return f"{self.folder}/rejects/{name}.jsonl"

    def _ids_key(self, name: str) -> str:
        return f"{self.folder}/ids/{name}.bin"


def _task_of(key: str) -> str:
    return key.rpartition("/")[2].removesuffix(".json")


def read_task(place: Storage, key: str) -> TaskDone:
    """Return the task whose document lies in `place` under `key`; otherwise as `Journal.task`."""
    found = unseal(TaskDone, place.get(key), where=key)
    shards = list(checked_shards(found.shards, where=key))
    if key.rpartition("/")[2] != f"{found.task_id}.json" or not all(is_data(file.key) for file in files_of(shards)):
        raise _nonsense("task", key)
    sums = (sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards))
    if sums != (found.documents, found.tokens):
        raise _nonsense("task", key)
    return found


def _nonsense(what: str, key: str) -> CorruptError:
    return CorruptError(
        f"the {what} of an ingest has its digest, but makes no sense", where=key, hint="`datastore repair` removes it."
    )
