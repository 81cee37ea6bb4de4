"""A storage some of whose keys lie elsewhere: a key that is an absolute path or a URL names a file of another place.

Such keys are read only; whoever writes, lists or removes sees this place alone, so nothing here can harm what others
own. The price is on the other side: the owner does not know who links to his files, and may remove them.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Lock

from typing_extensions import Buffer, override

from datastore.errors import ConfigError
from datastore.storage.base import Stat, Storage, check_key
from datastore.storage.resolve import open_storage
from datastore.storage.statistics import OperationStatistics, add_statistics

__all__ = ["LinkedStorage", "is_link"]

_KEY_PARTS = 3
"""`shards/ab/x.arrow`: so much of a link is taken for the key, that few storages are opened."""


def is_link(key: str) -> bool:
    """Return whether `key` names a file of another place."""
    return key.startswith("/") or "://" in key


class LinkedStorage(Storage):
    """The keys of `storage`, and links to files of any other place that `open_storage` reaches."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._others: dict[str, Storage] = {}
        self._lock = Lock()

    @override
    def __repr__(self) -> str:
        return f"LinkedStorage({self._storage!r})"

    @property
    @override
    def url(self) -> str:
        return self._storage.url

    @property
    @override
    def exclusive(self) -> bool:
        return self._storage.exclusive

    @override
    def get(self, key: str) -> bytes:
        storage, key = self._place(key)
        return storage.get(key)

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        storage, key = self._place(key)
        return storage.get_ranges(key, ranges)

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        storage, key = self._place(key)
        storage.read_into(key, start, target)

    @override
    def stat(self, key: str) -> Stat:
        storage, found = self._place(key)
        stat = storage.stat(found)
        return Stat(key=key, size_bytes=stat.size_bytes, modified=stat.modified)

    @override
    def local_path(self, key: str) -> Path | None:
        storage, key = self._place(key)
        return storage.local_path(key)

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        self._storage.put(check_key(key), *chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        self._storage.put_new(check_key(key), *chunks)

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        return self._storage.list(folder)

    @override
    def delete(self, key: str) -> None:
        self._storage.delete(check_key(key))

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        with self._lock:
            return add_statistics(storage.statistics() for storage in (self._storage, *self._others.values()))

    @override
    def copies(self, key: str) -> Sequence[Storage]:
        return (self,) if is_link(key) else self._storage.copies(key)

    @override
    def heal(self, key: str, is_good: Callable[[bytes], bool]) -> None:
        if not is_link(key):
            self._storage.heal(key, is_good)

    @override
    def clear_unfinished(self, *, before: float, dry_run: bool = False) -> Sequence[Stat]:
        return self._storage.clear_unfinished(before=before, dry_run=dry_run)

    def _place(self, key: str) -> tuple[Storage, str]:
        """Return where the bytes of `key` are, and what they are called there."""
        if not is_link(key):
            return self._storage, key
        head, path = (
            ("/", key[1:]) if key.startswith("/") else (f"{key.partition('://')[0]}://", key.partition("://")[2])
        )
        parts = path.split("/")
        cut = max(1, len(parts) - _KEY_PARTS)
        root, inner = head + "/".join(parts[:cut]), "/".join(parts[cut:])
        if not parts[0] or not inner:
            raise ConfigError("not a link to a file", key=key, hint="Write the URL of a file below a folder.")
        with self._lock:
            if root not in self._others:
                self._others[root] = open_storage(root)
            return self._others[root], inner
