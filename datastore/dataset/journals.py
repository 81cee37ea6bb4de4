"""The journals of all ingests of a dataset: which are damaged, what they name, and what a purge takes out of them."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import msgspec

from datastore.dataset.journal import Journal, Plan, read_task
from datastore.dataset.log.keys import JOURNALS_FOLDER
from datastore.dataset.log.manifest import Commit
from datastore.digest import sha256_hex
from datastore.document import seal, unseal
from datastore.errors import CorruptError, FormatError, MissingError
from datastore.storage.base import Storage
from datastore.storage.wrappers import is_link
from datastore.threads import in_parallel

__all__ = ["Journals", "clear_journals", "damaged_documents", "journal_files"]


def damaged_documents(storage: Storage) -> Iterator[tuple[str, str]]:
    """Yield the key of each damaged plan or task in the journals of all ingests, and what is wrong with it.

    They may be removed: a finished ingest needs them no more, an unfinished one makes them again.
    """

    def look(key: str) -> tuple[str, str] | None:
        _, ingest_id, *rest = key.split("/")
        journal = Journal(storage, ingest_id)
        try:
            if rest == ["plan.json"]:
                journal.find_plan()
            elif len(rest) == 2 and rest[0] == "done":
                journal.task(key)
        except CorruptError as error:
            return key, error.fact
        except (MissingError, FormatError):  # Removed since; or not ours to judge.
            return None
        return None

    yield from filter(None, in_parallel(look, [stat.key for stat in storage.list(JOURNALS_FOLDER)]))


_CLEARED = {"done", "ids", "rejects", "filtered", "contamination"}
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
    done = [key for key in keys if key.split("/")[1] in ingest_ids and key.split("/")[2:3] == ["done"]]
    tasks = in_parallel(lambda key: read_task(storage, key), done)
    paths = (path for task in tasks for shard in task.shards for path in (shard.path, shard.docs_path))
    return {path for path in paths if path and not is_link(path)}


def clear_journals(storage: Storage, ingest_ids: Collection[str], *, ids_sha256: Collection[str]) -> Journals:
    """Remove what the journals of the ingests `ingest_ids`, which are committed, hold of their documents.

    These are the digests of ids, the rejects and samples with their excerpts of text, and what their tasks have made. The plan stays,
    because it says which files the dataset knows; a file's name is blanked in it if it is, by its sha256, one of the ids.
    """
    cleared, unfinished = set[str](), set[str]()
    removals = list[str]()
    for stat in storage.list(JOURNALS_FOLDER):
        _, ingest_id, *rest = stat.key.split("/")
        if ingest_id not in ingest_ids:
            unfinished.add(ingest_id)
        elif rest[:1] and rest[0] in _CLEARED:
            cleared.add(ingest_id)
            removals.append(stat.key)
        elif rest == ["plan.json"] and _blank_plan(storage, stat.key, ids_sha256):
            cleared.add(ingest_id)
    for _ in in_parallel(storage.delete, removals):
        pass
    return Journals(cleared=tuple(sorted(cleared)), unfinished=tuple(sorted(unfinished)))


def _blank_plan(storage: Storage, key: str, ids_sha256: Collection[str]) -> bool:
    """Blank the names in a plan that are ids by their sha256; return whether there were any. A damaged one is removed."""
    try:
        plan = unseal(Plan, storage.get(key), where=key)
    except CorruptError:
        storage.delete(key)
        return True
    blanked = [file.path for file in plan.files if file.path and sha256_hex(file.path.encode()) in ids_sha256]
    if not blanked:
        return False
    names = frozenset(blanked)
    files = (msgspec.structs.replace(file, path="") if file.path in names else file for file in plan.files)
    sources = (source for source in plan.sources if not source.endswith(tuple(blanked)))
    storage.put(key, seal(msgspec.structs.replace(plan, files=tuple(files), sources=tuple(sources))))
    return True
