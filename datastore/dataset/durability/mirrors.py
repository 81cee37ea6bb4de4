"""The small files of a dataset on several disks, made the same everywhere: log, segments, deletions, tags and the like.

Which bytes are right is told by the file where it can be (a digest inside, or for a name); beyond that the first root
is right, and a root that has missed something is not asked. What only such a root has was removed while it was away.
"""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from datastore.dataset.log.commits import is_commit
from datastore.dataset.log.keys import (
    BEHIND_FOLDER,
    HINT_KEY,
    LEASE_KEY,
    is_data,
    is_immutable,
    sha256_in,
    table_digest_in,
    version_of_key,
)
from datastore.digest import digest_hex, sha256_hex
from datastore.errors import DatastoreError, MissingError
from datastore.storage.base import Root, Storage
from datastore.storage.verified import has_digest

__all__ = ["Finding", "equalize", "soundness"]

_OWN_DIGEST = re.compile(rb'"digest": "([0-9a-f]{32})"')

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Finding:
    """A copy of a file that is not what it should be, and what became of it."""

    path: str
    root: str
    """URL of the place of this copy."""

    fault: str
    repair: str
    """How it was repaired; empty if it was not."""

    reason: str = ""
    """Why it could not be repaired."""


def soundness(key: str) -> Callable[[bytes], bool]:
    """Return a function that tells, as far as that can be told, whether bytes are those that were written as `key`."""
    if digest := table_digest_in(key):
        return has_digest(digest)
    if sha256 := sha256_in(key):
        return lambda raw: sha256_hex(raw) == sha256
    version = version_of_key(key)
    if version is not None:
        return lambda raw: is_commit(raw, version)
    return _is_intact if key.endswith(".json") or key == HINT_KEY else _anything


def _anything(_: bytes) -> bool:
    return True


def _is_intact(raw: bytes) -> bool:
    """Return whether a sealed document has the digest that it carries."""
    own = _OWN_DIGEST.search(raw)
    return own is not None and digest_hex(raw[: own.start(1)], raw[own.end(1) :]) == own[1].decode()


def equalize(
    roots: Sequence[Root], *, trusted: Sequence[Root], dry_run: bool, skip: frozenset[str] = frozenset()
) -> Iterator[Finding]:
    """Write to each of `roots` what it lacks, or has wrong, of the files that are not data; yield what was found.

    `trusted` are those of them that have missed nothing, the first to believe first; `skip` are keys to leave alone.
    """
    keys = {stat.key for root in roots for stat in root.storage.list() if not is_data(stat.key)}
    for key in sorted(keys - skip - {LEASE_KEY}):
        if not key.startswith(f"{BEHIND_FOLDER}/"):
            yield from _equalize(key, roots, trusted, dry_run=dry_run)


def _equalize(key: str, roots: Sequence[Root], trusted: Sequence[Root], *, dry_run: bool) -> Iterator[Finding]:
    is_sound = soundness(key)
    if len(roots) == 1 and is_sound is _anything:
        return
    found = {root.id: _read(root.storage, key) for root in roots}
    believed = [*trusted, *([root for root in roots if root not in trusted] if table_digest_in(key) else [])]
    right = next((raw for root in believed if (raw := found[root.id]) is not None and is_sound(raw)), None)
    if right is not None:
        wrong = [root for root in roots if found[root.id] != right]
        for root in wrong:
            yield _written(root, key, right, before=found[root.id], dry_run=dry_run)
        if not dry_run and not is_immutable(key):
            _follow(key, right, trusted[0], wrong)
        return
    there = [root for root in roots if found[root.id] is not None]
    if any(root in trusted for root in there):
        for root in there:
            yield Finding(key, root.storage.url, "it is damaged", "", "there is no good copy of it")
    else:
        for root in there:
            yield _removed(root, key, dry_run=dry_run)


def _follow(key: str, written: bytes, first: Root, roots: Sequence[Root]) -> None:
    """Whoever changed `key` while it was copied to `roots` has written it to them, maybe before us: write it again."""
    for _ in range(3):
        raw = _read(first.storage, key)
        if raw is None or raw == written or first in roots:
            return
        for root in roots:
            root.storage.put(key, raw)
        written = raw


def _read(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.get(key)
    except MissingError:
        return None
    except DatastoreError as error:
        _LOGGER.warning("%s cannot be read at %s: %s", key, storage.url, error)
        return None


def _written(root: Root, key: str, raw: bytes, *, before: bytes | None, dry_run: bool) -> Finding:
    fault = "it is missing" if before is None else "it is out of date" if soundness(key)(before) else "it is damaged"
    try:
        if not dry_run:
            root.storage.put(key, raw)
    except DatastoreError as error:
        return Finding(key, root.storage.url, fault, "", str(error))
    return Finding(key, root.storage.url, fault, "copied from another root")


def _removed(root: Root, key: str, *, dry_run: bool) -> Finding:
    if not dry_run:
        root.storage.delete(key)
    return Finding(key, root.storage.url, "it was removed while this root was away", "removed")
