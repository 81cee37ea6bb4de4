"""An export appears whole or not at all.

On this machine it is written into a hidden folder beside the target, which takes the target's name at the end. On an
object store there is no such rename: files are put one by one, and the last one is the one without which the format
cannot be read, or `_SUCCESS` for formats that have none. So a killed export is recognized by what is missing.
"""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import pyarrow as pa
from typing_extensions import Buffer

from datastore.errors import ConfigError, DatastoreError
from datastore.storage.base import Storage
from datastore.storage.reasons import explain
from datastore.storage.resolve import open_storage

__all__ = ["Folder"]


class Folder:
    """Where an export goes. Use it as a context: an exception removes what was written on this machine."""

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
        if next(iter(self._storage.list()), None) is not None or (self._final and self._final.is_file()):
            raise ConfigError("the target is not empty", to=self.url, hint="Name a folder that does not exist.")
        self._staged = self._final and self._final.parent / f".{self._final.name}.{uuid.uuid4().hex}.tmp"

    def __enter__(self) -> Self:
        if self._staged is not None:
            with _explained(self._staged):
                self._staged.mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._staged is None or self._final is None:
            return
        if kind is not None:
            shutil.rmtree(self._staged, ignore_errors=True)
            return
        with _explained(self._final):
            if self._final.exists():
                self._final.rmdir()  # It was empty.
            self._staged.rename(self._final)

    def put(self, name: str, *chunks: Buffer) -> None:
        """Write one file as a whole."""
        if self._staged is None:
            self._storage.put(name, *chunks)
            self.files += 1
            self.bytes += sum(memoryview(chunk).nbytes for chunk in chunks)
            return
        with self.open(name) as file:
            for chunk in chunks:
                file.write(chunk)

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Yield a file to write; it is stored under `name` when the block ends. Its size is limited by disk alone."""
        if self._staged is not None:
            with _explained(self._staged / name), (self._staged / name).open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                self.bytes += file.tell()
        else:
            with tempfile.NamedTemporaryFile(prefix="datastore-export-") as file:
                yield file
                file.flush()
                size = file.tell()
                with pa.memory_map(file.name) as mapped:
                    self._storage.put(name, mapped.read_buffer() if size else b"")
                self.bytes += size
        self.files += 1

    def mark(self) -> None:
        """Say that all is there, on a storage where a rename cannot; for formats that have no index."""
        if self._staged is None:
            self._storage.put("_SUCCESS", b"\n")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except DatastoreError:  # Some are OSErrors, and of other files.
        raise
    except OSError as error:
        raise explain(error, key=path.name, url=str(path.parent), writing=True) from None
