"""A secret shows nowhere, even if the server sends it back: not in errors, logs, URLs, representations nor statistics."""

import http.server
import logging
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typing_extensions import override

from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call
from datastore.errors import DatastoreError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.backends.s3 import S3Storage, forget_clients
from datastore.storage.backends.web import WebStorage
from datastore.storage.base import Storage
from datastore.storage.retry import RetryPolicy

SECRETS = [
    "AKIAMARKEDMARKED1234",
    "marked/Secret+Key/marked/Secret+Key123",
    "markedSessionToken1234",
    "markedPassword12",
]
KEY, SECRET, TOKEN, PASSWORD = SECRETS
QUICK = RetryPolicy(tries=2, first_tries=2, first_pause_s=0.0)

Operation = Callable[[Storage], object]

OPERATIONS: list[Operation] = [
    lambda storage: storage.get("k"),
    lambda storage: storage.get_ranges("k", [(0, 1), (900_000, 900_001)]),
    lambda storage: storage.read_into("k", 0, bytearray(1)),
    lambda storage: storage.put("k", b"x"),
    lambda storage: storage.put_new("k", b"x"),
    lambda storage: storage.stat("k"),
    lambda storage: storage.delete("k"),
    lambda storage: list(storage.list()),
    lambda storage: list(storage.clear_unfinished(before=0.0)),
]


class Echo(http.server.BaseHTTPRequestHandler):
    """Refuses everything, and says in the error whatever it was sent, and all secrets besides."""

    protocol_version = "HTTP/1.1"
    status: ClassVar[int] = 403

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass

    def refuse(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        told = " ".join([self.path, str(self.headers), *SECRETS]).replace("<", "").replace("&", " ").replace("\n", " ")
        body = f"<Error><Code>Because</Code><Message>{told}</Message></Error>".encode()
        self.send_response(self.status, "because")
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = refuse  # noqa: N815 - http.server calls them by these names


class Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@pytest.fixture(scope="module")
def echo() -> Iterator[str]:
    with Quiet(("127.0.0.1", 0), Echo) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def from_options(kind: type[S3Storage | FsspecStorage], at: str) -> Storage:
    options = {"key": KEY, "secret": SECRET, "token": TOKEN, "endpoint_url": f"http://{at}"}
    return kind("s3://bucket/x", options, policy=QUICK)


def from_client_options(kind: type[S3Storage | FsspecStorage], at: str) -> Storage:
    login = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET, "aws_session_token": TOKEN}
    return kind("s3://bucket/x", {"client_kwargs": login | {"endpoint_url": f"http://{at}"}}, policy=QUICK)


def from_url(at: str) -> Storage:
    return WebStorage(f"http://{KEY}:{PASSWORD}@{at}/x?sig={SECRET}&token={TOKEN}", policy=QUICK)


MAKERS: dict[str, Callable[[str], Storage]] = {
    "s3": partial(from_options, S3Storage),
    "s3 through s3fs": partial(from_options, FsspecStorage),
    "s3, client_kwargs": partial(from_client_options, S3Storage),
    "web": from_url,
}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500, 503])
@pytest.mark.parametrize("make", MAKERS.values(), ids=list(MAKERS))
def test_what_a_server_sends_back_is_not_shown(
    echo: str, make: Callable[[str], Storage], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    Echo.status = status
    storage = make(echo)
    shown = [storage.url, repr(storage)]
    with caplog.at_level(logging.INFO):
        for operation in OPERATIONS:
            try:
                operation(storage)
            except DatastoreError as error:
                shown += [str(error), repr(error), "".join(traceback.format_exception(error))]
    assert len(shown) > 10, "the operations were to fail"
    shown += [str(storage.statistics()), caplog.text]
    known = SECRETS if isinstance(storage, WebStorage) else (KEY, SECRET, TOKEN)
    for secret in known:
        assert secret not in "\n".join(shown)


def test_keys_of_the_environment_are_not_shown(
    echo: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    Echo.status = 400
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{echo}")
    forget_clients()
    with caplog.at_level(logging.INFO):
        for command in ("show s3://bucket/x", "verify s3://bucket/x", "doctor --url s3://bucket/x", "ls s3://bucket/x"):
            assert call(cli, command.split(), CliSession()) == 1
            assert call(cli, ["--debug", *command.split()], CliSession()) == 1
    forget_clients()
    told = capsys.readouterr()
    assert told.err.strip()
    for secret in (KEY, SECRET, TOKEN):
        assert secret not in told.out + told.err + caplog.text


def test_what_is_stored_where_a_secret_leads_does_not_hold_it(echo: str, tmp_path: Path) -> None:
    Echo.status = 403
    url = f"http://{KEY}:{PASSWORD}@{echo}/source?sig={SECRET}"
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.txt").write_text("text")
    target = tmp_path / "set"
    assert call(cli, ["ingest", url, str(tmp_path / "src"), "--to", str(target)], CliSession()) == 1
    assert call(cli, ["ingest", str(tmp_path / "src"), "--to", str(target)], CliSession()) == 0
    written = [path for path in target.rglob("*") if path.is_file()]
    assert written
    for path in written:
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS), path
