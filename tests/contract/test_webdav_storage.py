"""The contract, kept over WebDAV by a real server."""

import logging
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from typing_extensions import override

from datastore.errors import MissingError, StorageError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.base import Storage
from datastore.storage.retry import RetryPolicy
from datastore.testing.storage import StorageContract

pytest.importorskip("webdav4")
wsgidav_app = pytest.importorskip("wsgidav.wsgidav_app")
wsgi = pytest.importorskip("cheroot.wsgi")

USER, PASSWORD = "reader", "hush-hush-Password"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    logging.getLogger("wsgidav").setLevel(logging.CRITICAL)
    logging.getLogger("httpx").setLevel(logging.CRITICAL)
    app = wsgidav_app.WsgiDAVApp(
        {
            "provider_mapping": {"/": str(tmp_path_factory.mktemp("webdav"))},
            "simple_dc": {"user_mapping": {"*": {USER: {"password": PASSWORD}}}},
            "http_authenticator": {"accept_basic": True, "accept_digest": False, "default_to_digest": False},
            "verbose": 0,
            "logging": {"enable": False},
        }
    )
    served = wsgi.Server(("127.0.0.1", 0), app, numthreads=16)
    served.prepare()
    thread = threading.Thread(target=served.serve)
    thread.start()
    yield f"http://127.0.0.1:{served.bind_addr[1]}"
    served.stop()
    thread.join()


class TestWebdavStorage(StorageContract):
    rounds = 4
    large_bytes = 3 * 2**20

    @pytest.fixture
    def storage(self, server: str) -> Storage:
        return FsspecStorage(f"webdav://{uuid.uuid4().hex}", {"base_url": server, "auth": (USER, PASSWORD)})

    @override
    def test_readers_during_a_put_see_the_old_or_the_new_bytes(self, storage: Storage) -> None:
        """WebDAV removes what a move replaces before it moves (RFC 4918, 9.9.3), so for a moment there is nothing."""
        values = [bytes([number]) * (300_000 + number) for number in (1, 2)]
        storage.put("k", values[0])
        seen = set()
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(lambda: [storage.put("k", values[turn % 2]) for turn in range(8)])
            while not writing.done():
                with suppress(MissingError):
                    seen.add(storage.get("k"))
            writing.result()
        assert seen | {storage.get("k")} <= set(values)

    @override
    def test_names_may_hold_what_people_put_into_names(self, storage: Storage) -> None:
        """All but '#' and '?', which webdav4 takes for parts of the URL. No key of ours has them."""
        for key in ("two words/a+b", "100% 'quoted'", "wörter/日本語", "a=1,b=2/[x]{y}(z)", "@7~", ".hidden/.file"):
            storage.put_new(key, key.encode())
            assert storage.get(key) == key.encode()
            assert [found.key for found in storage.list()] == [key]
            storage.delete(key)


def test_a_wrong_password_is_no_reason_to_try_again(server: str) -> None:
    options = {"base_url": server, "auth": (USER, "wrong-wrong")}
    with pytest.raises(StorageError, match="access denied") as caught:
        FsspecStorage("webdav://x", options, policy=RetryPolicy(tries=2)).get("k")
    assert not caught.value.transient
    assert "wrong-wrong" not in str(caught.value)
