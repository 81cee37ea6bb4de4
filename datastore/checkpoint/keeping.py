"""Which steps of a run are kept, and the removal of all else.

Old steps go, and the parts that no step needs any more. A part is removed only if no step that is kept names it, and only if its own
step is not after the newest commit: a save in flight is always after it, on every rank, so what is being written is never touched.
A step goes before its parts: a kill in between leaves parts that the next collection finds, never a step without its parts.

An older part that a save in flight points into belongs to the newest commit as well, unless that save goes on from an earlier step, whose
parts another program may let go. So parts go in two phases. The first says in a file (`refs/condemned/`) which are to go; the second looks
again at all that may need them - steps, documents of saves in flight, claims - and removes the others. A saver does it the other way round:
its document stands before it looks at what is condemned or gone, and it commits only if it needs none of that. Whoever comes second
sees the first. Who writes parts of an older step, as a copy of a run does, claims them first (`refs/claims/`).

A step is pinned by a file that names it; whoever collects, in whatever program, leaves it.
"""

import math
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from logging import getLogger
from pathlib import PurePosixPath

from datastore.checkpoint.codec import with_codec
from datastore.checkpoint.format.manifest import PARTS, VOTES, PartInfo, StepCommit, layout_key, step_key, step_of_key
from datastore.checkpoint.format.tree import unpack
from datastore.checkpoint.steps import StepLog
from datastore.document import Count, Positive, SettingsDocument, unseal
from datastore.errors import ConfigError, ConflictError, CorruptError, MissingError, StorageError
from datastore.host import utc_now
from datastore.storage.base import Stat, Storage

__all__ = [
    "NOTES",
    "Collected",
    "Keep",
    "best_steps",
    "check_metric",
    "check_standing",
    "claimed",
    "collect",
    "drop_after",
    "expired",
    "files_of",
    "garbage",
    "make_space",
    "pin",
    "pinned_steps",
    "unpin",
]

_LOGGER = getLogger(__name__)

_PINS = "refs/pins"

_CONDEMNED = "refs/condemned"

_CLAIMS = "refs/claims"

NOTES = (_CONDEMNED, _CLAIMS)
"""What programs tell one another about one place."""

_STALE_S = 24 * 3600
"""A claim, or a list of condemned parts, that is older is of a program that was killed."""


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

    budget_bytes: Count = 0
    """What all parts together may take, with room for one more save as large as the newest: beyond that the oldest steps go that are not
    pinned, never the newest, whatever the other rules say; 0: no limit."""


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


def check_metric(storage: Storage, keep: Keep) -> None:
    """Raise `ConfigError` if the best steps are to stay by a number that no step has: a typing error would let the best one go."""
    if not keep.best:
        return
    log = StepLog(storage)
    commits = [commit for commit in map(log.read_if_sound, log.steps()) if commit is not None]
    if not best_steps(commits, keep.best):
        there = sorted({name for commit in commits for name in unpack(commit.metrics, name="metrics", tensors={})})
        hint = "Name a number that steps are saved with."
        raise ConfigError("no step has this metric", metric=keep.best, metrics=there, url=storage.url, hint=hint)


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
    """Return the keys of all files that belong to a step besides its own: parts, their documents, and its layout, which may be missing."""
    own = {layout_key(commit.ref), *(key for ref in commit.parts for key in (ref.info, ref.part))}
    return own.union(*((part, f"{part.removesuffix('.safetensors')}.json") for part in commit.uses))


def collect(
    storage: Storage, keep: Keep, *, session: str = "", spare: AbstractSet[int] = frozenset(), dry_run: bool = False
) -> Collected:
    """Remove the steps that `keep` lets go but for those to `spare`, then the parts that no step needs; votes of other sessions, too.

    Raises:
        StorageError: the storage failed; what is left is consistent.
        FormatError: a step was written by a newer version of this package, so what it needs is not known.
    """
    storage = with_codec(storage)
    log = StepLog(storage)
    parts = list(storage.list(PARTS))
    votes = [stat for stat in storage.list(VOTES) if not stat.key.startswith(f"{VOTES}/{session}/")]
    commits = {step: log.read_if_sound(step) for step in log.steps()}
    spared = set(pinned_steps(storage)) | spare
    drop = expired(commits, keep, pinned=spared)
    if keep.budget_bytes:
        drop = _within_budget(parts, commits, drop, keep.budget_bytes, spared)
    condemned = garbage(parts, commits, dropped=set(drop))
    others = votes if session else []
    if not dry_run:
        condemned = _remove(storage, drop, condemned)
        for stat in others:
            storage.delete(stat.key)
    gone = [*condemned, *others]
    return Collected(tuple(drop), tuple(stat.key for stat in gone), sum(stat.size_bytes for stat in gone))


def _within_budget(
    parts: Sequence[Stat],
    commits: Mapping[int, StepCommit | None],
    drop: Sequence[int],
    budget_bytes: int,
    spared: AbstractSet[int],
) -> list[int]:
    """Return `drop` and as many of the oldest steps as must go for the parts, and a save like the newest, to fit."""
    found = list(drop)
    newest = max((step for step, commit in commits.items() if commit is not None), default=-1)
    last = commits.get(newest)
    left = budget_bytes - (0 if last is None else sum(ref.size_bytes for ref in last.parts))
    for step in sorted(commits):
        if _size_of(parts) - _size_of(garbage(parts, commits, dropped=set(found))) <= left:
            break
        if step < newest and step not in spared and step not in found:
            found.append(step)
    return sorted(found)


def _size_of(stats: Iterable[Stat]) -> int:
    return sum(stat.size_bytes for stat in stats)


def make_space(storage: Storage, keep: Keep, incoming_bytes: int) -> None:
    """Let go what must go for `incoming_bytes` more to keep within the budget.

    Raises:
        ConfigError: the budget does not hold them beside the newest step and the pinned ones.
    """
    if not keep.budget_bytes or _size_of(storage.list(PARTS)) + incoming_bytes <= keep.budget_bytes:
        return
    collect(storage, keep)
    held = _size_of(storage.list(PARTS))
    if held + incoming_bytes > keep.budget_bytes:
        raise ConfigError(
            "the budget does not hold another step",
            budget_bytes=keep.budget_bytes,
            held_bytes=held,
            incoming_bytes=incoming_bytes,
            url=storage.url,
            hint="Raise budget_bytes to twice the size of a step at least, or unpin steps.",
        )


def _remove(storage: Storage, steps: Sequence[int], condemned: Sequence[Stat]) -> list[Stat]:
    """Remove `steps`, then those of the `condemned` parts that nobody needs when it is known that they are to go; return these."""
    note = f"{_CONDEMNED}/{uuid.uuid4().hex}"
    if condemned:
        storage.put(note, "\n".join(stat.key for stat in condemned).encode())
    for step in steps:
        storage.delete(step_key(step))
    if not condemned:
        return []
    needed = _needed(storage)
    gone = [stat for stat in condemned if stat.key not in needed]
    for stat in gone:
        storage.delete(stat.key)
    storage.delete(note)
    return gone


def _needed(storage: Storage) -> set[str]:
    """Return the files that steps, saves in flight or claims name now; forget notes that are a day old."""
    # Claims first: one that is gone by now has become a step, which is read after it.
    needed: set[str] = set().union(*(set(raw.decode().split("\n")) for raw in _notes(storage, _CLAIMS)))
    log = StepLog(storage)
    steps = log.steps()
    for step in steps:
        commit = log.read_if_sound(step)
        needed |= set() if commit is None else files_of(commit)
    for stat in storage.list(PARTS):
        number = step_of_key(stat.key)
        if stat.key.endswith(".json") and number is not None and number >= max(steps, default=0):
            with suppress(MissingError, CorruptError):  # Nothing commits a document that cannot be read.
                needed |= {entry.part for entry in unseal(PartInfo, storage.get(stat.key), where=stat.key).entries}
    _notes(storage, _CONDEMNED)
    return needed


def _notes(storage: Storage, folder: str) -> list[bytes]:
    """Return the notes of one kind; remove those that are a day old."""
    found = []
    for stat in list(storage.list(folder)):
        if stat.modified and time.time() - stat.modified > _STALE_S:
            storage.delete(stat.key)
        else:
            with suppress(MissingError):
                found.append(storage.get(stat.key))
    return found


@contextmanager
def claimed(storage: Storage, keys: Iterable[str]) -> Iterator[None]:
    """Keep the parts `keys`, which are about to be written, from collections until a step names them."""
    note = f"{_CLAIMS}/{uuid.uuid4().hex}"
    storage.put(note, "\n".join(sorted(keys)).encode())
    try:
        yield
    finally:
        storage.delete(note)


def check_standing(storage: Storage, parts: Iterable[str]) -> None:
    """Make sure that `parts` of earlier saves, which a document in storage names, are there and stay.

    Raises:
        StorageError: one is gone, or is just being removed.
    """
    wanted = list(parts)
    if not wanted:
        return
    condemned: set[str] = set().union(*(set(raw.decode().split("\n")) for raw in _notes(storage, _CONDEMNED)))
    there = {stat.key for stat in with_codec(storage).list(PARTS)}
    lost = [part for part in wanted if part in condemned or part not in there]
    if lost:
        hint = "Save again: all of the state will be written."
        raise StorageError("a part of an earlier save is gone", part=lost[0], url=storage.url, hint=hint)


def drop_after(storage: Storage, step: int, *, elsewhere: bool = False, dry_run: bool = False) -> list[int]:
    """Remove every step after `step`, which may be `elsewhere`, newest first, and then what only they need; return them in rising order.

    Raises:
        MissingError: there is no such step.
        ConflictError: one of those after it is pinned.
    """
    storage = with_codec(storage)
    log = StepLog(storage)
    if not elsewhere:
        log.read(step)
    dropped = [newer for newer in log.steps() if newer > step]
    pinned = sorted(set(dropped) & set(pinned_steps(storage)))
    if pinned:
        raise ConflictError("a later step is pinned", steps=pinned, url=storage.url, hint="Unpin it first.")
    for newer in reversed(dropped if not dry_run else []):
        commit = log.read_if_sound(newer)
        storage.delete(step_key(newer))
        # A later save may point into an earlier part, never the other way round.
        parts = () if commit is None else (key for ref in commit.parts for key in (ref.info, ref.part) if key)
        for key in () if commit is None else (layout_key(commit.ref), *parts):
            storage.delete(key)
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
