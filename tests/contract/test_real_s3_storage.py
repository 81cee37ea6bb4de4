"""The contract, kept against Ceph's RADOS Gateway, from this process and from others: our own way, and s3fs's."""

import pytest

from datastore.errors import ConflictError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.backends.s3 import S3Storage
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.testing.storage import StorageContract

pytestmark = pytest.mark.s3


class TestRealS3Storage(StorageContract):
    between_processes = True
    rounds = 20

    @pytest.fixture
    def storage(self, s3_url: str) -> Storage:
        found = open_storage(s3_url)
        assert isinstance(found, S3Storage)
        return found

    def test_put_new_of_what_is_otherwise_sent_in_parts_refuses_a_second_write(self, storage: Storage) -> None:
        # s3fs sends 100 MiB and more in parts, we what put writes, and Ceph 16.2 ignores If-None-Match when they are put together.
        size = 100 * 2**20
        storage.put_new("k", b"1" * size)
        with pytest.raises(ConflictError):
            storage.put_new("k", b"2" * size)
        assert storage.get_ranges("k", [(0, 1), (size - 1, size)]) == [b"1", b"1"]


class TestRealS3StorageThroughS3fs(TestRealS3Storage):
    """Where botocore alone is not enough: options that only s3fs knows."""

    between_processes = False

    @pytest.fixture
    def storage(self, s3_url: str) -> Storage:
        return FsspecStorage(s3_url)


def test_a_value_that_is_sent_in_parts_comes_back_unharmed(s3_url: str) -> None:
    storage = open_storage(s3_url)
    block = bytes(range(251)) * (2**20 // 251)
    storage.put("k", *[block] * 150)
    assert storage.get("k") == block * 150
    assert storage.statistics()["put"].requests > 3
