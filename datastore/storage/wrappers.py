"""Storages over another one: a base that passes everything on, the keys below a prefix, and links to files of other places.

A wrapper of your own inherits from `WrappedStorage` and overrides what it changes.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from threading import Lock

from typing_extensions import Buffer, override

from datastore.errors import ConfigError
from datastore.storage.base import Root, Stat, Storage, check_key
from datastore.storage.statistics import OperationStatistics, add_statistics
from datastore.storage.urls import join_url
from datastore.threads import in_thread

__all__ = ["LaterPuts", "LinkedStorage", "RoutedReads", "Subfolder", "WrappedStorage", "is_link"]


class RoutedReads(Storage):
    """Reading where `_place` says that the bytes of a key are."""

    @override
    def get(self, key: str) -> bytes:
        storage, name = self._place(key)
        return storage.get(name)

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        storage, name = self._place(key)
        return storage.get_ranges(name, ranges)

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        storage, name = self._place(key)
        storage.read_into(name, start, target)

    @override
    def stat(self, key: str) -> Stat:
        storage, name = self._place(key)
        found = storage.stat(name)
        return Stat(key=key, size_bytes=found.size_bytes, modified=found.modified)

    @override
    def local_path(self, key: str) -> Path | None:
        storage, name = self._place(key)
        return storage.local_path(name)

    @override
    def heal(self, key: str, is_good: Callable[[bytes], bool]) -> None:
        storage, name = self._place(key)
        storage.heal(name, is_good)

    @abstractmethod
    def _place(self, key: str) -> tuple[Storage, str]:
        """Return where the bytes of `key` are, and what they are called there."""


class WrappedStorage(RoutedReads):
    """The storage `inner`, unchanged: every member is passed on.

    A key goes through `_place`, which says where its bytes are and what they are called there; by default, here and the
    same. `list` and `copies` answer in the keys of `inner`: who changes keys overrides them, too.
    """

    def __init__(self, inner: Storage) -> None:
        self.inner = inner

    @override
    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @property
    @override
    def url(self) -> str:
        return self.inner.url

    @property
    @override
    def exclusive(self) -> bool:
        return self.inner.exclusive

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        storage, name = self._place(key)
        storage.put(name, *chunks)

    @override
    def put_hint(self, key: str, *chunks: Buffer) -> None:
        storage, name = self._place(key)
        storage.put_hint(name, *chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        storage, name = self._place(key)
        storage.put_new(name, *chunks)

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        return self.inner.list(folder)

    @override
    def delete(self, key: str) -> None:
        storage, name = self._place(key)
        storage.delete(name)

    @override
    def adopt(self, key: str, path: Path) -> bool:
        storage, name = self._place(key)
        return storage.adopt(name, path)

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        return self.inner.statistics()

    @override
    def copies(self, key: str) -> Sequence[Storage]:
        storage, name = self._place(key)
        return storage.copies(name)

    @override
    def clear_unfinished(self, *, before: float, dry_run: bool = False) -> Sequence[Stat]:
        return self.inner.clear_unfinished(before=before, dry_run=dry_run)

    @override
    def roots(self) -> Sequence[Root]:
        return self.inner.roots()

    @override
    def homes(self, key: str) -> Sequence[Root]:
        storage, name = self._place(key)
        return storage.homes(name)

    @override
    def lost(self) -> Sequence[str]:
        return self.inner.lost()

    @override
    def behind(self) -> Collection[str]:
        return self.inner.behind()

    @override
    def _place(self, key: str) -> tuple[Storage, str]:
        return self.inner, key


class Subfolder(WrappedStorage):
    """The keys of `inner` below `prefix`, seen as a storage of their own."""

    def __init__(self, inner: Storage, prefix: str) -> None:
        super().__init__(inner)
        self._prefix = check_key(prefix)

    @override
    def __repr__(self) -> str:
        return f"Subfolder({self.inner!r}, {self._prefix!r})"

    @property
    @override
    def url(self) -> str:
        return join_url(self.inner.url, self._prefix)

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        cut = len(self._prefix) + 1
        for found in self.inner.list(self._place(folder)[1] if folder else self._prefix):
            yield Stat(key=found.key[cut:], size_bytes=found.size_bytes, modified=found.modified)

    @override
    def copies(self, key: str) -> Sequence[Storage]:
        return [Subfolder(copy, self._prefix) for copy in super().copies(key)]

    @override
    def clear_unfinished(self, *, before: float, dry_run: bool = False) -> Sequence[Stat]:
        return ()  # Who clears up does so at the root.

    @override
    def roots(self) -> Sequence[Root]:
        return [self._below(root) for root in super().roots()]

    @override
    def homes(self, key: str) -> Sequence[Root]:
        return [self._below(root) for root in super().homes(key)]

    def _below(self, root: Root) -> Root:
        return Root(root.id, Subfolder(root.storage, self._prefix))

    @override
    def _place(self, key: str) -> tuple[Storage, str]:
        return self.inner, f"{self._prefix}/{check_key(key)}"


_KEY_PARTS = 3
"""`shards/ab/x.arrow`: so much of a link is taken for the key, that few storages are opened."""


def is_link(key: str) -> bool:
    """Return whether `key` names a file of another place: it is an absolute path or a URL."""
    return key.startswith("/") or "://" in key


class LaterPuts(WrappedStorage):
    """What is put into `inner` is on its way when `put` returns, and there when `settle` does: several at once.

    For the last files before something that names them: what a flush waits for, the next one need not wait for again.
    """

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner)
        self._begun: list[Future[None]] = []

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        self._begun.append(in_thread(lambda: self.inner.put(key, *chunks), name="put"))

    def settle(self) -> None:
        """Wait for all that was put.

        Raises:
            StorageError: one was not stored, as `put`; the others are, or are not.
        """
        for future in self._begun:
            future.exception()
        for future in self._begun:
            future.result()


class LinkedStorage(WrappedStorage):
    """The keys of `inner`, and links to files of any other place, which `open_other` opens by the URL of its root.

    Links are read only; whoever writes, lists or removes sees this place alone, so nothing here can harm what others
    own. The price is on the other side: the owner does not know who links to their files, and may remove them.
    """

    def __init__(self, inner: Storage, open_other: Callable[[str], Storage]) -> None:
        super().__init__(inner)
        self._open_other = open_other
        self._others: dict[str, Storage] = {}
        self._lock = Lock()

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        self.inner.put(check_key(key), *chunks)

    @override
    def put_hint(self, key: str, *chunks: Buffer) -> None:
        self.inner.put_hint(check_key(key), *chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        self.inner.put_new(check_key(key), *chunks)

    @override
    def delete(self, key: str) -> None:
        self.inner.delete(check_key(key))

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        with self._lock:
            return add_statistics(storage.statistics() for storage in (self.inner, *self._others.values()))

    @override
    def copies(self, key: str) -> Sequence[Storage]:
        return (self,) if is_link(key) else super().copies(key)

    @override
    def heal(self, key: str, is_good: Callable[[bytes], bool]) -> None:
        if not is_link(key):
            super().heal(key, is_good)

    @override
    def _place(self, key: str) -> tuple[Storage, str]:
        if not is_link(key):
            return self.inner, key
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
                self._others[root] = self._open_other(root)
            return self._others[root], inner
