"""What fsspec's file systems do by default and a storage must not: remember listings, and show half a write."""

from collections.abc import Callable
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem
from typing_extensions import override

from datastore.errors import StorageError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.retry import RetryPolicy


class RememberingFileSystem(MemoryFileSystem):
    """Remembers each listing until told to forget it, as those for FTP and many others do."""

    protocol = "remembering"
    store: dict[str, Any] = {}  # noqa: RUF012 - as in the base class
    pseudo_dirs = [""]  # noqa: RUF012
    remembered: dict[str, Any] = {}  # noqa: RUF012
    find = AbstractFileSystem.find  # by `ls`, as most have it

    @override
    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        return self.remembered.setdefault(f"{path} {detail}", super().ls(path, detail, **kwargs))

    @override
    def info(self, path: str, **kwargs: Any) -> Any:
        return self.remembered.setdefault(f"info {path}", super().info(path, **kwargs))

    @override
    def invalidate_cache(self, path: str | None = None) -> None:
        self.remembered.clear()


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    fsspec.register_implementation("remembering", RememberingFileSystem, clobber=True)


@pytest.mark.parametrize(
    "ask",
    [lambda storage: [found.size_bytes for found in storage.list()], lambda storage: [storage.stat("a/k").size_bytes]],
)
def test_listing_and_size_are_asked_for_again_each_time(ask: Callable[[FsspecStorage], list[int]]) -> None:
    storage = FsspecStorage("remembering://root")
    storage.put("a/k", b"1")
    assert ask(storage) == [1]
    storage._fs.store[storage._path("a/k")].write(b"longer")  # another process
    assert ask(storage) == [6]


def test_a_write_that_fails_halfway_leaves_the_old_value_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = FsspecStorage("remembering://halfway", policy=RetryPolicy(tries=1))
    storage.put("k", b"old")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(RememberingFileSystem, "mv", fail)
    with pytest.raises(StorageError) as caught:
        storage.put("k", b"new")
    assert caught.value.transient
    assert storage.get("k") == b"old"
    assert [name for name in storage._fs.store if "halfway" in name] == [storage._path("k")]
