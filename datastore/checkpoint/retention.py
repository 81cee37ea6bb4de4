"""What a run may forget: old steps, and the parts that no step needs any more.

A part is removed only if no step that is kept names it, and only if its own step is not after the newest commit: a
save in flight is always after it, on every rank, so what is being written is never touched, nor are the older parts
that it points into, because those belong to the newest commit as well. The listing of parts is taken before the steps
are read, so a commit that comes in between is seen. A step goes before its parts: a kill in between leaves parts that
the next collection finds, never a step without its parts.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from logging import getLogger

from datastore.checkpoint.format.manifest import PARTS, VOTES, StepCommit, step_key, step_of_key
from datastore.checkpoint.settings import Keep
from datastore.checkpoint.steps import StepLog
from datastore.errors import CorruptError
from datastore.storage.base import Stat, Storage

__all__ = ["Collected", "collect", "drop_after", "expired", "garbage"]

_log = getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would remove."""

    steps: tuple[int, ...]
    keys: tuple[str, ...]
    size_bytes: int


def expired(commits: Mapping[int, StepCommit | None], keep: Keep) -> list[int]:
    """Return the steps that `keep` lets go: all before the `keep.last`-th newest that can be read (None: cannot)."""
    readable = sorted((step for step, commit in commits.items() if commit is not None), reverse=True)
    if len(readable) < keep.last:
        return []
    oldest = readable[keep.last - 1]
    return sorted(step for step in commits if step < oldest)


def garbage(
    parts: Sequence[Stat], commits: Mapping[int, StepCommit | None], *, dropped: AbstractSet[int]
) -> list[Stat]:
    """Return those of `parts` that no step of `commits` but the `dropped` ones needs, up to the newest step."""
    kept = {step: commit for step, commit in commits.items() if step not in dropped}
    newest = max((step for step, commit in kept.items() if commit is not None), default=-1)
    unreadable = {step for step, commit in kept.items() if commit is None}
    live = {key for commit in kept.values() if commit is not None for key in _needs(commit)}
    found = []
    for stat in parts:
        step = step_of_key(stat.key)
        # Of a step that cannot be read we do not know the save, so everything of its number stays.
        if step is not None and step <= newest and step not in unreadable and stat.key not in live:
            found.append(stat)
    return found


def _needs(commit: StepCommit) -> set[str]:
    own = {key for ref in commit.parts for key in (ref.info, ref.part)}
    return own.union(*((part, f"{part.removesuffix('.safetensors')}.json") for part in commit.uses))


def collect(storage: Storage, keep: Keep, *, session: str = "", dry_run: bool = False) -> Collected:
    """Remove the steps that `keep` lets go, then the parts that no step needs; votes of other sessions, too.

    Raises:
        StorageError: the storage failed; what is left is consistent.
        FormatError: a step was written by a newer version of this package, so what it needs is not known.
    """
    log = StepLog(storage)
    parts = list(storage.list(PARTS))
    votes = [stat for stat in storage.list(VOTES) if not stat.key.startswith(f"{VOTES}/{session}/")]
    commits = {step: _readable(log, step) for step in log.steps()}
    drop = expired(commits, keep)
    unneeded = garbage(parts, commits, dropped=set(drop)) + (votes if session else [])
    if not dry_run:
        for step in drop:
            storage.delete(step_key(step))
        for stat in unneeded:
            storage.delete(stat.key)
    return Collected(tuple(drop), tuple(stat.key for stat in unneeded), sum(stat.size_bytes for stat in unneeded))


def drop_after(storage: Storage, step: int, *, dry_run: bool = False) -> list[int]:
    """Remove every step after `step`, newest first, and then what only they need; return them in rising order.

    Raises:
        MissingError: there is no such step.
    """
    log = StepLog(storage)
    log.read(step)
    dropped = [newer for newer in log.steps() if newer > step]
    for newer in reversed(dropped if not dry_run else []):
        commit = _readable(log, newer)
        storage.delete(step_key(newer))
        # A later save may point into an earlier part, never the other way round.
        for ref in () if commit is None else commit.parts:
            storage.delete(ref.info)
            if ref.part:
                storage.delete(ref.part)
    return dropped


def _readable(log: StepLog, step: int) -> StepCommit | None:
    try:
        return log.read(step)
    except CorruptError as error:
        _log.warning("step %d cannot be read and is not counted: %s", step, error)
        return None
