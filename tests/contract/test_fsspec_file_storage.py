"""The contract, kept over fsspec's local files: the case of a backend that only moves files into place."""

from pathlib import Path

import pytest

from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.base import Storage
from datastore.testing.storage import StorageContract


class TestFsspecFileStorage(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return FsspecStorage(f"file://{tmp_path}/root")
