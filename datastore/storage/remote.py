"""Storage anywhere that fsspec reaches: S3, GCS, Azure, SFTP, HDFS and others.

What fsspec does not promise is told per backend in one table, `_BACKENDS`. Where the store itself replaces an object in
one step we let it; everywhere else a write goes to a hidden file that is moved over its target. Where the store has a
conditional write `put_new` uses it; everywhere else `exclusive` is False and a dataset there has one writer.

Nothing is cached: each listing and each size is asked for again, because other processes write, too.
"""

import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
from typing_extensions import Buffer, override

from datastore.errors import ConfigError, DependencyError
from datastore.storage.base import Stat, Storage, check_key
from datastore.storage.foreign import http_status, translate
from datastore.storage.reasons import conflict, missing, too_short
from datastore.storage.urls import strip_credentials

__all__ = ["FsspecStorage"]


@dataclass(frozen=True, slots=True)
class _Backend:
    """What one fsspec protocol can do beyond what all can."""

    replaces: bool = False
    """`pipe_file` shows the old bytes or the new, never a part."""

    creates: bool = False
    """`pipe_file(mode="create")` is put-if-absent, decided by the server."""

    reads_from_zero: bool = False
    """A whole read is several requests, which may see two versions; a read "from byte 0 on" is one."""

    creates_in_one: bool = False
    """The condition holds for a single request only: Ceph 16.2 ignores it at the end of an upload in parts."""

    options: tuple[tuple[str, object], ...] = ()
    """Options for its constructor."""


_UNCACHED = (("use_listings_cache", False),)
_S3 = _Backend(replaces=True, creates=True, reads_from_zero=True, creates_in_one=True, options=_UNCACHED)
_OBJECTS = _Backend(replaces=True, creates=True, options=_UNCACHED)

# s3fs sends If-None-Match for small objects since 2025.7 (its #974), and reads large ones in several requests since
# 2026.3 (its #1007); gcsfs sends ifGenerationMatch=0, adlfs overwrite=False. The memory and file systems of fsspec
# look first and write then, so two writers can both win.
_BACKENDS: dict[str, _Backend] = {
    "s3": _S3,
    "s3a": _S3,
    "gs": _OBJECTS,
    "gcs": _OBJECTS,
    "abfs": _OBJECTS,
    "abfss": _OBJECTS,
    "az": _OBJECTS,
    "memory": _Backend(replaces=True),
}

_EXTRAS = {"s3": "datastore[s3]", "s3a": "datastore[s3]", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}
_LARGEST_PUT_BYTES = 5 * 2**30
"""What S3 takes in one request."""

_SECRET_WORDS = ("key", "secret", "token", "password", "credential", "sas", "connection_string")


class FsspecStorage(Storage):
    """The objects below `url`. `options` go to fsspec's constructor; without them it looks in its usual places.

    Thread-safe. After a fork the connection is made anew: those of fsspec do not survive one.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        self._raw_url = url
        self._url = strip_credentials(url).rstrip("/")
        self._protocol = url.partition("://")[0].lower()
        self._backend = _BACKENDS.get(self._protocol, _Backend())
        self._options = dict(self._backend.options) | dict(options or {})
        self._secrets = tuple(_secrets(url, self._options))
        self._process = -1
        self._connect()

    @override
    def __repr__(self) -> str:
        return f"FsspecStorage({self._url!r})"

    @property
    @override
    def url(self) -> str:
        return self._url

    @property
    @override
    def exclusive(self) -> bool:
        return self._backend.creates

    @override
    def get(self, key: str) -> bytes:
        path = self._path(key)
        with self._errors(key):
            if not self._backend.reads_from_zero:
                return bytes(self._fs.cat_file(path))
            try:
                return bytes(self._fs.cat_file(path, start=0))
            except OSError as error:
                if http_status(error) == 416:  # Nothing has no byte 0.
                    return b""
                raise

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        path = self._path(key)
        asked = [(start, stop) for start, stop in ranges if stop > start]
        if not asked:
            self.stat(key)
            return [b"" for _ in ranges]
        with self._errors(key):
            starts, stops = [start for start, _ in asked], [stop for _, stop in asked]
            try:
                found = iter(self._fs.cat_ranges([path] * len(asked), starts, stops, on_error="raise"))
            except OSError as error:
                if http_status(error) == 416:
                    raise too_short(key=key, url=self._url, wanted_bytes=max(stops)) from None
                raise
        parts = [bytes(next(found)) if stop > start else b"" for start, stop in ranges]
        for (start, stop), part in zip(ranges, parts, strict=True):
            if len(part) != max(stop - start, 0):
                raise too_short(key=key, url=self._url, wanted_bytes=stop)
        return parts

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        view = memoryview(target).cast("B")
        view[:] = self.get_ranges(key, [(start, start + len(view))])[0]

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        with self._errors(key, writing=True):
            self._write(self._path(key), chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        path = self._path(key)
        with self._errors(key, writing=True, creating=True):
            if self._backend.creates:
                self._create(path, _join(chunks))
            elif self._is_file(path):
                raise conflict(key=key, url=self._url)
            else:
                self._write(path, chunks)

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        below = self._path(folder) if folder else self._root
        with self._errors(folder):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(below, detail=True)
            except FileNotFoundError:
                return
        start = len(self._root) + 1
        for path, info in sorted(found.items()):
            name = path.rpartition("/")[2]
            hidden = not name or (name.startswith(".") and name.endswith(".tmp"))
            if path.startswith(f"{below}/") and info["type"] == "file" and not hidden:
                yield Stat(key=path[start:], size_bytes=info["size"] or 0, modified=_modified(info))

    @override
    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._errors(key, writing=True), suppress(FileNotFoundError, IsADirectoryError):
            self._fs.rm_file(path)

    @override
    def stat(self, key: str) -> Stat:
        path = self._path(key)
        with self._errors(key):
            self._fs.invalidate_cache()
            info = self._fs.info(path)
        if info["type"] != "file":
            raise missing(key=key, url=self._url)
        return Stat(key=key, size_bytes=info["size"] or 0, modified=_modified(info))

    @override
    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _connect(self) -> None:
        try:
            self._filesystem, root = fsspec.core.url_to_fs(self._raw_url, **self._options)
        except ImportError:
            raise DependencyError(
                "a package for this kind of URL is missing",
                url=self._url,
                hint=f"Run: pip install '{_EXTRAS.get(self._protocol, self._protocol)}'.",
            ) from None
        except ValueError as error:
            if "not known" in str(error):
                raise ConfigError(
                    "unknown kind of URL",
                    url=self._url,
                    scheme=self._protocol,
                    hint="Use a path, s3://, gs:// or the like.",
                ) from None
            raise translate(error, key="", url=self._url, secrets=self._secrets) from None
        self._root = root.rstrip("/")
        if not self._root and self._protocol in _BACKENDS:
            raise ConfigError("the URL names nothing", url=self._raw_url, hint=f"Write {self._protocol}://NAME.")
        self._process = os.getpid()

    @property
    def _fs(self) -> Any:
        if self._process != os.getpid():
            self._connect()
        return self._filesystem

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    @contextmanager
    def _errors(self, key: str, *, writing: bool = False, creating: bool = False) -> Iterator[None]:
        """Turn what the backend raises inside the block into errors of ours."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - backends share no base class; it is raised again as ours
            raise translate(
                error, key=key, url=self._url, writing=writing, creating=creating, secrets=self._secrets
            ) from None

    def _is_file(self, path: str) -> bool:
        self._fs.invalidate_cache()
        try:
            return bool(self._fs.info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def _create(self, path: str, data: bytes) -> None:
        if not self._backend.creates_in_one:
            self._fs.pipe_file(path, data, mode="create")
        elif len(data) < _LARGEST_PUT_BYTES:
            self._fs.pipe_file(path, data, mode="create", chunksize=max(len(data), 1))
        else:
            raise ConfigError("too large for one exclusive write", size_bytes=len(data), hint="Write it in pieces.")

    def _write(self, path: str, chunks: Sequence[Buffer]) -> None:
        if self._backend.replaces:
            self._fs.pipe_file(path, _join(chunks))
            return
        folder, _, name = path.rpartition("/")
        staged = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            with self._fs.open(staged, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
            self._fs.mv(staged, path)
        except BaseException:
            with suppress(OSError):
                self._fs.rm_file(staged)
            raise


def _join(chunks: Sequence[Buffer]) -> bytes:
    return chunks[0] if len(chunks) == 1 and isinstance(chunks[0], bytes) else b"".join(chunks)


def _modified(info: Mapping[str, Any]) -> float:
    """Return the time of writing: backends disagree on the key and on the type.

    Whole seconds: a HEAD of S3 gives no more, and where a listing does (Ceph's), both must say the same.
    """
    for name in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp() // 1
        if isinstance(value, int | float):
            return float(value) // 1
        if isinstance(value, str) and value:
            with suppress(ValueError):
                return datetime.fromisoformat(value).timestamp() // 1
    return 0.0


def _secrets(url: str, options: Mapping[str, Any]) -> Iterator[str]:
    """Yield what must not show in a message, longest first."""
    login = url.partition("://")[2].partition("/")[0].rpartition("@")[0]
    found = {login, login.partition(":")[2], url.partition("?")[2]}
    found |= {str(value) for name, value in options.items() if any(word in name.lower() for word in _SECRET_WORDS)}
    yield from sorted((text for text in found if len(text) > 3), key=len, reverse=True)
