"""The contract, kept over s3fs against Ceph's RADOS Gateway, from this process and from others."""

import pytest

from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.testing.storage import StorageContract

pytestmark = pytest.mark.s3


class TestRealS3Storage(StorageContract):
    between_processes = True
    rounds = 20

    @pytest.fixture
    def storage(self, s3_url: str) -> Storage:
        return open_storage(s3_url)
