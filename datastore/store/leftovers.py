"""What is left of documents that no version to be kept has: files that only old versions name, and journals of ingests.

`vacuum` removes what no version needs in its own time, found by listing. A purge cannot wait, and must be able to say what
it removed: so this asks the log itself, every version of it, and gives names. It costs one read per version, and
one per segment that is in no version to be kept.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.manifest import Commit, SegmentRef
from datastore.dataset.shards.deletions import deletions_key
from datastore.dataset.shards.segment_file import ShardInfo, segment_key
from datastore.dataset.shards.segments import load_segment
from datastore.digest import sha256_hex
from datastore.document import reseal
from datastore.errors import MissingError
from datastore.storage.base import Storage
from datastore.store.parallel import in_parallel

__all__ = [
    "Journals",
    "Leftovers",
    "clear_journals",
    "data_paths",
    "files_of",
    "find_leftovers",
    "index_keys",
    "is_elsewhere",
    "read_history",
]

_CLEARED = {"done", "ids", "rejects"}
"""What a journal has beside its plan: needed to go on with the ingest, and no more once it is committed."""


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What versions before `oldest` need that those from it on do not."""

    oldest: int
    """The first version after all those that name one of `data`."""

    data: tuple[str, ...]
    """Shards and documents files."""

    index: tuple[str, ...]
    """Segments and tables of deletions."""


@dataclass(frozen=True, slots=True)
class Journals:
    """Which ingests had their journal cleared, and which ones no version knows as its own."""

    cleared: tuple[str, ...]
    unfinished: tuple[str, ...]


def files_of(shards: Iterable[ShardInfo]) -> list[str]:
    """Return the files of `shards`."""
    return [path for shard in shards for path in (shard.path, shard.docs_path) if path]


def is_elsewhere(path: str) -> bool:
    """Return whether a shard's path leads out of its dataset: that of a shallow clone, to the one it was cloned from."""
    return "://" in path or path.startswith("/")


def read_history(storage: Storage, newest: Commit) -> list[Commit]:
    """Return all versions up to `newest`, oldest first, also those that have expired.

    Raises:
        MissingError, CorruptError: a commit is gone or damaged.
    """
    log = CommitLog(storage)
    return [*in_parallel(lambda version: log.stored(version).commit, range(1, newest.version)), newest]


def find_leftovers(storage: Storage, history: Sequence[Commit], new: Commit) -> Leftovers:
    """Return what is left over once `new` has followed the versions of `history`, oldest first.

    What lies in another dataset is no leftover of this one. Segments that are gone say nothing any more.
    """
    kept = {ref.digest for ref in new.segments}
    refs = {ref.digest: ref for commit in history for ref in commit.segments if ref.digest not in kept}
    found = [paths for paths in in_parallel(partial(_paths_if_there, storage), refs.values()) if paths is not None]
    paths = pa.chunked_array([paths for _, paths in found], pa.string())
    gone = _others(paths, data_paths(storage, new.segments))
    holders, start = set[str](), 0
    for digest, own in found:
        if gone[start : start + len(own)].any():
            holders.add(digest)
        start += len(own)
    oldest = 1 + max((c.version for c in history if any(ref.digest in holders for ref in c.segments)), default=0)
    data = paths.filter(pa.array(gone)).unique().to_pylist()
    index = {key for commit in history[: oldest - 1] for key in index_keys(commit)}
    index -= {key for commit in [*history[oldest - 1 :], new] for key in index_keys(commit)}
    return Leftovers(oldest=oldest, data=tuple(sorted(str(path) for path in data)), index=tuple(sorted(index)))


def data_paths(storage: Storage, refs: Iterable[SegmentRef]) -> Any:
    """Return the paths of all shards, and of their documents files, that the segments `refs` name."""
    return pa.chunked_array(list(in_parallel(lambda ref: _paths(storage, ref), refs)), pa.string())


def journal_files(storage: Storage, history: Iterable[Commit]) -> set[str]:
    """Return all files that the tasks of committed ingests have written, as far as their journals still say so.

    One that found a document twice has written its shard again without it, and the first one is named by no version.
    """
    ingest_ids = {commit.ingest_id for commit in history}
    keys = [stat.key for stat in storage.list("ingests")]
    done = [key for key in keys if key.split("/")[1] in ingest_ids and key.split("/")[2] == "done"]
    tasks = in_parallel(lambda key: msgspec.json.decode(storage.get(key)), done)
    paths = (path for task in tasks for shard in task["shards"] for path in (shard["path"], shard["docs_path"]))
    return {path for path in paths if path and not is_elsewhere(path)}


def clear_journals(storage: Storage, ingest_ids: Collection[str], *, ids_sha256: Collection[str]) -> Journals:
    """Remove what the journals of the ingests `ingest_ids`, which are committed, hold of their documents.

    These are the digests of ids, the rejects with their excerpts of text, and what their tasks have made. The plan stays,
    because it says which files the dataset knows; a file's name is blanked in it if it is, by its sha256, one of the ids.
    """
    cleared, unfinished = set[str](), set[str]()
    removals = list[str]()
    for stat in storage.list("ingests"):
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
    blanked: list[str] = []

    def change(plan: dict[str, Any]) -> None:
        for file in plan["files"]:
            if file["path"] and sha256_hex(file["path"].encode()) in ids_sha256:
                blanked.append(file["path"])
                file["path"] = ""
        plan["sources"] = [s for s in plan["sources"] if not any(s.endswith(path) for path in blanked)]

    raw = reseal(storage.get(key), change)
    if blanked:
        storage.put(key, raw)
    return bool(blanked)


def _paths_if_there(storage: Storage, ref: SegmentRef) -> tuple[str, Any] | None:
    try:
        return ref.digest, _paths(storage, ref)
    except MissingError:
        return None


def _paths(storage: Storage, ref: SegmentRef) -> Any:
    """Return the paths in a segment that lie in its dataset."""
    batch = load_segment(storage, ref)
    both: Any = pa.concat_arrays([batch.column("path"), batch.column("docs_path")])
    none_or_elsewhere: Any = pc.match_substring_regex(both, "^$|^/|://")
    return both.filter(pc.invert(none_or_elsewhere))


def _others(paths: Any, kept: Any) -> Any:
    """Return which of `paths` are not among `kept`."""
    if not len(paths):
        return np.zeros(0, np.bool_)
    return ~pc.is_in(paths, value_set=kept.combine_chunks()).to_numpy(zero_copy_only=False)


def index_keys(commit: Commit) -> Iterator[str]:
    """Yield the keys of the segments and tables of deletions that a version names."""
    yield from (segment_key(ref.digest) for ref in commit.segments)
    yield from (deletions_key(ref.digest) for ref in commit.deletions)
