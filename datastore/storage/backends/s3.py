"""Storage on S3 without an event loop: each thread sends its own requests and takes the answers from the socket.

s3fs moves every byte through one loop that all threads share, and copies it three times: four readers got 0.67 to 0.80 of what
four threads with boto3 get. Here the kernel writes into the caller's buffer: 1.17 times boto3 at two fifths of its processor time
(`tools/bench/s3`, two cores). obstore gave 0.94 to 1.05 there, needs credentials of its own kind, and does not survive a fork;
so it is not used. The price is this module; without botocore, or with options it does not know, s3fs does the same, slower.

A value above 128 MiB is written in parts of 64 MiB, four at once; what `put_new` writes goes in one request, for Ceph
16.2 ignores the condition at the end of an upload in parts.

Clients are made as s3fs makes its own, from the same options and the same usual places. botocore, which s3fs brings along, looks for credentials, profile, region and endpoint in the environment, in `~/.aws` and
at the machine's role; nothing of that is done here. An option that only s3fs understands makes `understands` say no, and the
caller takes s3fs. Retries are switched off (ours are the only layer), and so is the check of a body against S3's own
checksum, which would copy every byte: what this package reads it checks against digests of its own.

A client is kept for its options, for making one takes 50 ms; a forked child makes its own.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from typing_extensions import Buffer, override

from datastore.errors import ConfigError, DatastoreError, MissingError
from datastore.storage.backends.schemes import BACKENDS, S3_CONFIG
from datastore.storage.backends.unfinished import find_uploads
from datastore.storage.base import Stat, check_key
from datastore.storage.errors import cut_short, error_code, http_status, too_short
from datastore.storage.ranges import fill, gather, join, read_all, total_bytes
from datastore.storage.retry import Reading, RequestStorage, RetryPolicy
from datastore.storage.urls import secrets_of, split_url
from datastore.threads import all_at_once

__all__ = ["S3Client", "S3Storage", "forget_clients", "s3_client", "understands"]

Parts = Sequence[Mapping[str, object]]

_BACKEND = BACKENDS["s3"]

_PART_BYTES = _BACKEND.part_bytes or 0

_ONE_REQUEST_BYTES = 2 * _PART_BYTES

_MOST_PARTS = 10_000

_PARTS_AT_ONCE = 4


class S3Storage(RequestStorage):
    """The objects below `s3://bucket/prefix`. `options` are s3fs's; without them botocore looks in its usual places.

    Thread-safe, also after a fork.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, *, policy: RetryPolicy | None = None
    ) -> None:
        self._options = dict(options or {})
        super().__init__(url, policy=policy, secrets=secrets_of(url, self._options))
        self._bucket, _, self._prefix = split_url(url)[1].strip("/").partition("/")
        if not self._bucket:
            raise ConfigError("the URL names nothing", url=self._url, hint="Write s3://NAME.")

    @property
    @override
    def exclusive(self) -> bool:
        return True

    @override
    def get(self, key: str) -> bytes:
        name = self._name(key)
        return self._requests.run("get", key, lambda: read_all(self._ask("get_object", name)), sized=len)

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        name, size = self._name(key), total_bytes(chunks)
        if size > _ONE_REQUEST_BYTES:
            self._put_in_parts(key, name, chunks, size)
            return
        data = join(chunks)
        self._requests.run("put", key, lambda: self._ask("put_object", name, Body=data), sized=size)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        name, data = self._name(key), join(chunks)
        if len(data) > (_BACKEND.largest_put_bytes or 0):
            raise ConfigError("too large for one exclusive write", size_bytes=len(data), hint="Write it in pieces.")
        self._requests.create(
            key,
            lambda: self._ask("put_object", name, Body=data, IfNoneMatch="*"),
            size_bytes=len(data),
            is_mine=lambda: self.get(key) == data,
        )

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        below = f"{self._name(folder)}/" if folder else f"{self._prefix}/" if self._prefix else ""
        found = self._pages(folder, below)
        # A directory bucket of S3 Express lists in any order.
        yield from sorted(found, key=lambda stat: stat.key) if self._bucket.endswith("--x-s3") else found

    @override
    def delete(self, key: str) -> None:
        name = self._name(key)
        with suppress(MissingError):
            self._requests.run("delete", key, lambda: self._ask("delete_object", name))

    @override
    def stat(self, key: str) -> Stat:
        name = self._name(key)
        found = self._requests.run("stat", key, lambda: self._ask("head_object", name))
        return Stat(key=key, size_bytes=found["ContentLength"], modified=found["LastModified"].timestamp() // 1)

    @override
    def clear_unfinished(self, *, before: float, dry_run: bool = False) -> Sequence[Stat]:
        def call(operation: str, **arguments: object) -> dict[str, Any]:
            del arguments["Bucket"]
            return self._requests.run(
                "list", "", partial(self._ask, operation, arguments.pop("Key", None), **arguments)
            )

        found = find_uploads(call, f"{self._bucket}/{self._prefix}".rstrip("/"))
        old = [unfinished for unfinished in found if unfinished.stat.modified < before]
        for unfinished in old if not dry_run else ():
            unfinished.remove()
        return [unfinished.stat for unfinished in old]

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _ask(self, operation: str, name: object = None, **arguments: object) -> dict[str, Any]:
        """Send one request; raise what botocore raises."""
        found = s3_client(self._options)
        self._requests.conceal(found.secrets)
        target = {"Bucket": self._bucket} | ({} if name is None else {"Key": name})
        answer: dict[str, Any] = getattr(found.client, operation)(**target, **arguments)
        return answer

    @override
    def _read(self, operation: Reading, key: str, start: int, view: memoryview) -> None:
        name = self._name(key)
        self._requests.run(operation, key, lambda: self._fill(key, name, start, view), sized=len(view))

    def _fill(self, key: str, name: str, start: int, view: memoryview) -> None:
        stop = start + len(view)
        try:
            answer = self._ask("get_object", name, Range=f"bytes={start}-{stop - 1}")
        except Exception as error:
            if http_status(error) == 416:
                raise too_short(key=key, url=self._url, wanted_bytes=stop) from None
            raise
        size = int(answer["ContentRange"].rpartition("/")[2]) if "ContentRange" in answer else answer["ContentLength"]
        if size < stop:
            answer["Body"].close()
            raise too_short(key=key, url=self._url, wanted_bytes=stop)
        if "ContentRange" not in answer and size > len(view):  # The gateway does not know ranges.
            view[:] = memoryview(read_all(answer))[start:stop]
        elif not fill(answer, view):
            raise cut_short(key=key, url=self._url)

    def _pages(self, folder: str, below: str) -> Iterator[Stat]:
        cut, more = len(self._prefix) + 1 if self._prefix else 0, {"Prefix": below}
        while more:
            try:
                page = self._requests.run("list", folder, partial(self._ask, "list_objects_v2", **more))
            except MissingError:  # There is no such bucket.
                return
            for found in page.get("Contents", ()):
                name = found["Key"].rpartition("/")[2]
                if name and not (name.startswith(".") and name.endswith(".tmp")):
                    modified = found["LastModified"].timestamp() // 1  # As a HEAD says it; Ceph's listing has more.
                    yield Stat(key=found["Key"][cut:], size_bytes=found["Size"], modified=modified)
            token = page.get("NextContinuationToken") if page.get("IsTruncated") else None
            more = {"Prefix": below, "ContinuationToken": token} if token else {}

    def _put_in_parts(self, key: str, name: str, chunks: Sequence[Buffer], size: int) -> None:
        send = partial(self._requests.run, "put", key)
        upload = send(lambda: self._ask("create_multipart_upload", name))["UploadId"]

        def put_part(number: int, data: bytes) -> dict[str, object]:
            answer = send(
                lambda: self._ask("upload_part", name, UploadId=upload, PartNumber=number, Body=data), sized=len(data)
            )
            return {"PartNumber": number, "ETag": answer["ETag"]}

        parts = gather(chunks, max(_PART_BYTES, -(-size // _MOST_PARTS)))
        try:
            tags = all_at_once(
                (partial(put_part, number, part) for number, part in enumerate(parts, 1)), most=_PARTS_AT_ONCE
            )
            send(lambda: self._complete(name, upload, tags, size))
        except BaseException:
            with suppress(DatastoreError):  # As a listing: what is gone is missing, and not worth another try.
                self._requests.run("list", key, lambda: self._ask("abort_multipart_upload", name, UploadId=upload))
            raise

    def _complete(self, name: str, upload: str, parts: Parts, size: int) -> None:
        try:
            self._ask("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": parts})
        except Exception as error:
            # Gone: an earlier request completed it, and its answer was lost.
            if error_code(error) != "NoSuchUpload":
                raise
            found = self._ask("head_object", name)
            if found["ContentLength"] != size or not found["ETag"].strip('"').endswith(f"-{len(parts)}"):
                raise


_SESSION = {"profile"}

_LOGIN = {"key": "aws_access_key_id", "secret": "aws_secret_access_key", "token": "aws_session_token"}

_CLIENT = {"endpoint_url", "use_ssl"}

_NESTED = {"client_kwargs", "config_kwargs"}

_IGNORED = {"anon", "default_block_size", "use_listings_cache", "max_concurrency"}
"""`anon` is looked at; the others tune what is not used here."""

_CONFIG: dict[str, object] = {
    "connect_timeout": 5,
    "read_timeout": 60,
    "max_pool_connections": 64,
    **S3_CONFIG,
}

_clients: dict[tuple[int, str], "S3Client"] = {}
"""Of this process, by its options. Two threads that make the same one at once do no harm."""


@dataclass(frozen=True, slots=True)
class S3Client:
    """botocore's client, and the secrets that it signs with as far as they are known."""

    client: Any
    secrets: tuple[str, ...]


def understands(options: Mapping[str, Any]) -> bool:
    """Return whether a client for these options of s3fs can be made here."""
    return not options.keys() - _SESSION - _LOGIN.keys() - _CLIENT - _NESTED - _IGNORED


def s3_client(options: Mapping[str, Any]) -> S3Client:
    """Return the client for these options of s3fs.

    Raises:
        botocore.exceptions.BotoCoreError: a profile that does not exist, a malformed setting, and the like.
    """
    name = os.getpid(), repr(sorted(options.items(), key=lambda item: item[0]))
    if name not in _clients:
        _clients[name] = _make(options)
    return _clients[name]


def forget_clients() -> None:
    """Have clients made anew: the environment, or a file they were made from, has changed."""
    _clients.clear()


def _make(options: Mapping[str, Any]) -> S3Client:
    from botocore import UNSIGNED  # noqa: PLC0415 - optional, and takes 100 ms
    from botocore.config import Config  # noqa: PLC0415
    from botocore.session import Session  # noqa: PLC0415

    config = _CONFIG | dict(options.get("config_kwargs") or {})
    arguments = {name: options[name] for name in _CLIENT if options.get(name) is not None}
    login = {ours: options[name] for name, ours in _LOGIN.items() if options.get(name) is not None}
    if options.get("anon"):
        config["signature_version"], login = UNSIGNED, {}
    arguments |= login | dict(options.get("client_kwargs") or {})
    session = Session(profile=options.get("profile"))
    client = session.create_client("s3", config=Config(**config), **arguments)
    found = session.get_credentials() if not login and not options.get("anon") else None
    # Credentials of a role are fetched anew now and then, and asking for them is a request: they are not known.
    known = (found.access_key, found.secret_key, found.token) if type(found).__name__ == "Credentials" and found else ()
    return S3Client(client, tuple(secret for secret in known if secret))
