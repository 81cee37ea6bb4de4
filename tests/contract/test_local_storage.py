"""The contract, kept by a folder of this machine - also where its file system has no hard links."""

import errno
import os
from pathlib import Path

import pytest

from datastore.storage.backends import local
from datastore.storage.backends import syscalls as exclusive
from datastore.storage.backends.local import LocalStorage
from datastore.storage.base import Storage
from datastore.testing.storage import StorageContract


def refuse(*_: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


class TestLocalStorage(StorageContract):
    between_processes = True

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "root")


@pytest.mark.skipif(exclusive._renameat2() is None, reason="renameat2(2) is Linux's")
class TestLocalStorageWithoutLinks(StorageContract):
    """FAT and some FUSE file systems: the name is given by renameat2(RENAME_NOREPLACE)."""

    @pytest.fixture
    def storage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
        monkeypatch.setattr(local, "_ANONYMOUS", False)  # A file without a name can get one by a link only.
        monkeypatch.setattr(os, "link", refuse)
        return LocalStorage(tmp_path / "root")


class TestLocalStorageWithNoExclusiveStep(StorageContract):
    """Neither verb: it keeps all other promises, and says that it cannot keep this one."""

    @pytest.fixture
    def storage(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
        monkeypatch.setattr(local, "_ANONYMOUS", False)  # A file without a name can get one by a link only.
        monkeypatch.setattr(os, "link", refuse)
        monkeypatch.setattr(exclusive, "_renameat2", lambda: None)
        storage = LocalStorage(tmp_path / "root")
        storage.put_new("finds-out", b"x")
        storage.delete("finds-out")
        assert not storage.exclusive
        return storage
