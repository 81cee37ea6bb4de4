"""Which files a folder holds, and where the batches of each begin: read once, and kept.

A kept entry counts as long as the file has the size and the time of its last change that it had. Whatever else is there is read
anew: the footer of a Parquet file, the headers of an Arrow stream. What names the whole, and goes into the state of a loader, is
made of names, sizes and digests of these, not of times: a copy of the folder goes on where the folder stood.
"""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

import msgspec

from datastore.digest import digest_hex
from datastore.document import Count, Document, Hex32, Sealed, seal, unseal
from datastore.errors import ConfigError, CorruptError, FormatError, MissingError, StorageError
from datastore.storage.base import Stat, Storage
from datastore.storage.resolve import open_storage
from datastore.threads import each

__all__ = ["FileEntry", "FileIndex", "IndexCost", "Kept", "changes", "made_index", "name_of_index"]

_THREADS = 16
_KEPT = 4
"""Indexes of one folder that are kept: those of before tell which files have changed since a state was saved."""


class FileEntry(Document, frozen=True, kw_only=True):
    """One file."""

    path: str
    size_bytes: Count
    modified: float
    """Seconds since the epoch, by the clock of the storage; 0.0 if it does not say."""

    digest: Hex32
    """Of the footer, or of all headers."""

    rows: tuple[Count, ...]
    """Of each batch."""

    memory_bytes: tuple[Count, ...]
    """About what each takes in memory."""

    starts: tuple[Count, ...] = ()
    """First byte of each batch, of an Arrow stream."""

    stops: tuple[Count, ...] = ()
    """The byte after each."""

    schema: Count = 0
    """Which of the schemas of the index it has."""


class FileIndex(Sealed, frozen=True, kw_only=True):
    """All files of a folder, in their order."""

    compact: ClassVar[bool] = True

    url: str
    files: tuple[FileEntry, ...]
    schemas: tuple[bytes, ...]
    """Those that files have, each once, as Arrow IPC messages."""

    note: str = ""
    """What names the rows beside their files: the fingerprint of a saved dataset."""


class IndexCost(NamedTuple):
    """What it took to index a folder this time."""

    files_read: int
    """Of how many files the index was not known, or out of date."""

    seconds: float


class Kept:
    """Where indexes are kept: a folder, by default `~/.cache/datastore/files`."""

    def __init__(self, url: str, where: str | None) -> None:
        try:
            folder = str(Path.home() / ".cache" / "datastore" / "files") if where is None else where
        except RuntimeError:
            raise ConfigError("this user has no home to keep an index in", hint="Name a folder: `index=`.") from None
        self._storage = open_storage(folder)
        self._folder = digest_hex(url.encode())[:16]

    def newest(self) -> FileIndex | None:
        """Return the index that was kept last; None if there is none that can be read."""
        stats = sorted(self._storage.list(self._folder), key=lambda stat: stat.modified)
        return self._read(stats[-1].key) if stats else None

    def named(self, name: str) -> FileIndex | None:
        """Return the index of that name, if it is kept."""
        return self._read(f"{self._folder}/{name}.json")

    def keep(self, index: FileIndex) -> None:
        """Keep `index`, and let go of old ones. That it cannot be kept is a warning: it is made anew next time."""
        try:
            self._storage.put(f"{self._folder}/{name_of_index(index)}.json", seal(index))
            stats = sorted(self._storage.list(self._folder), key=lambda stat: stat.modified)
            for stat in stats[:-_KEPT]:
                self._storage.delete(stat.key)
        except StorageError as error:
            warnings.warn(
                f"the index of {index.url} could not be kept, and will be made again: {error}",
                RuntimeWarning,
                stacklevel=4,
            )

    def _read(self, key: str) -> FileIndex | None:
        try:
            return unseal(FileIndex, self._storage.get(key), where=key)
        except (MissingError, CorruptError, FormatError):
            return None


def name_of_index(index: FileIndex) -> str:
    """Return 32 hex digits that name the rows: the names, sizes and digests of all files, but not their times."""
    facts = [[file.path, file.size_bytes, file.digest] for file in index.files]
    return digest_hex(repr((facts, index.note)).encode())


def made_index(
    storage: Storage,
    stats: list[Stat],
    *,
    kept: FileIndex | None,
    read: Callable[[Stat], tuple[FileEntry, bytes]],
    note: str,
) -> tuple[FileIndex, IndexCost]:
    """Return the index of the files `stats`, made of what is `kept` of it, and what it took to `read` the rest.

    Raises:
        CorruptError, ConfigError: a file is not what it should be; the message names it.
        MissingError, StorageError: one cannot be read.
    """
    begun = time.monotonic()
    before = {(file.path, file.size_bytes, file.modified): file for file in (kept.files if kept else ())}
    known = [before.get((stat.key, stat.size_bytes, stat.modified)) if stat.modified else None for stat in stats]
    unknown = [stat for stat, entry in zip(stats, known, strict=True) if entry is None]
    fresh = {entry.path: (entry, schema) for entry, schema in each(read, unknown, threads=_THREADS)}
    schemas: dict[bytes, int] = {}
    files = []
    for stat, entry in zip(stats, known, strict=True):
        found, schema = (entry, kept.schemas[entry.schema]) if entry and kept else fresh[stat.key]
        files.append(msgspec.structs.replace(found, schema=schemas.setdefault(schema, len(schemas))))
    index = FileIndex(url=storage.url, files=tuple(files), schemas=tuple(schemas), note=note)
    return index, IndexCost(len(unknown), time.monotonic() - begun)


def changes(before: FileIndex, now: FileIndex) -> list[str]:
    """Return what has become of files between two indexes of a folder, one line for each."""
    old, new = ({file.path: file for file in index.files} for index in (before, now))
    found = [f"{path} is gone" for path in sorted(old.keys() - new.keys())]
    found += [f"{path} is new" for path in sorted(new.keys() - old.keys())]
    for path in sorted(old.keys() & new.keys()):
        one, other = old[path], new[path]
        if (one.size_bytes, one.digest) != (other.size_bytes, other.digest):
            found.append(f"{path} had {one.size_bytes} bytes and {sum(one.rows)} rows, and is another now")
    return found or ["the dataset was saved anew"]
