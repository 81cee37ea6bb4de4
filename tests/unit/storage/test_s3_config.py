"""What S3 clients are told: the same by our own and by s3fs's, and by the user before us."""

from typing import Any

import fsspec.config
import pytest

pytest.importorskip("s3fs")

from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.backends.s3 import s3_client

LOGIN = {"key": "key", "secret": "secret", "client_kwargs": {"region_name": "us-east-1"}}

SETTINGS = ("response_checksum_validation", "retries", "max_pool_connections", "signature_version")


def told(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS}


def config_of_s3fs(**options: Any) -> dict[str, Any]:
    fs = FsspecStorage("s3://bucket/set", {**LOGIN, **options})._connection.fs
    fs.connect()
    return told(fs.s3.meta.config)


@pytest.mark.parametrize("scheme", ["s3", "s3a"])
def test_a_client_of_s3fs_asks_for_no_checksum_that_it_was_not_told_to_check(scheme: str) -> None:
    fs = FsspecStorage(f"{scheme}://bucket/set", LOGIN)._connection.fs
    fs.connect()
    ours = told(s3_client(LOGIN).client.meta.config)
    assert told(fs.s3.meta.config)["response_checksum_validation"] == "when_required"
    assert told(fs.s3.meta.config)["retries"] == ours["retries"]


def test_an_entry_of_the_user_leaves_the_others_as_they_are() -> None:
    found = config_of_s3fs(config_kwargs={"max_pool_connections": 7})
    assert found["max_pool_connections"] == 7
    assert found["response_checksum_validation"] == "when_required"
    assert found["retries"]["total_max_attempts"] == 1


def test_the_user_may_have_answers_checked() -> None:
    asked = {"response_checksum_validation": "when_supported"}
    assert config_of_s3fs(config_kwargs=asked)["response_checksum_validation"] == "when_supported"
    client = s3_client(LOGIN | {"config_kwargs": asked}).client
    assert client.meta.config.response_checksum_validation == "when_supported"


def test_entries_of_fsspecs_configuration_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"max_pool_connections": 9}})
    found = config_of_s3fs()
    assert (found["max_pool_connections"], found["response_checksum_validation"]) == (9, "when_required")
