"""The contract, kept over SFTP by a real server: the case of a far file system that can only move files into place."""

import asyncio
import gc
import logging
import threading
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.snapshot import open_dataset
from datastore.errors import StorageError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.retry import RetryPolicy
from datastore.testing.examples import make_dataset
from datastore.testing.storage import StorageContract

asyncssh = pytest.importorskip("asyncssh")
pytest.importorskip("paramiko")

USER, PASSWORD = "reader", "hush-hush-Password"

pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")


class OneUser(asyncssh.SSHServer):  # type: ignore[misc]
    connections: ClassVar[list[Any]] = []

    def connection_made(self, conn: Any) -> None:
        self.connections.append(conn)

    def begin_auth(self, _: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, PASSWORD)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The host and port of a server whose root is an empty folder."""
    root = tmp_path_factory.mktemp("sftp")
    logging.getLogger("asyncssh").setLevel(logging.CRITICAL)
    logging.getLogger("paramiko").setLevel(logging.CRITICAL)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def listen() -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=OneUser,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(root).encode()),
        )

    acceptor = asyncio.run_coroutine_threadsafe(listen(), loop).result(30)
    yield f"127.0.0.1:{acceptor.get_port()}"

    async def end() -> None:
        acceptor.close()
        gc.collect()  # Storages hang up when nobody refers to them.
        for connection in list(OneUser.connections):
            connection.abort()
            await connection.wait_closed()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result(30)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


class TestSftpStorage(StorageContract):
    rounds = 4
    large_bytes = 2**19

    @pytest.fixture
    def storage(self, server: str) -> Storage:
        return open_storage(f"sftp://{USER}:{PASSWORD}@{server}/{uuid.uuid4().hex}")


def test_a_dataset_lives_there(server: str) -> None:
    url = f"sftp://{USER}:{PASSWORD}@{server}/set"
    made = make_dataset(url, [[500, 300], [800]])
    assert not made.info.exclusive
    assert open_dataset(url).totals == made.totals
    assert verify(open_dataset(url)).ok
    for found in made.storage.list():
        assert PASSWORD.encode() not in made.storage.get(found.key)


def test_a_wrong_password_is_no_reason_to_try_again(server: str) -> None:
    with pytest.raises(StorageError, match="access denied") as caught:
        FsspecStorage(f"sftp://{USER}:wrong-wrong@{server}/x", policy=RetryPolicy(tries=2)).get("k")
    assert not caught.value.transient
    assert "wrong-wrong" not in str(caught.value)
