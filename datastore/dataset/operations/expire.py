"""Old versions expire: a commit says from which version on the dataset can be read, and vacuum may then remove the rest.

Nothing is removed here, and the log keeps every version's file: the chain of their sha256 stays whole. A version that a
tag names is kept with everything after it, because one number says what can be read; the price is that one forgotten
tag holds back all later versions, so the report names it.
"""

import time
from dataclasses import dataclass, replace
from datetime import datetime

import msgspec

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.manifest import Commit, oldest_readable
from datastore.dataset.log.tags import list_tags, read_tag
from datastore.dataset.operations.transaction import DatasetLike, draft_commit, open_for_change, publish
from datastore.errors import ConfigError
from datastore.storage.base import Storage

__all__ = ["ExpireReport", "expire", "time_of"]

_OPERATION = "expire"


@dataclass(frozen=True, slots=True)
class ExpireReport:
    """What expired, or would expire."""

    version: int
    """The newest version; the one that the expiring made, if it made one."""

    oldest_before: int
    oldest: int
    """The oldest version that can be read now, or could be read then."""

    held_by: str
    """The tag that keeps versions which would have expired otherwise; empty if none does."""

    dry_run: bool

    @property
    def expired(self) -> int:
        """How many versions can no longer be read."""
        return self.oldest - self.oldest_before


def expire(
    target: DatasetLike, *, keep_last: int | None = None, older_than_s: float | None = None, dry_run: bool = False
) -> ExpireReport:
    """Let old versions of the dataset `target` expire: they cannot be opened any more, and `vacuum` removes what only they need.

    `keep_last` keeps that many versions, those not counted that an expiring made. `older_than_s` keeps every version that was the newest
    at some time in so many seconds before now, so whatever was read within them can be opened again. With both, a
    version expires only if both let it go. The newest version and those from the oldest tag on never expire.
    With `dry_run` nothing is written; without, and with something to expire, there is one more version.

    Raises:
        ConfigError: neither limit is given, or one is out of range; or the URL names a version.
        MissingError, CorruptError: as `open_dataset`; also if the log is damaged.
        ConflictError, StorageError: as `CommitLog.append`.
    """
    if keep_last is None and older_than_s is None:
        raise ConfigError("nothing says what to keep", hint="Give keep_last, older_than_s, or both.")
    if (keep_last is not None and keep_last < 1) or (older_than_s is not None and older_than_s < 0):
        raise ConfigError(
            "not a limit", keep_last=keep_last, older_than_s=older_than_s, hint="Keep at least the newest version."
        )
    dataset = open_for_change(target)
    storage, info = dataset.storage, dataset.info
    reports = list[ExpireReport]()

    def build(newest: Commit | None) -> Commit:
        current = newest or dataset.commit
        log, before = dataset.log, oldest_readable(info, current)
        wanted = current.version if keep_last is None else _last(log, current, keep_last, oldest=before)
        if older_than_s is not None:
            wanted = min(wanted, _newest_at(log, time.time() - older_than_s, oldest=before, newest=current))
        oldest, held_by = _held_back(storage, wanted, oldest=before)
        if not any(log.read(version).operation != _OPERATION for version in range(oldest, before, -1)):
            oldest = before  # They differ in nothing but what had expired then.
        reports.append(ExpireReport(current.version, before, oldest, held_by, dry_run))
        if dry_run or oldest == before:
            return current
        return msgspec.structs.replace(draft_commit(_OPERATION, parent=current), min_version=oldest)

    if dry_run:
        build(dataset.commit)
        return reports[-1]
    commit = publish(storage, info, build)
    return replace(reports[-1], version=commit.version)


def time_of(commit: Commit) -> float:
    """Return when `commit` was made, in seconds since the epoch by its writer's clock."""
    return datetime.fromisoformat(commit.time).timestamp()


def _last(log: CommitLog, newest: Commit, count: int, *, oldest: int) -> int:
    """Return the version that has `count - 1` after it which something else than an expiring made."""
    commit = newest
    while commit.version > oldest:
        count -= commit.operation != _OPERATION
        if not count:
            break
        commit = log.read(commit.version - 1)
    return commit.version


def _newest_at(log: CommitLog, moment_s: float, *, oldest: int, newest: Commit) -> int:
    """Return the version that was the newest at `moment_s`, or `oldest` if all are later. O(log n) reads."""
    low, high = oldest, newest.version
    if time_of(newest) <= moment_s:
        return newest.version
    while high - low > 1:
        middle = (low + high) // 2
        if time_of(log.read(middle)) <= moment_s:
            low = middle
        else:
            high = middle
    return low


def _held_back(storage: Storage, wanted: int, *, oldest: int) -> tuple[int, str]:
    """Return the oldest version to keep, and the tag that keeps it if that is older than `wanted`."""
    tags = [read_tag(storage, name) for name in list_tags(storage)]
    kept = [(tag.version, tag.name) for tag in tags if oldest <= tag.version < wanted]
    return min(kept, default=(wanted, ""))
