"""The contract, kept over s3fs against Ceph's RADOS Gateway, from this process and from others."""

import pytest

from datastore.errors import ConflictError
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

    def test_put_new_of_what_is_otherwise_sent_in_parts_refuses_a_second_write(self, storage: Storage) -> None:
        # s3fs sends 100 MiB and more in parts, and Ceph 16.2 ignores If-None-Match when they are put together.
        size = 100 * 2**20
        storage.put_new("k", b"1" * size)
        with pytest.raises(ConflictError):
            storage.put_new("k", b"2" * size)
        assert storage.get_ranges("k", [(0, 1), (size - 1, size)]) == [b"1", b"1"]
