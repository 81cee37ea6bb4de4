"""The plan of a purge before it is committed, and its certificate when all of it was done and read back.

A plan names what the purge has written and what it will remove, so that whoever comes after a crash can finish it
without knowing what was purged. Neither names an id: sha256 only, which whoever can guess an id can confirm.

It removes files that only expired versions name, and what journals of ingests say of their documents. `vacuum` removes what no version needs in its own time, found by listing. A purge cannot wait, and must be able to say what
it removed: so this asks the log itself, every version of it, and gives names. It costs one read per version, and
one per segment that is in no version to be kept.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.journals import clear_journals
from datastore.dataset.log.commits import read_history
from datastore.dataset.log.keys import (
    CERTIFICATES_FOLDER,
    PARITY_TABLES_FOLDER,
    PURGE_PLANS_FOLDER,
    certificate_key,
    kind_of_key,
    purge_plan_key,
)
from datastore.dataset.log.manifest import Commit, SegmentRef
from datastore.dataset.log.tags import list_tags, read_tag, remove_tag
from datastore.dataset.operations.purge.blank import blank_name, is_blank
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.inventory import data_paths, files_of, paths_in, tables_of
from datastore.dataset.shards.parity_groups import parity_keys
from datastore.dataset.shards.segments import load_segment
from datastore.dataset.snapshot import Dataset
from datastore.document import Count, Hex32, Sealed, Sha256, Version, seal, unseal
from datastore.errors import CorruptError, MissingError, StorageError
from datastore.formats.arrow import array_of, numbers_of
from datastore.host import utc_now
from datastore.storage.base import Storage
from datastore.threads import in_parallel

__all__ = [
    "Leftovers",
    "PurgeCertificate",
    "PurgeOutcome",
    "deleted_shards",
    "end_of_text",
    "find_leftovers",
    "finish_plan",
    "forget_plan",
    "keep_plan",
    "list_certificates",
    "list_plans",
    "require_all_places",
    "tags_before",
]


class PurgeCertificate(Sealed, frozen=True, kw_only=True):
    """`purges/<digest>.json`: what was purged, and what was done about it. Before that, the plan of it."""

    dataset: Hex32
    """The dataset's uuid."""

    version: Version
    """The version that the purge made."""

    oldest: Version
    """The oldest version that can be read since."""

    oldest_before: Version
    begun: str
    """UTC, ISO 8601."""

    finished: str = ""
    """When all of it was done and read back; empty in a plan."""

    writer: str
    documents: Count
    tokens: Count
    ids_sha256: tuple[Sha256, ...]
    """sha256 of the id of each purged document, as UTF-8, sorted."""

    files_written: tuple[str, ...]
    files_removed: tuple[str, ...]
    tags_removed: tuple[str, ...]
    ingests_cleared: tuple[str, ...] = ()
    """Ingests of whose journal something was removed."""

    files_checked: Count = 0
    """Files of `files_written` that were read back, every byte, and found blank where they must be; and files of
    `files_removed` that were looked for in every place that the dataset has, and not found."""

    files_unnamed: Count = 0
    """Shards, documents and parity files that the newest versions do not know, of a writer at work or one that was killed: what they hold was
    not looked at."""


@dataclass(frozen=True, slots=True)
class PurgeOutcome:
    """What the end of a purge has made and found."""

    certificate: PurgeCertificate
    unfinished_ingests: tuple[str, ...]


def finish_plan(dataset: Dataset, plan: PurgeCertificate) -> PurgeOutcome:
    """Remove what `plan`, whose commit stands, says is left; read all of it back; store the certificate.

    Safe to do twice, and by two at once. What the newest version names is not removed, whatever the plan says.

    Raises:
        CorruptError: the plan is of another dataset, or names what is no file of data; nothing was removed.
    """
    storage = dataset.storage
    _check_sense(dataset, plan)
    newest = dataset.log.newest() or dataset.commit
    history = read_history(storage, newest)
    readable = history[plan.oldest - 1 :]
    live = {str(path) for path in data_paths(storage, {ref for c in readable for ref in c.segments}).to_pylist()}
    kept = live.union(*map(_index_keys, readable))
    gone = [key for key in plan.files_removed if key not in kept]
    for _ in in_parallel(storage.delete, gone):
        pass
    for name in set(plan.tags_removed).intersection(tags_before(storage, plan.oldest)):
        remove_tag(storage, name)
    ingests = {commit.ingest_id for commit in history} - {""}
    journals = clear_journals(storage, ingests, ids_sha256=frozenset(plan.ids_sha256))
    require_all_places(storage)
    checked = _check_blank(dataset.at(newest), plan) + _check_gone(storage, gone)
    known = live.union(parity_keys(storage, newest))
    there = (stat.key for folder in ("shards", "docs", "parity") for stat in storage.list(folder))
    certificate = msgspec.structs.replace(
        plan,
        digest="",
        finished=utc_now(),
        files_removed=tuple(gone),
        ingests_cleared=journals.cleared,
        files_checked=checked,
        files_unnamed=sum(key not in known for key in there),
    )
    certificate = _stored(storage, certificate, certificate_key)
    forget_plan(storage, plan)
    return PurgeOutcome(certificate, journals.unfinished)


def _check_sense(dataset: Dataset, plan: PurgeCertificate) -> None:
    foreign = [key for key in plan.files_removed if kind_of_key(key) is None]
    if foreign or plan.dataset != dataset.uuid or plan.oldest > plan.version:
        raise CorruptError(
            "the plan of a purge has its digest, but makes no sense",
            where=purge_plan_key(plan.digest),
            version=plan.version,
            removes=foreign[:1],
            hint="Nothing was removed. Restore this file from a copy, or remove it and purge again.",
        )


def _check_blank(dataset: Dataset, plan: PurgeCertificate) -> int:
    """Read back the shards that `plan` wrote, those that are still in use; return how many files that were."""
    written = frozenset(plan.files_written)
    # A shard of which more was deleted since is the next purge's to check.
    shards = [shard for shard in deleted_shards(dataset, blank=True) if shard.path in written]

    def check(shard: ShardInfo) -> bool:
        rows = dataset.deletions.rows(shard.uid)
        return is_blank(dataset.storage, shard, rows, end_of_text=end_of_text(dataset))

    for shard, blank in zip(shards, in_parallel(check, shards), strict=True):
        if not blank:
            raise CorruptError(
                "a purged shard is not blank where it must be", where=shard.path, hint="Purge again; then look at it."
            )
    return len(list(files_of(shards)))


def _check_gone(storage: Storage, keys: Sequence[str]) -> int:
    """Look for the files `keys` in every place that the dataset has; return how many places that were."""
    places = [root.storage for root in storage.roots()]

    def found(key: str) -> str:
        for place in places:
            try:
                place.stat(key)
            except MissingError:
                continue
            return place.url
        return ""

    for key, url in zip(keys, in_parallel(found, keys), strict=True):
        if url:
            raise StorageError(
                "a file that was removed is there", where=key, url=url, hint="Purge again; it goes on from here."
            )
    return len(keys)


def list_certificates(storage: Storage) -> list[PurgeCertificate]:
    """Return the certificates of all finished purges of a dataset, oldest first."""
    found = [_read(storage, stat.key) for stat in storage.list(CERTIFICATES_FOLDER) if stat.key.count("/") == 1]
    return sorted(found, key=lambda certificate: certificate.version)


def list_plans(storage: Storage) -> list[tuple[PurgeCertificate, float]]:
    """Return the plans that are there, each with the time at which it was stored (0.0: unknown)."""
    return [(_read(storage, stat.key), stat.modified) for stat in storage.list(PURGE_PLANS_FOLDER)]


def keep_plan(storage: Storage, plan: PurgeCertificate) -> PurgeCertificate:
    """Store `plan`, and return it with its digest, by which its commit names it."""
    return _stored(storage, plan, purge_plan_key)


def forget_plan(storage: Storage, plan: PurgeCertificate) -> None:
    """Remove a plan that will not be needed."""
    storage.delete(purge_plan_key(plan.digest))


def deleted_shards(dataset: Dataset, *, blank: bool) -> list[ShardInfo]:
    """Return the shards of which something is deleted, and all of that, by the file's name, is blank or not."""
    found = dataset.segments.find(sorted(dataset.deletions.uids))
    shards = [dataset.segments.shard(int(index)) for index in found if index >= 0]
    return [
        shard
        for shard in shards
        if (PurePosixPath(shard.path).stem == blank_name(shard.uid, dataset.deletions.rows(shard.uid))) == blank
    ]


def end_of_text(dataset: Dataset) -> int:
    """Return the id that stands for deleted tokens."""
    return dataset.commit.tokenizer.end_of_text if dataset.commit.tokenizer else 0


def tags_before(storage: Storage, version: int) -> tuple[str, ...]:
    """Return the tags that name a version before `version`."""
    return tuple(name for name in list_tags(storage) if read_tag(storage, name).version < version)


def require_all_places(storage: Storage) -> None:
    """Raise unless every place of the dataset answers.

    Raises:
        StorageError: one does not.
    """
    lost = list(storage.lost())
    if lost:
        raise StorageError(
            "a place of the dataset cannot be reached, and what lies there cannot be purged",
            lost=lost,
            hint="Bring it back, or take it out of the placement for good; then purge again.",
        )


def _read(storage: Storage, key: str) -> PurgeCertificate:
    found = unseal(PurgeCertificate, storage.get(key), where=key)
    if not key.endswith(f"/{found.digest}.json"):
        raise CorruptError(
            "a purge lies under another's name", where=key, found=found.digest, hint="Restore this file from a copy."
        )
    return found


def _stored(storage: Storage, document: PurgeCertificate, key_of: Callable[[str], str]) -> PurgeCertificate:
    """Store `document` under its digest, and return it with that."""
    raw = seal(document)
    sealed = unseal(PurgeCertificate, raw, where="a purge")
    storage.put(key_of(sealed.digest), raw)
    return sealed


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What versions before `oldest` need that those from it on do not."""

    oldest: int
    """The first version after all those that name one of `data`."""

    data: tuple[str, ...]
    """Shards and documents files."""

    index: tuple[str, ...]
    """Segments and tables of deletions."""


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
    data = paths.filter(array_of(gone)).unique().to_pylist()
    index = {key for commit in history[: oldest - 1] for key in _index_keys(commit)}
    index -= {key for commit in [*history[oldest - 1 :], new] for key in _index_keys(commit)}
    return Leftovers(oldest=oldest, data=tuple(sorted(str(path) for path in data)), index=tuple(sorted(index)))


def _paths_if_there(storage: Storage, ref: SegmentRef) -> tuple[str, Any] | None:
    try:
        return ref.digest, paths_in(load_segment(storage, ref))
    except MissingError:
        return None


def _index_keys(commit: Commit) -> Iterator[str]:
    """Yield the keys of the segments and tables of deletions that a version names; what is parity goes by its own rules."""
    return (file.key for file in tables_of(commit) if not file.key.startswith(PARITY_TABLES_FOLDER))


def _others(paths: Any, kept: Any) -> Any:
    """Return which of `paths` are not among `kept`."""
    if not len(paths):
        return np.zeros(0, np.bool_)
    return ~numbers_of(pc.is_in(paths, value_set=kept.combine_chunks()))
