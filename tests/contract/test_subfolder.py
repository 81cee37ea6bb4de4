"""The contract, kept by a storage seen through a prefix."""

from pathlib import Path

import pytest

from datastore.storage.backends.local import LocalStorage
from datastore.storage.base import Storage
from datastore.storage.wrappers import Subfolder
from datastore.testing.storage import StorageContract


class TestSubfolder(StorageContract):
    between_processes = True

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        outer = LocalStorage(tmp_path)
        outer.put("inner.txt", b"a neighbour whose name begins alike")
        outer.put("other/k", b"a neighbour")
        return Subfolder(outer, "inner")
