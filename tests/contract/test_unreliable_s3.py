"""The contract, kept on an unreliable gateway: busy, broken, silent, cut short - and an answer lost after the deed.

Between the storage and a mock of S3 stands a gateway that spoils requests in turn. Whatever it does, each promise holds, and
nobody above notices.
"""

import http.client
import itertools
import logging
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import boto3
import pytest
from moto.server import ThreadedMotoServer
from typing_extensions import override

from datastore.errors import StorageError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.backends.s3 import S3Storage
from datastore.storage.base import Storage
from datastore.storage.retry import RetryPolicy
from datastore.storage.statistics import total_statistics
from datastore.testing.storage import StorageContract

KEYS = {"key": "AKIAIOSFODNN7EXAMPLE", "secret": "wJalrXUtnFEMIEXAMPLEKEY"}
QUICK = RetryPolicy(first_pause_s=0.001, longest_pause_s=0.01, tries=30)

Spoil = Callable[["Gateway", bytes], None]


class Gateway(BaseHTTPRequestHandler):
    """Passes requests on to `target`; every third one that `spoils` has a turn for is spoiled."""

    protocol_version = "HTTP/1.1"
    target: ClassVar[str]
    spoils: ClassVar[Iterator[Spoil | None]]

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        spoil = next(type(self).spoils)
        if spoil is not None:
            spoil(self, body)
            return
        self.answer(*self.pass_on(body))

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815 - http.server calls them by these names

    def pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(type(self).target, timeout=10)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], body: bytes, *, cut: int = 0) -> None:
        dropped = {"transfer-encoding", "connection", "date", "server"}
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in dropped and not (name.lower() == "content-length" and body):
                self.send_header(name, value)
        if body:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) - cut])

    def fail(self, status: int, code: str) -> None:
        error = f"<Error><Code>{code}</Code><Message>later</Message></Error>".encode()
        self.answer(status, [("Content-Type", "application/xml")], error)

    def hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def busy(gateway: Gateway, _: bytes) -> None:
    gateway.fail(503, "SlowDown")


def too_many(gateway: Gateway, _: bytes) -> None:
    gateway.fail(429, "TooManyRequests")


def broken(gateway: Gateway, _: bytes) -> None:
    gateway.fail(500, "InternalError")


def reset(gateway: Gateway, _: bytes) -> None:
    gateway.hang_up()


def lost_answer(gateway: Gateway, body: bytes) -> None:
    gateway.pass_on(body)
    gateway.hang_up()


def broken_after_the_deed(gateway: Gateway, body: bytes) -> None:
    gateway.pass_on(body)
    gateway.fail(500, "InternalError")


def cut_short(gateway: Gateway, body: bytes) -> None:
    status, headers, answer = gateway.pass_on(body)
    gateway.answer(status, headers, answer, cut=1)
    gateway.hang_up()


SPOILS = [busy, lost_answer, cut_short, broken, reset, too_many, broken_after_the_deed]


class Turns:
    """An iterator that threads may share."""

    def __init__(self, turns: Iterator[Spoil | None]) -> None:
        self.turns, self.lock = turns, threading.Lock()

    def __iter__(self) -> "Turns":
        return self

    def __next__(self) -> Spoil | None:
        with self.lock:
            return next(self.turns)


@pytest.fixture(scope="module")
def mock() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{host}:{port}",
        region_name="us-east-1",
        aws_access_key_id="a",
        aws_secret_access_key="b",
    )
    client.create_bucket(Bucket="bucket")
    yield f"{host}:{port}"
    server.stop()


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@pytest.fixture
def gateway(mock: str) -> Iterator[type[Gateway]]:
    """A gateway of its own for each test: `url` leads to it, `spoils` says what it does."""

    class Mine(Gateway):
        target = mock
        spoils = Turns(itertools.chain.from_iterable((None, None, spoil) for spoil in itertools.cycle(SPOILS)))

    with QuietServer(("127.0.0.1", 0), Mine) as server:
        Mine.url = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield Mine
        server.shutdown()
        thread.join()


def options_for(gateway: type[Gateway]) -> dict[str, Any]:
    return KEYS | {"endpoint_url": gateway.url, "client_kwargs": {"region_name": "us-east-1"}}  # type: ignore[attr-defined]


class TestUnreliableS3(StorageContract):
    rounds = 2
    large_bytes = 2**19

    @pytest.fixture
    def storage(self, gateway: type[Gateway]) -> Iterator[Storage]:
        storage = S3Storage(f"s3://bucket/{uuid.uuid4().hex}", options_for(gateway), policy=QUICK)
        yield storage
        total = total_statistics(storage.statistics())
        if total.requests > 2:
            assert total.retries > 0


@pytest.mark.slow
class TestUnreliableS3ThroughS3fs(StorageContract):
    rounds = 2
    large_bytes = 2**19

    @pytest.fixture
    def storage(self, gateway: type[Gateway]) -> Storage:
        return FsspecStorage(f"s3://bucket/{uuid.uuid4().hex}", options_for(gateway), policy=QUICK)


KINDS = pytest.mark.parametrize("kind", [S3Storage, FsspecStorage])


@KINDS
@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId"])
def test_credentials_are_never_tried_again(
    gateway: type[Gateway], kind: type[S3Storage | FsspecStorage], code: str
) -> None:
    asked = []

    def deny(gateway: Gateway, _: bytes) -> None:
        asked.append(gateway.command)
        gateway.fail(400 if code == "ExpiredToken" else 403, code)

    gateway.spoils = itertools.repeat(deny)
    storage = kind("s3://bucket/denied", options_for(gateway), policy=QUICK)
    for number, call in enumerate((lambda: storage.get("k"), lambda: storage.put_new("k", b"x")), 1):
        with pytest.raises(StorageError, match="expired" if code == "ExpiredToken" else "access denied") as caught:
            call()
        assert not caught.value.transient
        assert len(asked) == number


@KINDS
def test_what_the_server_counts_is_what_the_statistics_say(
    gateway: type[Gateway], kind: type[S3Storage | FsspecStorage]
) -> None:
    seen = []

    def note(gateway: Gateway, body: bytes) -> None:
        seen.append(gateway.command)
        gateway.answer(*gateway.pass_on(body))

    def note_and_fail(gateway: Gateway, _: bytes) -> None:
        seen.append(gateway.command)
        gateway.fail(503, "SlowDown")

    gateway.spoils = itertools.cycle([note_and_fail, note_and_fail, note])
    storage = kind(f"s3://bucket/{uuid.uuid4().hex}", options_for(gateway), policy=QUICK)
    storage.put("k", b"12345")
    storage.put_new("n", b"123")
    assert storage.get("k") == b"12345"
    storage.delete("n")
    counted = storage.statistics()
    assert {name: (found.requests, found.retries) for name, found in counted.items()} == dict.fromkeys(
        ("put", "put_new", "get", "delete"), (3, 2)
    )
    assert len(seen) == 12
