"""Which steps of a run are kept, and the removal of all else.

Old steps go, and the parts that no step needs any more. A part is removed only if no step that is kept names it, and only if its own
step is not after the newest commit: a save in flight is always after it, on every rank, so what is being written is never touched, nor
are the older parts that it points into, because those belong to the newest commit as well. The listing of parts is taken before
the steps are read, so a commit that comes in between is seen. A step goes before its parts: a kill in between leaves parts that the next
collection finds, never a step without its parts.

A step is pinned by a file that names it; whoever collects, in whatever program, leaves it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime
from logging import getLogger
from pathlib import PurePosixPath

from datastore.checkpoint.format.manifest import PARTS, VOTES, StepCommit, step_key, step_of_key
from datastore.checkpoint.format.tree import unpack
from datastore.checkpoint.steps import StepLog
from datastore.document import Count, Positive, SettingsDocument
from datastore.errors import ConfigError, ConflictError, MissingError
from datastore.host import utc_now
from datastore.storage.base import Stat, Storage

__all__ = [
    "Collected",
    "Keep",
    "best_steps",
    "collect",
    "drop_after",
    "expired",
    "files_of",
    "garbage",
    "pin",
    "pinned_steps",
    "unpin",
]

_LOGGER = getLogger(__name__)

_PINS = "refs/pins"


class Keep(SettingsDocument, frozen=True, kw_only=True):
    """Which steps survive once a newer one is committed: each of these rules keeps some, and pinned ones stay in any case."""

    last: Positive = 3
    """The newest steps that can be read. A damaged step does not count, so there is always something to fall back to."""

    every: Count = 0
    """Steps whose number is a multiple of this; 0: none."""

    within_s: Count = 0
    """Steps that were saved at most so many seconds before the newest; 0: none."""

    best: str = ""
    """A number among the metrics that a step is saved with: the steps where it is least are kept. With a `-` before its name, where it is largest."""

    best_count: Positive = 1
    """How many of the best."""


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would remove."""

    steps: tuple[int, ...]
    keys: tuple[str, ...]
    size_bytes: int


def best_steps(commits: Iterable[StepCommit], metric: str) -> list[int]:
    """Return the steps that were saved with the number `metric`, the best one first: the least, or with a `-` before the name the largest.

    Of equal ones the later comes first; what is no finite number is left out.
    """
    name, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
    found = []
    for commit in commits:
        value = unpack(commit.metrics, name="metrics", tensors={}).get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found.append((sign * value, -commit.step))
    return [-step for _, step in sorted(found)]


def expired(
    commits: Mapping[int, StepCommit | None], keep: Keep, *, pinned: AbstractSet[int] = frozenset()
) -> list[int]:
    """Return the steps that `keep` lets go, of which none is `pinned`; what cannot be read (None) goes with those before the last ones."""
    readable = {step: commit for step, commit in commits.items() if commit is not None}
    newest = sorted(readable, reverse=True)
    if len(newest) < keep.last:
        return []
    kept = set(pinned) | {step for step in readable if keep.every and step % keep.every == 0}
    if keep.best:
        kept |= set(best_steps(readable.values(), keep.best)[: keep.best_count])
    if keep.within_s:
        times = {step: datetime.fromisoformat(commit.time).timestamp() for step, commit in readable.items()}
        kept |= {step for step, time in times.items() if times[newest[0]] - time <= keep.within_s}
    oldest = newest[keep.last - 1]
    return sorted(step for step in commits if step < oldest and step not in kept)


def garbage(
    parts: Sequence[Stat], commits: Mapping[int, StepCommit | None], *, dropped: AbstractSet[int]
) -> list[Stat]:
    """Return those of `parts` that no step of `commits` but the `dropped` ones needs, up to the newest step."""
    kept = {step: commit for step, commit in commits.items() if step not in dropped}
    newest = max((step for step, commit in kept.items() if commit is not None), default=-1)
    unreadable = {step for step, commit in kept.items() if commit is None}
    live = {key for commit in kept.values() if commit is not None for key in files_of(commit)}
    found = []
    for stat in parts:
        step = step_of_key(stat.key)
        # Of a step that cannot be read we do not know the save, so everything of its number stays.
        if step is not None and step <= newest and step not in unreadable and stat.key not in live:
            found.append(stat)
    return found


def files_of(commit: StepCommit) -> set[str]:
    """Return the keys of all files that a step needs besides its own: parts and their documents."""
    own = {key for ref in commit.parts for key in (ref.info, ref.part)}
    return own.union(*((part, f"{part.removesuffix('.safetensors')}.json") for part in commit.uses))


def collect(
    storage: Storage, keep: Keep, *, session: str = "", spare: AbstractSet[int] = frozenset(), dry_run: bool = False
) -> Collected:
    """Remove the steps that `keep` lets go but for those to `spare`, then the parts that no step needs; votes of other sessions, too.

    Raises:
        StorageError: the storage failed; what is left is consistent.
        FormatError: a step was written by a newer version of this package, so what it needs is not known.
    """
    log = StepLog(storage)
    parts = list(storage.list(PARTS))
    votes = [stat for stat in storage.list(VOTES) if not stat.key.startswith(f"{VOTES}/{session}/")]
    commits = {step: log.read_if_sound(step) for step in log.steps()}
    drop = expired(commits, keep, pinned=set(pinned_steps(storage)) | spare)
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
        ConflictError: one of those after it is pinned.
    """
    log = StepLog(storage)
    log.read(step)
    dropped = [newer for newer in log.steps() if newer > step]
    pinned = sorted(set(dropped) & set(pinned_steps(storage)))
    if pinned:
        raise ConflictError("a later step is pinned", steps=pinned, url=storage.url, hint="Unpin it first.")
    for newer in reversed(dropped if not dry_run else []):
        commit = log.read_if_sound(newer)
        storage.delete(step_key(newer))
        # A later save may point into an earlier part, never the other way round.
        for ref in () if commit is None else commit.parts:
            storage.delete(ref.info)
            if ref.part:
                storage.delete(ref.part)
    return dropped


def pinned_steps(storage: Storage) -> list[int]:
    """Return the steps that are pinned, in rising order."""
    names = (PurePosixPath(stat.key).name for stat in storage.list(_PINS))
    return sorted(int(name) for name in names if name.isdecimal())


def pin(storage: Storage, step: int) -> None:
    """Keep `step`, whatever `Keep` says, until it is unpinned. Pinned twice is pinned.

    Raises:
        MissingError: there is no such step.
        ConflictError: it was removed meanwhile.
    """
    log = StepLog(storage)
    log.read(step)
    storage.put(_pin_key(step), f"pinned {utc_now()}\n".encode())
    try:
        log.read(step)  # A collection that had not seen the pin may have come in between.
    except MissingError:
        storage.delete(_pin_key(step))
        raise ConflictError(
            "the step was removed meanwhile", step=step, url=storage.url, hint="Pin another one."
        ) from None


def unpin(storage: Storage, step: int) -> None:
    """Let `step` go by the rules of `Keep` again.

    Raises:
        ConfigError: it is not pinned.
    """
    if step not in pinned_steps(storage):
        raise ConfigError("the step is not pinned", step=step, url=storage.url, pinned=pinned_steps(storage))
    storage.delete(_pin_key(step))


def _pin_key(step: int) -> str:
    return f"{_PINS}/{step:010d}"
