"""Keys and passwords appear nowhere: not in URLs, representations, messages, logs, nor in what is stored."""

import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from datastore.errors import StorageError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.backends.s3 import S3Storage, forget_clients
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_dataset

pytestmark = pytest.mark.s3

WRONG_KEY, WRONG_SECRET = "AKIAWRONGWRONGWRONG0", "wrong/Secret+wrongSecretWrongSecret12345"


@pytest.fixture
def keys(s3_bucket: str) -> tuple[str, str]:
    """The right key and secret, as the environment has them."""
    assert s3_bucket
    return os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]


@pytest.fixture
def wrong_environment(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An environment with keys that the server does not know."""
    import s3fs

    assert s3_bucket
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", WRONG_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRONG_SECRET)
    s3fs.S3FileSystem.clear_instance_cache()
    forget_clients()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    forget_clients()


def operations(storage: Storage) -> list[Callable[[], object]]:
    return [
        partial(storage.get, "k"),
        partial(storage.get_ranges, "k", [(0, 1)]),
        partial(storage.read_into, "k", 0, bytearray(1)),
        partial(storage.put, "k", b"x"),
        partial(storage.put_new, "k", b"x"),
        partial(storage.stat, "k"),
        partial(storage.delete, "k"),
        lambda: list(storage.list()),
    ]


def told(storage: Storage) -> str:
    """Return all that a user may come to see of a storage that refuses every operation."""
    shown = [storage.url, repr(storage)]
    for operation in operations(storage):
        with pytest.raises(StorageError, match="Check the credentials") as caught:
            operation()
        assert not caught.value.transient
        shown += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    return "\n".join(shown)


@pytest.mark.usefixtures("wrong_environment")
def test_wrong_keys_of_the_environment_are_told_apart_and_not_shown(
    s3_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        shown = told(open_storage(s3_url))
    for secret in (WRONG_KEY, WRONG_SECRET):
        assert secret not in shown + caplog.text


@pytest.mark.parametrize("kind", [S3Storage, FsspecStorage])
def test_wrong_keys_among_the_options_are_not_shown(s3_url: str, kind: type[S3Storage | FsspecStorage]) -> None:
    shown = told(kind(s3_url, {"key": WRONG_KEY, "secret": WRONG_SECRET}))
    for secret in (WRONG_KEY, WRONG_SECRET):
        assert secret not in shown


def test_keys_are_not_stored(s3_url: str, keys: tuple[str, str]) -> None:
    storage = FsspecStorage(s3_url, {"key": keys[0], "secret": keys[1]})
    make_dataset(storage, [[1, 2], [3]])
    found = [stat.key for stat in storage.list()]
    assert found
    for name in found:
        raw = storage.get(name)
        assert not any(key.encode() in raw for key in keys), name


@pytest.mark.parametrize("command", ["show {}", "verify {}", "doctor --url {}"])
def test_the_command_line_does_not_print_keys(s3_url: str, command: str) -> None:
    wrong = os.environ | {"AWS_ACCESS_KEY_ID": WRONG_KEY, "AWS_SECRET_ACCESS_KEY": WRONG_SECRET}
    program = Path(sys.executable).parent / "datastore"
    done = subprocess.run(
        [program, *command.format(s3_url).split()], env=wrong, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "access denied" in done.stderr
    for secret in (WRONG_KEY, WRONG_SECRET):
        assert secret not in done.stdout + done.stderr
