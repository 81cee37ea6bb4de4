"""What an ingest has planned and done, in the dataset itself: `ingests/<id>/`.

`plan.json` and `done/<task>.json` are put-if-absent, and a task is marked done only after its shards, rejects and ids
are stored. So a process may be killed at any moment, and several may work on one ingest without knowing of each
other: at worst a task is done twice, with the same bytes. Nothing in here makes a shard visible; only a commit does.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from datastore.dataset.log.commits import utc_now
from datastore.dataset.shards.segment_file import ShardInfo
from datastore.digest import check_digest, digest_hex
from datastore.document import Sealed, seal, unseal
from datastore.errors import ConflictError, CorruptError, MissingError
from datastore.ingest.records import Reject
from datastore.ingestion.plan import Plan
from datastore.storage.base import Stat, Storage
from datastore.store.parallel import in_parallel

__all__ = ["Journal", "TaskDone", "encode_rejects"]

Count = Annotated[int, msgspec.Meta(ge=0)]


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


class Journal:
    """The journal of the ingest `ingest_id` of the dataset in `storage`."""

    def __init__(self, storage: Storage, ingest_id: str) -> None:
        self.storage = storage
        self.folder = f"ingests/{ingest_id}"

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

    def put_rejects(self, name: str, rejects: Sequence[Reject]) -> None:
        """Store rejects that no task has found."""
        self.storage.put(self._rejects_key(name), encode_rejects(rejects))

    def rejects(self) -> Iterator[Reject]:
        """Yield everything that was rejected and kept.

        Raises:
            CorruptError: a file is damaged, as far as that shows: only people read them.
        """
        for stat in self.storage.list(f"{self.folder}/rejects"):
            for line in self.storage.get(stat.key).split(b"\n")[:-1]:
                try:
                    found = Reject(**orjson.loads(line))
                except (TypeError, ValueError) as error:
                    raise CorruptError(f"a line is no reject: {error}", where=stat.key) from None
                yield found

    def _is_there(self, shard: ShardInfo) -> bool:
        try:
            return all(self.storage.stat(key).size_bytes for key in (shard.path, shard.docs_path) if key)
        except MissingError:
            return False

    def _rejects_key(self, name: str) -> str:
        return f"{self.folder}/rejects/{name}.jsonl"

    def _ids_key(self, name: str) -> str:
        return f"{self.folder}/ids/{name}.bin"


def encode_rejects(rejects: Sequence[Reject]) -> bytes:
    """Return `rejects` as JSON lines."""
    return b"".join(orjson.dumps(reject._asdict(), option=orjson.OPT_APPEND_NEWLINE) for reject in rejects)
