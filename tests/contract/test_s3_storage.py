"""The contract, kept over s3fs against moto, a mock of S3 on loopback that honours If-None-Match."""

import logging
import uuid
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from datastore.storage.base import Storage
from datastore.storage.remote import FsspecStorage
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
        return FsspecStorage(f"s3://bucket/{uuid.uuid4().hex}", options)
