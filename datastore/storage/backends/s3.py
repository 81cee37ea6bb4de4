"""Storage on S3 without an event loop: each thread sends its own requests and takes the answers from the socket.

s3fs moves every byte through one loop that all threads share, and copies it three times: four readers got 0.67 to 0.80 of what
four threads with boto3 get. Here the kernel writes into the caller's buffer: 1.17 times boto3 at two fifths of its processor time
(`tools/bench/s3`, two cores). obstore gave 0.94 to 1.05 there, needs credentials of its own kind, and does not survive a fork;
so it is not used. The price is this module; without botocore, or with options it does not know, s3fs does the same, slower.

A value above 128 MiB is written in parts of 64 MiB, four at once; what `put_new` writes goes in one request, for Ceph
16.2 ignores the condition at the end of an upload in parts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

from typing_extensions import Buffer, override

from datastore.errors import ConfigError, DatastoreError, MissingError
from datastore.storage.backends.schemes import BACKENDS
from datastore.storage.backends.unfinished import find_uploads
from datastore.storage.base import Stat, Storage, check_key
from datastore.storage.foreign import error_code, http_status
from datastore.storage.ranges import fill, gather, join, read_all, total_bytes
from datastore.storage.reasons import cut_short, too_short
from datastore.storage.retry import Requests, RetryPolicy
from datastore.storage.s3_client import s3_client, understands
from datastore.storage.statistics import OperationStatistics
from datastore.storage.threads import all_at_once, ranges_at_once
from datastore.storage.urls import secrets_of, split_url, strip_credentials

__all__ = ["S3Storage", "understands"]

Reading = Literal["get_ranges", "read_into"]
Parts = Sequence[Mapping[str, object]]

_BACKEND = BACKENDS["s3"]
_PART_BYTES = _BACKEND.part_bytes or 0
_ONE_REQUEST_BYTES = 2 * _PART_BYTES
_MOST_PARTS = 10_000

_PARTS_AT_ONCE = 4


class S3Storage(Storage):
    """The objects below `s3://bucket/prefix`. `options` are s3fs's; without them botocore looks in its usual places.

    Thread-safe, also after a fork.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, *, policy: RetryPolicy | None = None
    ) -> None:
        self._url = strip_credentials(url).rstrip("/")
        self._bucket, _, self._prefix = split_url(url)[1].strip("/").partition("/")
        if not self._bucket:
            raise ConfigError("the URL names nothing", url=self._url, hint="Write s3://NAME.")
        self._options = dict(options or {})
        self._requests = Requests(self._url, policy=policy, secrets=secrets_of(url, self._options))

    @override
    def __repr__(self) -> str:
        return f"S3Storage({self._url!r})"

    @property
    @override
    def url(self) -> str:
        return self._url

    @property
    @override
    def exclusive(self) -> bool:
        return True

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        return self._requests.meter.statistics()

    @override
    def get(self, key: str) -> bytes:
        name = self._name(key)
        return self._requests.run("get", key, lambda: read_all(self._ask("get_object", name)), sized=len)

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if not any(stop > start for start, stop in ranges):
            self.stat(key)
        return ranges_at_once(partial(self._read, "get_ranges", key), ranges)

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        view = memoryview(target).cast("B")
        if view:
            self._read("read_into", key, start, view)
        else:
            self.stat(key)

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

    @override
    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{check_key(key)}" if self._prefix else check_key(key)

    def _ask(self, operation: str, name: object = None, **arguments: object) -> dict[str, Any]:
        """Send one request; raise what botocore raises."""
        found = s3_client(self._options)
        self._requests.conceal(found.secrets)
        target = {"Bucket": self._bucket} | ({} if name is None else {"Key": name})
        answer: dict[str, Any] = getattr(found.client, operation)(**target, **arguments)
        return answer

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
