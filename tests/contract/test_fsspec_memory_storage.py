"""The contract, kept over fsspec's memory: the case of a backend that replaces in one step but cannot refuse."""

import uuid

import pytest

from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.base import Storage
from datastore.testing.storage import StorageContract


class TestFsspecMemoryStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return FsspecStorage(f"memory://{uuid.uuid4().hex}")
