"""The journal of an ingest, in the dataset itself: `ingests/<id>/` says what was planned and what is done.

`plan.json` and `done/<task>.json` are put-if-absent, and a task is marked done only after its shards, rejects and ids
are stored. So a process may be killed at any moment, and several may work on one ingest without knowing of each
other: at worst a task is done twice, with the same bytes. Nothing in here makes a shard visible; only a commit does.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from datastore.dataset.log.keys import JOURNALS_FOLDER, journal_folder
from datastore.dataset.log.manifest import Commit, Kind
from datastore.dataset.shards.info import ShardInfo
from datastore.digest import check_digest, digest_hex, sha256_hex
from datastore.document import Count, Document, Sealed, seal, unseal
from datastore.errors import ConflictError, CorruptError, MissingError
from datastore.host import utc_now
from datastore.storage.base import Stat, Storage
from datastore.storage.wrappers import is_link
from datastore.threads import in_parallel

__all__ = ["Journal", "Journals", "Part", "Plan", "SourceFile", "Task", "TaskDone", "clear_journals"]


Codec = Literal["", "gz", "zst"]
"""How a file is compressed, "" for not at all."""

SourceFormat = Literal["text", "jsonl", "parquet", "csv", "hf", "mds", "litdata", "megatron", "webdataset"]
"""How the records of a file are read; all but the first two are formats of `interop`."""


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
        key = f"{self.folder}/plan.json"
        try:
            return unseal(Plan, self.storage.get(key), where=key)
        except MissingError:
            return None

    def keep_plan(self, plan: Plan) -> Plan:
        """Store `plan` unless there is one; return the one that holds.

        One in which a purge has blanked names, which the same files and settings have brought back, gives way.
        """
        key = f"{self.folder}/plan.json"
        try:
            self.storage.put_new(key, seal(plan))
        except ConflictError:
            found = self.find_plan()
            if found is not None and all(file.path for file in found.files):
                return found
            self.storage.put(key, seal(plan))
        return plan

    def begin(self, plan: Plan) -> dict[str, TaskDone]:
        """Say that the ingest goes on, store `plan` unless there is one, and return the tasks that are done.

        A vacuum keeps what an ingest has written that said so within a day.
        """
        self.storage.put(f"{self.folder}/running", utc_now().encode())
        self.keep_plan(plan)
        return self.done()

    def done(self) -> dict[str, TaskDone]:
        """Return the tasks that are done and whose files are all there, by id: a purge or a vacuum may have removed some.

        One request each, and one for each file.
        """

        def load(stat: Stat) -> TaskDone | None:
            found = unseal(TaskDone, self.storage.get(stat.key), where=stat.key)
            return found if all(self._is_there(shard) for shard in found.shards) else None

        tasks = in_parallel(load, self.storage.list(f"{self.folder}/done"))
        return {task.task_id: task for task in tasks if task is not None}

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
        """Mark a task done, its shards being stored; return what is on record, the first one to finish it counting."""
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
            return unseal(TaskDone, self.storage.get(key), where=key)
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

    def _is_there(self, shard: ShardInfo) -> bool:
        try:
            return all(self.storage.stat(key).size_bytes for key in (shard.path, shard.docs_path) if key)
        except MissingError:
            return False

    def _rejects_key(self, name: str) -> str:
        return f"{self.folder}/rejects/{name}.jsonl"

    def _ids_key(self, name: str) -> str:
        return f"{self.folder}/ids/{name}.bin"


_CLEARED = {"done", "ids", "rejects"}
"""What a journal has beside its plan: needed to go on with the ingest, and no more once it is committed."""


@dataclass(frozen=True, slots=True)
class Journals:
    """Which ingests had their journal cleared, and which ones no version knows as its own."""

    cleared: tuple[str, ...]
    unfinished: tuple[str, ...]


def journal_files(storage: Storage, history: Iterable[Commit]) -> set[str]:
    """Return all files that the tasks of committed ingests have written, as far as their journals still say so.

    One that found a document twice has written its shard again without it, and the first one is named by no version.
    """
    ingest_ids = {commit.ingest_id for commit in history}
    keys = [stat.key for stat in storage.list(JOURNALS_FOLDER)]
    done = [key for key in keys if key.split("/")[1] in ingest_ids and key.split("/")[2] == "done"]
    tasks = in_parallel(lambda key: unseal(TaskDone, storage.get(key), where=key), done)
    paths = (path for task in tasks for shard in task.shards for path in (shard.path, shard.docs_path))
    return {path for path in paths if path and not is_link(path)}


def clear_journals(storage: Storage, ingest_ids: Collection[str], *, ids_sha256: Collection[str]) -> Journals:
    """Remove what the journals of the ingests `ingest_ids`, which are committed, hold of their documents.

    These are the digests of ids, the rejects with their excerpts of text, and what their tasks have made. The plan stays,
    because it says which files the dataset knows; a file's name is blanked in it if it is, by its sha256, one of the ids.
    """
    cleared, unfinished = set[str](), set[str]()
    removals = list[str]()
    for stat in storage.list(JOURNALS_FOLDER):
        _, ingest_id, *rest = stat.key.split("/")
        if ingest_id not in ingest_ids:
            unfinished.add(ingest_id)
        elif rest[0] in _CLEARED:
            cleared.add(ingest_id)
            removals.append(stat.key)
        elif rest == ["plan.json"] and _blank_plan(storage, stat.key, ids_sha256):
            cleared.add(ingest_id)
    for _ in in_parallel(storage.delete, removals):
        pass
    return Journals(cleared=tuple(sorted(cleared)), unfinished=tuple(sorted(unfinished)))


def _blank_plan(storage: Storage, key: str, ids_sha256: Collection[str]) -> bool:
    """Blank the names in a plan that are ids by their sha256; return whether there were any."""
    plan = unseal(Plan, storage.get(key), where=key)
    blanked = [file.path for file in plan.files if file.path and sha256_hex(file.path.encode()) in ids_sha256]
    if not blanked:
        return False
    names = frozenset(blanked)
    files = (msgspec.structs.replace(file, path="") if file.path in names else file for file in plan.files)
    sources = (source for source in plan.sources if not source.endswith(tuple(blanked)))
    storage.put(key, seal(msgspec.structs.replace(plan, files=tuple(files), sources=tuple(sources))))
    return True
