"""The frame of every change: open, build, check that nobody interfered, publish, and clean up after giving way.

Two operations on the same shard never merge: which rows the second one meant was decided from what the first one has
changed. So each remembers the shards it started from, and gives way if the newest version has others; what happened
to any other shard meanwhile does not matter.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
import numpy as np

from datastore.dataset.log.commits import CommitLog, StoredCommit
from datastore.dataset.log.identity import write_card
from datastore.dataset.log.manifest import Commit, DatasetInfo, Totals
from datastore.dataset.shards.files import remove_unused
from datastore.dataset.shards.inventory import data_paths
from datastore.dataset.snapshot import Dataset, open_dataset, split_reference
from datastore.errors import ConfigError, ConflictError, MissingError, StorageError
from datastore.host import package_name, utc_now
from datastore.storage.base import Storage
from datastore.storage.urls import strip_credentials

__all__ = [
    "DatasetLike",
    "draft_commit",
    "explain_expiry",
    "open_for_change",
    "publish",
    "remove_orphans",
    "require_unchanged",
]

Build = Callable[[Commit | None], Commit]

_LOGGER = logging.getLogger(__name__)


def draft_commit(
    operation: str, *, parent: Commit | None = None, ingest_id: str = "", config_digest: str = ""
) -> Commit:
    """Return a commit that says who and why, and is otherwise like `parent`; the log fills in the rest."""
    if parent is not None:
        return msgspec.structs.replace(
            parent,
            operation=operation,
            time=utc_now(),
            writer=package_name(),
            ingest_id=ingest_id,
            config_digest=config_digest,
        )
    return Commit(
        version=1,
        parent_sha256="",
        commit_id="",
        operation=operation,
        time=utc_now(),
        writer=package_name(),
        kind="tokens",
        segments=(),
        totals=Totals(),
        ingest_id=ingest_id,
        config_digest=config_digest,
    )


def publish(storage: Storage, info: DatasetInfo, build: Build, *, seen: StoredCommit | None = None) -> Commit:
    """Commit what `build` makes of the newest version, as `CommitLog.append`; then write the dataset's card."""

    def leave_card(commit: Commit) -> None:
        try:
            write_card(storage, info, commit)
        except StorageError as error:
            _LOGGER.warning("version %d is committed, but its card was not written: %s", commit.version, error)

    return CommitLog(storage, exclusive=info.exclusive).append(build, then=leave_card, seen=seen)


DatasetLike = str | os.PathLike[str] | Storage | Dataset
"""A dataset to change: its URL, its storage, or a version of it that was opened before."""


def open_for_change(target: DatasetLike) -> Dataset:
    """Return the newest version of `target`; a dataset that is open already is what the change starts from.

    Raises:
        ConfigError: the URL names a version.
        MissingError, FormatError, CorruptError: as `open_dataset`.
    """
    if isinstance(target, Dataset):
        return target
    if not isinstance(target, Storage) and (name := split_reference(os.fspath(target))[1]):
        raise ConfigError(
            "a version cannot be changed",
            url=strip_credentials(os.fspath(target)),
            version=name,
            hint="Name the dataset without it: what is done makes a new version.",
        )
    return open_dataset(target)


@contextmanager
def explain_expiry(dataset: Dataset, *, operation: str) -> Iterator[None]:
    """Say that another was faster if the block misses a file because `dataset` has expired since it was opened.

    Raises:
        ConflictError: it has.
    """
    try:
        yield
    except MissingError as error:
        newest = dataset.log.newest()
        if newest is None or newest.min_version <= dataset.version:
            raise
        raise ConflictError(
            f"the version that this {operation} started from has expired meanwhile",
            url=dataset.url,
            started_from=dataset.version,
            newest=newest.version,
            hint=f"Nothing was lost. Give the same {operation} again: it starts from the newest version.",
        ) from error


def require_unchanged(base: Dataset, newest: Commit | None, *, uids: Collection[str], operation: str) -> Dataset:
    """Return the version `newest`, in which the shards `uids` are what they are in `base`, deletions included.

    Raises:
        ConflictError: one of them is gone, was written anew, or has other deleted rows.
    """
    if newest is None:
        raise ConflictError("the dataset is gone", url=base.url, hint="Check the URL.")
    current = base.at(newest)
    changed = _changed(base, current, uids)
    if changed:
        raise ConflictError(
            f"shards that this {operation} changes were changed meanwhile",
            url=base.url,
            started_from=base.version,
            newest=newest.version,
            newest_operation=newest.operation,
            shards=len(changed),
            first=changed[0],
            hint=f"Nothing was lost. Give the same {operation} again: it starts from the newest version.",
        )
    return current


def remove_orphans(base: Dataset, made: Mapping[str, Sequence[str]]) -> None:
    """After a conflict, remove the files `made` from shards of `base` that have changed: they can never be committed.

    What was made from others stays, to be found by whoever tries again, and what any readable version names. A failure
    leaves files that no version names. One read for each version.
    """
    newest = base.log.newest()
    if newest is None:
        return
    orphans = {path for uid in _changed(base, base.at(newest), made) for path in made[uid]}
    if orphans:
        # Equal files have equal names: another version, even one before `base`, may have been committed with them.
        refs = {ref for commit in base.log.readable_versions(newest, info=base.info) for ref in commit.segments}
        remove_unused(base.storage, orphans.difference(map(str, data_paths(base.storage, refs).to_pylist())))


def _changed(base: Dataset, current: Dataset, uids: Collection[str]) -> list[str]:
    """Return those of the shards `uids` that are not in `current` what they are in `base`, deletions included."""
    if current.version == base.version:
        return []
    before = base.segments.digests_of(list(uids))
    present = current.segments.digests_of(list(uids))
    return [
        uid
        for uid in sorted(uids)
        if present.get(uid) != before[uid] or not np.array_equal(current.deletions.rows(uid), base.deletions.rows(uid))
    ]
