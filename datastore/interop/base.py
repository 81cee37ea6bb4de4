"""A foreign format: a way to write rows, a way to read them, or both. An export appears whole or not at all.

On this machine it is written into a hidden folder beside the target, which takes the target's name at the end. On an
object store there is no such rename: files are put one by one, and the last one is the one without which the format
cannot be read, or `_SUCCESS` for formats that have none. So a killed export is recognized by what is missing.
"""

import fcntl
import filecmp
import glob
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, Self

import orjson
import pyarrow as pa
from typing_extensions import Buffer

from datastore.errors import ConfigError, CorruptError, DatastoreError, MissingError
from datastore.storage.base import Storage, check_key
from datastore.storage.errors import explain
from datastore.storage.resolve import open_storage

__all__ = ["Exporter", "Folder", "Format", "Rows", "Span", "below", "damaged", "numbered", "read_json", "whole_files"]

Span = tuple[int, int]
"""A byte range of a file: what begins in it belongs to it."""

_STAGED_BYTES = 200
"""How much of the target's name is left in that of the hidden folder; 255 is what a name may have."""

Rows = tuple[int, pa.Table]
"""Rows, and which row of its file the first of them is."""


class Folder:
    """Where an export goes. Use it as a context: an exception removes what was written on this machine.

    What is there already is compared with what is written, file by file: the same export given again is done.
    """

    def __init__(self, url: str) -> None:
        """Open the target `url`.

        Raises:
            ConfigError: something is there already.
        """
        self._storage: Storage = open_storage(url)
        self.url = self._storage.url
        self.files = 0
        self.bytes = 0
        self._final = Path(self.url) if "://" not in self.url else None
        self._present = {stat.key: stat.size_bytes for stat in self._storage.list()}
        if self._final and self._final.is_file():
            raise self._taken()
        self._names: set[str] = set()
        self._short = os.fsdecode(os.fsencode(self._final.name)[:_STAGED_BYTES]) if self._final else ""
        self._staged = self._final and self._final.parent / f".{self._short}.{uuid.uuid4().hex}.tmp"
        self._lock: int | None = None

    def __enter__(self) -> Self:
        if self._staged is not None:
            self._clear_left()
            with _explained(self._staged):
                self._staged.mkdir(parents=True)
                # Held until this process ends, however it does.
                self._lock = os.open(self._staged, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        other = kind is None and self._present and self._names != self._present.keys()
        if other and self._staged is None:
            raise self._taken()
        if self._staged is None or self._final is None:
            return
        if self._lock is not None:
            os.close(self._lock)
        if kind is not None or self._present:
            shutil.rmtree(self._staged, ignore_errors=True)
            if other:
                raise self._taken()
            return
        with _explained(self._final):
            if self._final.exists():
                self._final.rmdir()  # It was empty.
            self._staged.rename(self._final)

    def put(self, name: str, *chunks: Buffer) -> None:
        """Write one file as a whole."""
        self._expect(name)
        if self._staged is None:
            if not self._present:
                self._storage.put(name, *chunks)
            elif self._storage.get(name) != b"".join(chunks):
                raise self._taken()
            self.files += 1
            self.bytes += sum(memoryview(chunk).nbytes for chunk in chunks)
            return
        with self.open(name) as file:
            for chunk in chunks:
                file.write(chunk)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Yield a file to write; it is stored under `name` when the block ends. Its size is limited by disk alone."""
        self._expect(name)
        if self._staged is not None and self._final is not None:
            with _explained(self._staged / name), (self._staged / name).open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                self.bytes += file.tell()
            if self._present and not filecmp.cmp(self._staged / name, self._final / name, shallow=False):
                raise self._taken()
        else:
            with tempfile.NamedTemporaryFile(prefix="datastore-export-") as file:
                yield file
                file.flush()
                size = file.tell()
                with pa.memory_map(file.name) as mapped:
                    whole = mapped.read_buffer() if size else b""
                    if not self._present:
                        self._storage.put(name, whole)
                    elif not pa.py_buffer(self._storage.get(name)).equals(pa.py_buffer(whole)):
                        raise self._taken()
                self.bytes += size
        self.files += 1

    def mark(self) -> None:
        """Say that all is there, on a storage where a rename cannot; for formats that have no index."""
        if self._staged is None:
            self._names.add("_SUCCESS")
            self._storage.put("_SUCCESS", b"\n")

    def _expect(self, name: str) -> None:
        """Raise unless `name` may be written: where something is, only what is there is written again."""
        self._names.add(name)
        if self._present and name not in self._present:
            raise self._taken()

    def _taken(self) -> ConfigError:
        return ConfigError(
            "the target is not empty, and holds something else",
            to=self.url,
            hint="Name a folder that does not exist.",
        )

    def _clear_left(self) -> None:
        """Remove what exports to the same place have left that were killed: whose folder nobody holds."""
        assert self._final is not None
        for left in self._final.parent.glob(f".{glob.escape(self._short)}.{'?' * 32}.tmp"):
            with suppress(OSError):  # BlockingIOError: it is being written.
                lock = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left)
                finally:
                    os.close(lock)


class Exporter(Protocol):
    """Writes rows into a folder, several files of about `shard_bytes`."""

    def __init__(self, folder: Folder, schema: pa.Schema, *, shard_bytes: int) -> None: ...

    def write(self, rows: pa.Table) -> None:
        """Add rows.

        Raises:
            ConfigError: the format cannot hold one of them.
        """
        ...

    def close(self) -> None:
        """Write what is left, and at last that without which the folder is not complete."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """How one format is read. All functions take the storage of the source's folder, and keys in it."""

    files: Callable[[Storage], list[str]]
    """The files that hold rows, in their order. Raises ConfigError where there are none."""

    schema: Callable[[Storage, str], pa.Schema]
    """The columns of a file; none of one that is empty and does not say. It reads no more than it must."""

    read: Callable[[Storage, str, Span], Iterator[Rows]]
    """The rows that begin in a byte range of a file, in order, some megabytes at a time.

    Raises CorruptError for a damaged file, and ConfigError for what is not supported or not safe to read.
    """

    can_be_cut: bool = False
    """Whether a file can be read in several ranges."""


def numbered(tables: Iterable[pa.Table]) -> Iterator[Rows]:
    """Yield `tables`, which are a file from its first row on, with the number of each one's first row."""
    first = 0
    for table in tables:
        yield first, table
        first += table.num_rows


def whole_files(*suffixes: str) -> Callable[[Storage], list[str]]:
    """Return a `Format.files` for a folder of files with one of these suffixes, sorted by name."""

    def files(storage: Storage) -> list[str]:
        keys = [stat.key for stat in storage.list() if stat.key.endswith(suffixes) and "/." not in f"/{stat.key}"]
        if not keys:
            raise ConfigError(
                f"there is no {' or '.join(suffixes)} file", source=storage.url, hint="Name their folder."
            )
        return keys

    return files


def read_json(storage: Storage, key: str, *, what: str) -> dict[str, Any]:
    """Return the JSON object in the file `key`, without which the folder is not `what`.

    Raises:
        ConfigError: there is no such file.
        CorruptError: it holds something else.
    """
    try:
        found = orjson.loads(storage.get(key))
    except MissingError:
        raise ConfigError(
            f"the source is no {what} folder: it has no {key}", source=storage.url, hint="Name the folder that has it."
        ) from None
    except orjson.JSONDecodeError as error:
        raise CorruptError(f"not JSON: {error}", where=key, hint="Restore this file from a copy.") from None
    if not isinstance(found, dict):
        raise CorruptError("not a JSON object", where=key, hint="Restore this file from a copy.")
    return found


def damaged(error: Exception, key: str, what: str) -> DatastoreError:
    """Return the error for the file `key` that is no `what`, as its library said; one of the storage stays as it is."""
    if isinstance(error, DatastoreError):  # Of the storage: they are OSErrors, too.
        return error
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return CorruptError(f"not {what}: {reason}", where=key, hint="Restore this file from a copy.")


def below(index: str, name: object) -> str:
    """Return the key of the file that the document `index` names, relative to its folder.

    Raises:
        CorruptError: it is no plain relative path; a source may not lead out of its folder.
    """
    if not isinstance(name, str) or not name:
        raise CorruptError("a file has no name", where=index, hint="Restore this file from a copy.")
    try:
        return check_key(posixpath.join(posixpath.dirname(index), name))
    except ConfigError:
        raise CorruptError(
            "a file outside of its folder is named", where=index, file=name, hint="Do not trust this source."
        ) from None


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DatastoreError:  # Some are OSErrors, and of other files.
        raise
    except OSError as error:
        raise explain(error, key=path.name, url=str(path.parent), writing=True) from None
