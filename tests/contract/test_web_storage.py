"""The contract of what can only be read, kept over HTTP by servers that know ranges and by one that does not."""

import http.server
import re
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typing_extensions import override

from datastore.dataset.durability.verify import verify
from datastore.dataset.snapshot import open_dataset
from datastore.errors import MissingError, StorageError
from datastore.loader.loader import Loader
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.web import WebStorage
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.retry import RetryPolicy
from datastore.testing.examples import make_dataset
from datastore.testing.read_only import CONTENT, ReadOnlyContract


class Files(http.server.SimpleHTTPRequestHandler):
    """Python's own file server: no ranges, folders as pages, a folder without its slash redirected."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[tuple[str, str, str]]] = []

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass

    @override
    def do_GET(self) -> None:
        self.asked.append((self.command, self.path, self.headers.get("Range", "")))
        super().do_GET()


class Ranges(Files):
    """And with ranges."""

    @override
    def do_GET(self) -> None:
        self.asked.append((self.command, self.path, self.headers.get("Range", "")))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            http.server.SimpleHTTPRequestHandler.do_GET(self)
            return
        data, start, stop = path.read_bytes(), int(wanted[1]), int(wanted[2]) + 1
        if start >= len(data):
            self.send_error(416)
            return
        part = data[start:stop]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


def serve(folder: Path, kind: type[Files]) -> Iterator[str]:
    with Quiet(("127.0.0.1", 0), partial(kind, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    storage = LocalStorage(folder / "content")
    for key, value in CONTENT.items():
        storage.put(key, value)
    make_dataset(folder / "set", [[500, 300], [800]])
    make_dataset(folder / "set", [[40]], name="more")
    return folder


@pytest.fixture(scope="module")
def ranges(folder: Path) -> Iterator[str]:
    yield from serve(folder, Ranges)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Iterator[str]:
    yield from serve(folder, Files)


class TestWebStorage(ReadOnlyContract):
    lists = False

    @pytest.fixture
    def storage(self, ranges: str) -> Storage:
        return open_storage(f"{ranges}/content")


class TestWebStorageWithoutRanges(ReadOnlyContract):
    lists = False

    @pytest.fixture
    def storage(self, whole: str) -> Storage:
        return open_storage(f"{whole}/content")


@pytest.mark.parametrize("server", ["ranges", "whole"])
def test_a_dataset_opens_from_a_web_server_and_its_loader_streams(
    server: str, folder: Path, request: pytest.FixtureRequest
) -> None:
    base = request.getfixturevalue(server)
    there, here = open_dataset(f"{base}/set"), open_dataset(folder / "set")
    assert (there.version, there.totals, there.uuid) == (here.version, here.totals, here.uuid)
    assert verify(there).ok
    with (
        Loader(there, seq_len=16, global_batch=4, seed=1) as far,
        Loader(here, seq_len=16, global_batch=4, seed=1) as near,
    ):
        for _ in range(20):
            assert next(far).fingerprint() == next(near).fingerprint()


def test_where_there_is_no_dataset_that_is_said_without_a_listing(ranges: str) -> None:
    with pytest.raises(MissingError, match="no dataset there"):
        open_dataset(f"{ranges}/nothing")


def test_a_block_of_a_large_file_is_read_without_the_rest(ranges: str) -> None:
    Files.asked.clear()
    storage = open_storage(f"{ranges}/content")
    storage.read_into("large", 1000, bytearray(50))
    assert Files.asked == [("GET", "/content/large", "bytes=1000-1049")]


def test_a_query_goes_with_each_request_and_is_not_shown(ranges: str) -> None:
    Files.asked.clear()
    storage = open_storage(f"{ranges}/content?sig=hush-hush")
    assert storage.get("a/k") == CONTENT["a/k"]
    assert Files.asked[0][1] == "/content/a/k?sig=hush-hush"
    with pytest.raises(MissingError) as caught:
        storage.get("nothing")
    assert "hush" not in f"{storage.url}{storage!r}{caught.value}"


class Moved(Files):
    """Sends everyone to another server, and notes who asked there with which login."""

    target: ClassVar[str]
    logins: ClassVar[list[str]] = []

    @override
    def do_GET(self) -> None:
        self.logins.append(self.headers.get("Authorization", ""))
        self.send_response(302)
        self.send_header("Location", self.target + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - http.server calls it by this name


def test_a_redirect_is_followed_and_the_login_stays_behind(
    folder: Path, ranges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    get = Ranges.do_GET
    monkeypatch.setattr(
        Ranges, "do_GET", lambda handler: (seen.append(handler.headers.get("Authorization")), get(handler))[1]
    )
    Moved.target = ranges
    for base in serve(folder, Moved):
        storage = open_storage(f"{base.replace('://', '://me:hush-hush@')}/content")
        assert storage.get_ranges("a/k", [(2, 5)]) == [b"234"]
        assert "hush" not in f"{storage.url}{storage!r}"
    assert Moved.logins == ["Basic bWU6aHVzaC1odXNo"]
    assert seen == [None]


class CutsShort(Ranges):
    """Every other answer ends before its body does."""

    turn = 0

    @override
    def do_GET(self) -> None:
        CutsShort.turn += 1
        if CutsShort.turn % 2:
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("Content-Length", "10")
            self.send_header("Content-Range", "bytes 0-9/10")
            self.end_headers()
            self.wfile.write(b"012")
            self.close_connection = True
        else:
            super().do_GET()


def test_an_answer_that_is_cut_short_is_asked_for_again(folder: Path) -> None:
    for base in serve(folder, CutsShort):
        storage = WebStorage(f"{base}/content", policy=RetryPolicy(first_pause_s=0.001))
        assert storage.get("a/k") == CONTENT["a/k"]
        target = bytearray(10)
        storage.read_into("a/k", 0, target)
        assert target == CONTENT["a/k"]
        assert {name: found.retries for name, found in storage.statistics().items()} == {"get": 1, "read_into": 1}


def test_what_the_server_refuses_is_said(folder: Path) -> None:
    class Refuses(Files):
        @override
        def do_GET(self) -> None:
            self.send_error(403)

    for base in serve(folder, Refuses):
        with pytest.raises(StorageError, match="access denied") as caught:
            open_storage(base).get("k")
        assert not caught.value.transient
