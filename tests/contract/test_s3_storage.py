"""The contract, kept over s3fs against moto, a mock of S3 on loopback that honours If-None-Match."""

import logging
import multiprocessing
import uuid
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from datastore.errors import MissingError, StorageError
from datastore.storage.base import Storage
from datastore.storage.remote import FsspecStorage
from datastore.storage.retry import RetryPolicy
from datastore.testing.storage import StorageContract

KEYS = {"key": "AKIAIOSFODNN7EXAMPLE", "secret": "wJalrXUtnFEMIEXAMPLEKEY"}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )
    client.create_bucket(Bucket="bucket")
    yield url
    server.stop()


class TestS3Storage(StorageContract):
    rounds = 4

    @pytest.fixture
    def storage(self, endpoint: str) -> Storage:
        options = KEYS | {"endpoint_url": endpoint, "client_kwargs": {"region_name": "us-east-1"}}
        # s3fs would read more than this in several requests, which could see two versions.
        options["default_block_size"] = 50_000
        return FsspecStorage(f"s3://bucket/{uuid.uuid4().hex}", options)

    def test_a_forked_child_reads_and_writes_on_a_connection_of_its_own(self, storage: Storage) -> None:
        storage.put("from-parent", b"parent")
        child = multiprocessing.get_context("fork").Process(target=copy, args=(storage, "from-parent", "from-child"))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert storage.get("from-child") == b"parent"

    def test_what_others_write_shows_in_the_next_listing(self, storage: Storage) -> None:
        remembers = FsspecStorage(storage.url, storage._options | {"use_listings_cache": True})  # type: ignore[attr-defined]
        other = FsspecStorage(storage.url, storage._options | {"use_listings_cache": False})  # type: ignore[attr-defined]
        other.put("k1", b"x")
        assert [found.key for found in remembers.list()] == ["k1"]
        other.put("k2", b"longer")
        other.put("k1", b"longer")
        assert [found.key for found in remembers.list()] == ["k1", "k2"]
        assert remembers.stat("k1").size_bytes == 6

    def test_a_write_to_a_bucket_that_is_not_there_says_so(self, storage: Storage) -> None:
        nowhere = FsspecStorage("s3://no-such-bucket/x", storage._options)  # type: ignore[attr-defined]
        for write in (nowhere.put, nowhere.put_new):
            with pytest.raises(MissingError, match="Make the bucket"):
                write("k", b"x")
        assert list(nowhere.list()) == []


def copy(storage: Storage, source: str, target: str) -> None:
    storage.put_new(target, storage.get(source))


def test_a_server_that_does_not_answer_is_worth_another_try() -> None:
    storage = FsspecStorage("s3://bucket/x", KEYS | {"endpoint_url": "http://127.0.0.1:9"})
    for call in (lambda: storage.get("k"), lambda: storage.put_new("k", b"x")):
        with pytest.raises(StorageError, match="Could not connect") as caught:
            call()
        assert caught.value.transient
        assert storage.statistics().popitem()[1].requests == RetryPolicy().first_tries
        assert KEYS["secret"] not in str(caught.value)
