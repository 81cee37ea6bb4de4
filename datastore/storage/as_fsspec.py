"""A storage as a read-only fsspec file system, so that pyarrow, DuckDB, Polars and Ray read its files by themselves.

Keys are paths. What they do not ask for is not read: a column of a Parquet file is a few range requests.
"""

import io
from typing import Any

from fsspec.spec import AbstractFileSystem
from typing_extensions import Buffer, override

from datastore.errors import MissingError
from datastore.storage.base import Storage

__all__ = ["ReadOnlyFileSystem", "StoredFile"]


class ReadOnlyFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The files of one storage; whatever would write is refused by fsspec."""

    protocol = "datastore"
    cachable = False

    def __init__(self, storage: Storage) -> None:
        super().__init__(storage)
        self._storage = storage

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Return name, size and type of the file `path`.

        Raises:
            MissingError: there is no such file; it is a `FileNotFoundError`, too.
        """
        key = self._strip_protocol(path)
        return {"name": key, "size": self._storage.stat(key).size_bytes, "type": "file"}

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:  # noqa: FBT001, FBT002 - fsspec's signature
        """Return the files below `path`, at any depth."""
        key = self._strip_protocol(path)
        try:
            found = [self.info(key)]
        except MissingError:
            found = [{"name": stat.key, "size": stat.size_bytes, "type": "file"} for stat in self._storage.list(key)]
        return found if detail else [each["name"] for each in found]

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.RawIOBase:
        if mode != "rb":
            raise io.UnsupportedOperation("a dataset is written through datastore only")
        return StoredFile(self._storage, self._strip_protocol(path))


class StoredFile(io.RawIOBase):
    """One file; every read is one range request, for its readers know how much they want."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage = storage
        self._key = key
        self._size_bytes = storage.stat(key).size_bytes
        self._at = 0

    def size(self) -> int:
        """Return the size of the file."""
        return self._size_bytes

    @override
    def readable(self) -> bool:
        return True

    @override
    def seekable(self) -> bool:
        return True

    @override
    def tell(self) -> int:
        return self._at

    @override
    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        self._at = max(0, base + offset)
        return self._at

    @override
    def readinto(self, buffer: Buffer, /) -> int:
        with memoryview(buffer) as view, view.cast("B") as target:
            wanted = max(0, min(len(target), self._size_bytes - self._at))
            with target[:wanted] as part:
                if wanted:
                    self._storage.read_into(self._key, self._at, part)
        self._at += wanted
        return wanted

    @override
    def read(self, size: int = -1, /) -> bytes:
        # Not by way of `readinto`: whoever reads a damaged file may ask for more than there is memory.
        left = max(0, self._size_bytes - self._at)
        stop = self._at + (left if size < 0 else min(size, left))
        data = self._storage.get_ranges(self._key, [(self._at, stop)])[0] if stop > self._at else b""
        self._at = stop
        return data
