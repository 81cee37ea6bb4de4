"""From a URL, as a user types it, to the storage it names.

A plain path and `file:///path` are a folder of this machine, `memory://name` lives in this process, and every other
scheme goes to fsspec, which is imported only then. A URL below another one always names a part of the same bytes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from typing_extensions import Buffer, override

from datastore.errors import ConfigError
from datastore.storage.base import Stat, Storage, check_key
from datastore.storage.local import LocalStorage
from datastore.storage.memory import MemoryStorage
from datastore.storage.statistics import OperationStatistics
from datastore.storage.urls import join_url, split_url, strip_credentials

__all__ = ["Subfolder", "join_url", "open_storage", "strip_credentials"]

_BARE = {"s3", "s3a", "gs", "gcs"}
"""Schemes whose library takes `key:secret@` and `?query` for a part of the name, and would write to another place."""


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """Return the storage that `url` names; nothing is read, written or connected to yet.

    Raises:
        ConfigError: the URL is empty or malformed, or no installed package knows its scheme.
        DependencyError: the scheme is known, but its package is not installed.
    """
    text = os.fspath(url)
    if not text.strip():
        raise ConfigError("the URL is empty", hint="Name a path or a URL.")
    if "::" in text and "://" in text:
        raise ConfigError(
            "chained URLs are not supported",
            url=strip_credentials(text),
            hint="Name the store itself: caching is built in.",
        )
    scheme, rest = split_url(text)
    if scheme == "":
        return LocalStorage(Path(text).expanduser())
    if scheme in {"file", "local"}:
        return LocalStorage(_file_path(text, rest))
    if scheme == "memory":
        return _open_memory(text, rest)
    if scheme in _BARE and strip_credentials(text) != text:
        raise ConfigError(
            "the URL holds more than a bucket and a path",
            url=strip_credentials(text),
            hint="Put keys where the library looks for them (for S3: AWS_ACCESS_KEY_ID or ~/.aws/credentials).",
        )
    from datastore.storage.remote import FsspecStorage, configured  # noqa: PLC0415 - fsspec takes 50 ms to import

    if scheme in {"s3", "s3a"} and find_spec("botocore") and not rest.startswith("arn:"):
        from datastore.storage.s3 import S3Storage, understands  # noqa: PLC0415 - only where it is needed

        options = configured(scheme)
        if understands(options):
            return S3Storage(text, options)
    return FsspecStorage(text)


def _file_path(url: str, rest: str) -> Path:
    host, slash, path = rest.partition("/")
    if host not in {"", "localhost"} or not slash:
        raise ConfigError("a file URL has no host", url=url, hint="Write three slashes: file:///path, or a plain path.")
    return Path(unquote(f"/{path}"))


def _open_memory(url: str, rest: str) -> Storage:
    name, _, path = rest.strip("/").partition("/")
    if not name:
        raise ConfigError("the URL names nothing", url=url, hint="Write memory://NAME.")
    storage = MemoryStorage(name)
    return Subfolder(storage, path.strip("/")) if path.strip("/") else storage


class Subfolder(Storage):
    """The keys of `storage` below `prefix`, seen as a storage of their own."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._prefix = check_key(prefix)

    @override
    def __repr__(self) -> str:
        return f"Subfolder({self._storage!r}, {self._prefix!r})"

    @property
    @override
    def url(self) -> str:
        return join_url(self._storage.url, self._prefix)

    @property
    @override
    def exclusive(self) -> bool:
        return self._storage.exclusive

    @override
    def get(self, key: str) -> bytes:
        return self._storage.get(self._full(key))

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self._storage.get_ranges(self._full(key), ranges)

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        self._storage.read_into(self._full(key), start, target)

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        self._storage.put(self._full(key), *chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        self._storage.put_new(self._full(key), *chunks)

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        cut = len(self._prefix) + 1
        for found in self._storage.list(self._full(folder) if folder else self._prefix):
            yield Stat(key=found.key[cut:], size_bytes=found.size_bytes, modified=found.modified)

    @override
    def delete(self, key: str) -> None:
        self._storage.delete(self._full(key))

    @override
    def stat(self, key: str) -> Stat:
        found = self._storage.stat(self._full(key))
        return Stat(key=key, size_bytes=found.size_bytes, modified=found.modified)

    @override
    def local_path(self, key: str) -> Path | None:
        return self._storage.local_path(self._full(key))

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        return self._storage.statistics()

    @override
    def copies(self, key: str) -> Sequence[Storage]:
        return [Subfolder(copy, self._prefix) for copy in self._storage.copies(self._full(key))]

    @override
    def heal(self, key: str, is_good: Callable[[bytes], bool]) -> None:
        self._storage.heal(self._full(key), is_good)

    @override
    def clear_unfinished(self, *, before: float, dry_run: bool = False) -> Sequence[Stat]:
        return ()  # Who clears up does so at the root.

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}"
