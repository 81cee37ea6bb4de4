"""The files of a local folder, sorted, without ever leaving it.

Links are not followed: one that leads out could pull in anything the user may read, one that stays inside would give
the same text twice, and a loop would never end. The folder itself may be named through a link.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datastore.dataset.log.manifest import INFO_KEY
from datastore.ingestion.reading.listing import Globs, SkipReason, odd_name
from datastore.storage.base import Stat
from datastore.storage.reasons import explain

__all__ = ["walk"]


def walk(root: Path, globs: Globs, skipped: Counter[str], below: str = "") -> Iterator[Stat]:
    """Yield the regular files below `root` (resolved) that `globs` takes; count all others in `skipped`.

    Raises:
        MissingError, StorageError: a folder cannot be read.
    """
    try:
        with os.scandir(root / below) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise explain(error, key=below or ".", url=str(root)) from None
    if any(entry.name == INFO_KEY for entry in entries):
        skipped["dataset"] += 1
        return
    for entry in entries:
        key = f"{below}/{entry.name}" if below else entry.name
        reason = _reason_to_skip(entry, key, root, globs)
        if reason is not None:
            skipped[reason] += 1
        elif entry.is_dir(follow_symlinks=False):
            yield from walk(root, globs, skipped, key)
        else:
            facts = entry.stat(follow_symlinks=False)
            yield Stat(key=key, size_bytes=facts.st_size, modified=facts.st_mtime)


def _reason_to_skip(entry: "os.DirEntry[str]", key: str, root: Path, globs: Globs) -> SkipReason | None:
    folder = entry.is_dir(follow_symlinks=False)
    if entry.name.startswith("."):
        return "hidden"
    if globs.prunes(key) if folder else not globs.takes(key):
        return "excluded"
    if odd_name(key):
        return "odd_name"
    if entry.is_symlink():
        return "symlink" if _stays_inside(root, key) else "outside_root"
    return None if folder or entry.is_file(follow_symlinks=False) else "special_file"


def _stays_inside(root: Path, key: str) -> bool:
    try:
        return (root / key).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # A loop of links leads nowhere.
        return True
