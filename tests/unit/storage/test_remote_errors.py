"""What backends raise becomes an error that says whether to try again, and shows no secret."""

import errno
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import ConflictError, DatastoreError, MissingError, StorageError
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.storage.errors import scrub, translate
from datastore.storage.retry import RetryPolicy


class HttpError(Exception):
    """As gcsfs has it: a status and no base class."""

    def __init__(self, code: int) -> None:
        super().__init__(f"HTTP {code}")
        self.code = code


class NoCredentialsError(Exception):
    """As botocore has it."""


def foreign(module: str, name: str) -> Exception:
    """Return an error of a class of that name, as if `module` were installed."""
    error: Exception = type(name, (Exception,), {"__module__": module})("it broke")
    return error


def caused(error: Exception, code: str, status: int) -> Exception:
    """Return `error` as s3fs raises it: caused by botocore's, which has the code and the status."""
    cause = Exception(f"An error occurred ({code})")
    cause.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}  # type: ignore[attr-defined]
    error.__cause__ = cause
    return error


READING = [
    (FileNotFoundError("k"), MissingError, False),
    (IsADirectoryError("k"), MissingError, False),
    (caused(OSError(errno.EIO, "gone"), "NoSuchKey", 404), MissingError, False),
    (PermissionError("no"), StorageError, False),
    (OSError("Forbidden: bucket/k\nno"), StorageError, False),
    (HttpError(401), StorageError, False),
    (caused(PermissionError("old"), "ExpiredToken", 400), StorageError, False),
    (caused(PermissionError("clock"), "RequestTimeTooSkewed", 403), StorageError, False),
    (caused(OSError(errno.EINVAL, "slow client"), "RequestTimeout", 400), StorageError, True),
    (foreign("http.client", "HTTPException"), StorageError, True),
    (NoCredentialsError("Unable to locate credentials"), StorageError, False),
    (OSError(errno.EBUSY, "SlowDown"), StorageError, True),
    (OSError(errno.EREMOTEIO, "InternalError"), StorageError, True),
    (HttpError(429), StorageError, True),
    (HttpError(503), StorageError, True),
    (TimeoutError(), StorageError, True),
    (ConnectionResetError("reset"), StorageError, True),
    (foreign("aiohttp.client_exceptions", "ClientError"), StorageError, True),
    (foreign("botocore.exceptions", "HTTPClientError"), StorageError, True),
    (foreign("azure.core.exceptions", "ServiceRequestError"), StorageError, True),
    (foreign("somewhere.else", "ClientError"), StorageError, False),
    (OSError(errno.EINVAL, "bad request"), StorageError, False),
    (HttpError(400), StorageError, False),
    (ValueError("bad"), StorageError, False),
]


@pytest.mark.parametrize(("error", "kind", "transient"), READING)
def test_a_failed_read_says_whether_to_try_again(error: Exception, kind: type[DatastoreError], transient: bool) -> None:  # noqa: FBT001
    found = translate(error, key="k", url="s3://b")
    assert isinstance(found, kind)
    assert found.values.get("transient", False) == transient
    assert found.hint


@pytest.mark.parametrize(
    "error",
    [
        FileExistsError("k"),
        caused(OSError(errno.EINVAL, "At least one of the pre-conditions"), "PreconditionFailed", 412),
        HttpError(412),
    ],
)
def test_a_refused_put_new_is_a_conflict(error: Exception) -> None:
    assert isinstance(translate(error, key="k", url="s3://b", writing=True, creating=True), ConflictError)


@pytest.mark.parametrize(
    "error",
    [
        caused(OSError(errno.EIO, "conflict"), "ConditionalRequestConflict", 409),
        caused(FileNotFoundError("k"), "NoSuchUpload", 404),
        OSError(errno.EINVAL, "unknown"),
        TimeoutError(),
        HttpError(500),
        RuntimeError("event loop is closed"),
    ],
)
def test_after_a_doubtful_put_new_the_caller_is_told_to_read_back(error: Exception) -> None:
    found = translate(error, key="k", url="s3://b", writing=True, creating=True)
    assert isinstance(found, StorageError)
    assert found.transient


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (caused(OSError(errno.EIO, "x"), "ExpiredToken", 400), "have expired"),
        (caused(PermissionError("x"), "ExpiredToken", 403), "have expired"),
        (foreign("botocore.exceptions", "UnauthorizedSSOTokenError"), "have expired"),
        (NoCredentialsError("Unable to locate credentials"), "no credentials were found"),
        (caused(PermissionError("x"), "RequestTimeTooSkewed", 403), "clock is wrong"),
        (caused(PermissionError("x"), "InvalidAccessKeyId", 403), "access denied"),
    ],
)
@pytest.mark.parametrize("creating", [False, True])
def test_credentials_that_have_expired_are_told_apart_from_wrong_ones(
    error: Exception,
    fact: str,
    creating: bool,  # noqa: FBT001
) -> None:
    found = translate(error, key="k", url="s3://b", writing=creating, creating=creating)
    assert isinstance(found, StorageError)
    assert fact in str(found)
    assert not found.transient
    assert found.hint


@pytest.mark.parametrize(
    "error", [PermissionError("no"), HttpError(400), OSError(errno.ENOSPC, "full"), OSError(errno.EROFS, "ro")]
)
def test_a_put_new_that_surely_wrote_nothing_is_not_tried_again(error: Exception) -> None:
    found = translate(error, key="k", url="s3://b", writing=True, creating=True)
    assert isinstance(found, StorageError)
    assert not found.transient


def test_a_missing_bucket_is_told_apart_from_a_missing_key() -> None:
    found = translate(caused(FileNotFoundError("b"), "NoSuchBucket", 404), key="k", url="s3://b", writing=True)
    assert isinstance(found, MissingError)
    assert "Make the bucket" in str(found)


@given(st.from_regex(r"[A-Za-z0-9/+]{8,40}", fullmatch=True), st.text(max_size=30))
def test_a_known_secret_never_shows(secret: str, around: str) -> None:
    assert secret not in scrub(f"{around}{secret} and {secret}", [secret])


@pytest.mark.parametrize(
    "text",
    [
        "GET https://h/x?X-Amz-Signature=SECRET&y=1",
        "https://acct/x?sv=1&sig=SECRET",
        "login failed: password=SECRET, user=me",
        "AWSAccessKeyId=SECRET",
    ],
)
def test_what_looks_like_a_signature_never_shows(text: str) -> None:
    assert "SECRET" not in scrub(text)


class Broken:
    """A file system of which every method fails with one error."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, _: str) -> Any:
        def fail(*_: object, **__: object) -> None:
            raise self._error

        return fail


def test_neither_url_nor_repr_nor_error_shows_what_opened_the_storage() -> None:
    secrets = {"key": "AKIDSECRETKEY", "secret": "wJalrXUtnFEMI/SECRET", "token": "FwoGZXIvSECRET"}
    storage = FsspecStorage(
        "s3://LOGINSECRET:PASSSECRET@bucket/x?sig=QUERYSECRET", secrets, policy=RetryPolicy(tries=1)
    )
    storage._connection._process = os.getpid()
    storage._connection._filesystem = Broken(
        OSError(errno.EIO, f"signed with {' '.join(secrets.values())} for LOGINSECRET:PASSSECRET")
    )
    for call in (
        lambda: storage.get("k"),
        lambda: storage.get_ranges("k", [(0, 1)]),
        lambda: storage.put("k", b"x"),
        lambda: storage.put_new("k", b"x"),
        lambda: list(storage.list()),
        lambda: storage.stat("k"),
        lambda: storage.delete("k"),
    ):
        with pytest.raises(StorageError) as caught:
            call()
        assert caught.value.__suppress_context__
        assert "SECRET" not in f"{caught.value}{caught.value!r}{storage.url}{storage!r}"


def test_a_child_process_makes_its_own_connection() -> None:
    storage = FsspecStorage("memory://fork")
    before = storage._fs
    storage._connection._process = os.getpid() + 1  # as if this process had been forked
    storage._connection._filesystem = None
    assert storage._fs is not None
    assert type(storage._fs) is type(before)
