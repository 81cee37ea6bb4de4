"""The contract, kept by a folder of this machine."""

from pathlib import Path

import pytest

from datastore.storage.base import Storage
from datastore.storage.local import LocalStorage
from datastore.testing.storage import StorageContract


class TestLocalStorage(StorageContract):
    between_processes = True

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "root")
