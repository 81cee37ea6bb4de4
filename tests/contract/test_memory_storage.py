"""The contract, kept by the memory of this process."""

import uuid

import pytest

from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.storage import StorageContract


class TestMemoryStorage(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        return MemoryStorage(uuid.uuid4().hex)
