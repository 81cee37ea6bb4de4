"""The contract, kept our own way and over s3fs against moto, a mock of S3 on loopback that honours If-None-Match."""

import faulthandler
import logging
import multiprocessing
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar

import boto3
import fsspec
import pytest
from moto.server import ThreadedMotoServer

from datastore.errors import MissingError, StorageError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.backends.s3 import S3Storage, understands
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
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
    kind: ClassVar[type[S3Storage | FsspecStorage]] = S3Storage

    @pytest.fixture
    def options(self, endpoint: str) -> dict[str, Any]:
        return KEYS | {"endpoint_url": endpoint, "client_kwargs": {"region_name": "us-east-1"}}

    @pytest.fixture
    def storage(self, options: dict[str, Any]) -> Storage:
        return self.kind(f"s3://bucket/{uuid.uuid4().hex}", options)

    @pytest.mark.slow  # The server runs in threads of the parent: a fork of those hung once under load.
    def test_a_forked_child_reads_and_writes_on_a_connection_of_its_own(self, storage: Storage) -> None:
        storage.put("from-parent", b"parent")
        child = multiprocessing.get_context("fork").Process(target=copy, args=(storage, "from-parent", "from-child"))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        assert storage.get("from-child") == b"parent"

    def test_a_write_to_a_bucket_that_is_not_there_says_so(self, options: dict[str, Any]) -> None:
        nowhere = self.kind("s3://no-such-bucket/x", options)
        for write in (nowhere.put, nowhere.put_new):
            with pytest.raises(MissingError, match="Make the bucket"):
                write("k", b"x")
        assert list(nowhere.list()) == []

    def test_a_server_that_does_not_answer_is_worth_few_more_tries(self) -> None:
        for operation in (lambda storage: storage.get("k"), lambda storage: storage.put_new("k", b"x")):
            storage = self.kind("s3://bucket/x", KEYS | {"endpoint_url": "http://127.0.0.1:9"})
            with pytest.raises(StorageError, match="Could not connect") as caught:
                operation(storage)
            assert caught.value.transient
            assert storage.statistics().popitem()[1].requests == RetryPolicy().first_tries
            assert KEYS["secret"] not in str(caught.value)


class TestS3StorageThroughS3fs(TestS3Storage):
    kind = FsspecStorage

    @pytest.fixture
    def storage(self, options: dict[str, Any]) -> Storage:
        # s3fs would read more than this in several requests, which could see two versions.
        return FsspecStorage(f"s3://bucket/{uuid.uuid4().hex}", options | {"default_block_size": 50_000})

    def test_what_others_write_shows_in_the_next_listing(self, storage: FsspecStorage) -> None:
        remembers = FsspecStorage(storage.url, storage._options | {"use_listings_cache": True})
        other = FsspecStorage(storage.url, storage._options | {"use_listings_cache": False})
        other.put("k1", b"x")
        assert [found.key for found in remembers.list()] == ["k1"]
        other.put("k2", b"longer")
        other.put("k1", b"longer")
        assert [found.key for found in remembers.list()] == ["k1", "k2"]
        assert remembers.stat("k1").size_bytes == 6


def copy(storage: Storage, source: str, target: str) -> None:
    faulthandler.dump_traceback_later(25, exit=True)
    storage.put_new(target, storage.get(source))


def test_ranges_that_lie_close_are_one_request(endpoint: str) -> None:
    storage = S3Storage("s3://bucket/ranges", KEYS | {"endpoint_url": endpoint})
    storage.put("k", bytes(10**6))
    storage.get_ranges("k", [(0, 10), (10, 20), (50_000, 50_010), (900_000, 900_001)])
    assert storage.statistics()["get_ranges"].requests == 2


def test_a_long_listing_comes_in_pages(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    storage = S3Storage("s3://bucket/many", KEYS | {"endpoint_url": endpoint})
    keys = [f"{number:02}" for number in range(25)]
    for key in keys:
        storage.put(key, b"x")
    ask = storage._ask
    monkeypatch.setattr(storage, "_ask", lambda *names, **arguments: ask(*names, **arguments, MaxKeys=10))
    assert [found.key for found in storage.list()] == keys
    assert storage.statistics()["list"].requests == 3


def test_what_fsspec_is_configured_for_counts_here_too(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", KEYS | {"endpoint_url": endpoint})
    storage = open_storage("s3://bucket/configured")
    assert isinstance(storage, S3Storage)
    storage.put("k", b"x")
    monkeypatch.setitem(fsspec.config.conf, "s3", KEYS | {"endpoint_url": endpoint, "requester_pays": True})
    other = open_storage("s3://bucket/configured")
    assert isinstance(other, FsspecStorage)
    assert other.get("k") == b"x"


@pytest.mark.parametrize("options", [{}, {"profile": "p", "anon": False}, {"client_kwargs": {}, "key": "k"}])
def test_a_client_is_made_for_the_options_that_botocore_knows(options: dict[str, Any]) -> None:
    assert understands(options)


@pytest.mark.parametrize("option", ["requester_pays", "s3_additional_kwargs", "version_aware", "session"])
def test_what_only_s3fs_knows_is_left_to_it(option: str) -> None:
    assert not understands({option: True})
