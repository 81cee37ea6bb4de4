"""Storage anywhere that fsspec reaches: S3, GCS, Azure, SFTP, WebDAV, HDFS and others.

What fsspec does not promise is told per scheme in one table, `schemes.py`. Where the store itself replaces an object in
one step we let it; everywhere else a write goes to a hidden file that is moved over its target. Where the store has a
conditional write `put_new` uses it; everywhere else `exclusive` is False and a dataset there has one writer.

Nothing is cached: each listing and each size is asked for again, because other processes write, too.

A file system of fsspec is kept usable: connected when it is needed, after a fork and after a loss, and in turns. Some libraries connect once and for all (paramiko's SSH), others for each request; some can be used by many threads at
once, others hand one thread's answer to another and then wait for ever. The same table says which.
"""

import os
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from threading import RLock
from typing import Any, TypeVar

import fsspec
from typing_extensions import Buffer, override

from datastore.errors import ConfigError, DependencyError
from datastore.storage.backends.schemes import backend_of
from datastore.storage.backends.unfinished import find_hidden, find_uploads, time_of
from datastore.storage.base import Stat, check_key
from datastore.storage.errors import conflict, cut_short, http_status, is_lost, missing, too_short
from datastore.storage.ranges import join, total_bytes
from datastore.storage.retry import Reading, RequestStorage, RetryPolicy
from datastore.storage.statistics import Operation
from datastore.storage.urls import secrets_of, strip_credentials

__all__ = ["Connection", "FsspecStorage", "configured"]

T = TypeVar("T")


class FsspecStorage(RequestStorage):
    """The objects below `url`. `options` go to fsspec's constructor; without them it looks in its usual places.

    Thread-safe. After a fork the connection is made anew: those of fsspec do not survive one.
    """

    def __init__(
        self, url: str, options: Mapping[str, Any] | None = None, *, policy: RetryPolicy | None = None
    ) -> None:
        self._backend = backend_of(url.partition("://")[0].lower())
        scheme = url.partition("://")[0].lower()
        self._options = _with_ours(dict(self._backend.options), configured(scheme), options or {})
        super().__init__(url, policy=policy, secrets=secrets_of(url, self._options))
        self._connection = Connection(url, self._options)

    @property
    @override
    def exclusive(self) -> bool:
        return bool(self._backend.creates)

    @override
    def get(self, key: str) -> bytes:
        path = self._path(key)
        return self._run("get", key, lambda: self._cat(key, path), sized=len)

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        path = self._path(key)
        asked = [(start, stop) for start, stop in ranges if stop > start]
        if not asked:
            self.stat(key)
            return [b"" for _ in ranges]
        got: dict[int, bytes] = {}
        parts = self._run("get_ranges", key, lambda: self._cat_ranges(key, path, asked, got), sized=total_bytes)
        found = iter(parts)
        return [next(found) if stop > start else b"" for start, stop in ranges]

    @override
    def _read(self, operation: Reading, key: str, start: int, view: memoryview) -> None:
        path, asked = self._path(key), [(start, start + len(view))]
        found = self._run(operation, key, lambda: self._cat_ranges(key, path, asked, {}), sized=total_bytes)
        view[:] = found[0]

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        path = self._path(key)
        self._run("put", key, lambda: self._write(path, chunks), sized=total_bytes(chunks))

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        path, data = self._path(key), join(chunks)
        self._requests.create(
            key,
            lambda: self._connection.in_turn(lambda: self._create(key, path, data)),
            size_bytes=len(data),
            is_mine=lambda: self.get(key) == data,
            repeated=self._backend.repeats,
        )

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        below = self._path(folder) if folder else self._connection.root
        found = self._run("list", folder, lambda: self._find(below))
        start = len(self._connection.root) + 1
        for path, info in sorted(found.items()):
            name = path.rpartition("/")[2]
            hidden = not name or (name.startswith(".") and name.endswith(".tmp"))
            if path.startswith(f"{below}/") and info["type"] == "file" and not hidden:
                yield Stat(key=path[start:], size_bytes=info["size"] or 0, modified=time_of(info))

    @override
    def delete(self, key: str) -> None:
        path = self._path(key)
        self._run("delete", key, lambda: self._remove(path))

    @override
    def stat(self, key: str) -> Stat:
        path = self._path(key)
        info = self._run("stat", key, lambda: self._info(path))
        if info["type"] != "file":
            raise missing(key=key, url=self._url)
        return Stat(key=key, size_bytes=info["size"] or 0, modified=time_of(info))

    @override
    def clear_unfinished(self, *, before: float, dry_run: bool = False) -> Sequence[Stat]:
        call = getattr(self._fs, "call_s3", None)
        find = partial(find_uploads, call) if call else partial(find_hidden, self._fs)
        found = self._run("list", "", lambda: find(self._connection.root))
        old = [unfinished for unfinished in found if unfinished.stat.modified < before]
        for unfinished in old if not dry_run else ():
            self._run("delete", unfinished.stat.key, unfinished.remove)
        return [unfinished.stat for unfinished in old]

    def _run(self, operation: Operation, key: str, call: Callable[[], T], *, sized: Callable[[T], int] | int = 0) -> T:
        return self._requests.run(operation, key, lambda: self._connection.in_turn(call), sized=sized)

    @property
    def _fs(self) -> Any:
        return self._connection.fs

    def _path(self, key: str) -> str:
        return f"{self._connection.root}/{check_key(key)}"

    def _cat(self, key: str, path: str) -> bytes:
        try:
            return bytes(self._fs.cat_file(path, start=0) if self._backend.reads_from_zero else self._fs.cat_file(path))
        except Exception as error:
            if self._backend.reads_from_zero and http_status(error) == 416:  # Nothing has no byte 0.
                return b""
            if self._read_a_folder(error, path):
                raise missing(key=key, url=self._url) from None
            raise

    def _read_a_folder(self, error: Exception, path: str) -> bool:
        """Return whether that is what went wrong: some libraries raise an error without a number."""
        return not self._backend.replaces and not is_lost(error) and self._is_folder(path)

    def _is_folder(self, path: str) -> bool:
        try:
            return bool(self._info(path)["type"] == "directory")
        except FileNotFoundError:
            return False

    def _cat_ranges(
        self, key: str, path: str, asked: Sequence[tuple[int, int]], got: dict[int, bytes]
    ) -> Sequence[bytes]:
        """Return the bytes of each range, none of them empty or cut; what another try `got` is not asked for again."""
        left = [index for index in range(len(asked)) if index not in got]
        starts, stops = [asked[index][0] for index in left], [asked[index][1] for index in left]
        found = self._fs.cat_ranges([path] * len(left), starts, stops, on_error="return")
        failed = None
        for index, start, stop, part in zip(left, starts, stops, found, strict=True):
            if isinstance(part, Exception):
                failed = failed or part
            elif len(part) == stop - start:
                got[index] = bytes(part)
        if failed is not None and http_status(failed) != 416:
            raise missing(key=key, url=self._url) if self._read_a_folder(failed, path) else failed
        if len(got) == len(asked):
            return [got[index] for index in range(len(asked))]
        if self._info(path)["size"] >= max(stops):
            raise cut_short(key=key, url=self._url)
        raise too_short(key=key, url=self._url, wanted_bytes=max(stops))

    def _find(self, below: str) -> dict[str, Any]:
        self._fs.invalidate_cache()
        try:
            return dict(self._fs.find(below, detail=True))
        except FileNotFoundError:
            return {}

    def _remove(self, path: str) -> None:
        if not self._backend.replaces and self._is_folder(path):  # WebDAV would remove all of it.
            return
        with suppress(FileNotFoundError, IsADirectoryError):
            self._fs.rm_file(path)

    def _info(self, path: str) -> dict[str, Any]:
        self._fs.invalidate_cache()
        return dict(self._fs.info(path))

    def _is_file(self, path: str) -> bool:
        try:
            return bool(self._info(path)["type"] == "file")
        except FileNotFoundError:
            return False

    def _create(self, key: str, path: str, data: bytes) -> None:
        largest = self._backend.largest_put_bytes
        if largest is not None and len(data) > largest:
            raise ConfigError("too large for one exclusive write", size_bytes=len(data), hint="Write it in pieces.")
        if self._backend.creates_in_one:
            self._fs.pipe_file(path, data, mode="create", chunksize=max(len(data), 1))
        elif self._backend.creates:
            self._fs.pipe_file(path, data, mode="create")
        elif self._is_file(path):
            raise conflict(key=key, url=self._url)
        else:
            self._write(path, [data])

    def _write(self, path: str, chunks: Sequence[Buffer]) -> None:
        if self._backend.replaces:
            self._fs.pipe_file(path, join(chunks))
            return
        folder, _, name = path.rpartition("/")
        staged = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            with self._fs.open(staged, "wb") as file:
                for chunk in chunks:
                    file.write(chunk if isinstance(chunk, bytes) else bytes(memoryview(chunk).cast("B")))
            self._backend.move(self._fs, staged, path)
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(staged)
            raise


class Connection:
    """The file system of a URL. Thread-safe, also after a fork.

    Raises:
        ConfigError: the URL names nothing, or is of a kind that fsspec does not know.
        DependencyError: it knows the kind, but not without another package.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.scheme = url.partition("://")[0].lower()
        self._raw_url, self._options = url, dict(options)
        self._backend = backend_of(self.scheme)
        self._process = -1
        self._turn = RLock()
        self._filesystem: Any = None
        self.root = self._find_root().rstrip("/")
        if not self.root and self._backend.replaces:
            raise ConfigError("the URL names nothing", url=strip_credentials(url), hint=f"Write {self.scheme}://NAME.")

    @property
    def fs(self) -> Any:
        """The file system; raises what its library raises when it cannot connect."""
        if self._process != os.getpid():
            own = {} if self._backend.threads else {"skip_instance_cache": True}
            self._filesystem = fsspec.core.url_to_fs(self._raw_url, **self._options, **own)[0]
            if own:
                weakref.finalize(self, _hang_up, self._filesystem)
            if hasattr(self._filesystem, "retries"):  # s3fs: one layer that repeats requests is enough.
                self._filesystem.retries = 1
            self._process = os.getpid()
        return self._filesystem

    def in_turn(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, while no other thread uses the connection if it cannot be shared."""
        if self._backend.threads:
            return call()
        if self._process not in {-1, os.getpid()}:  # A thread that this process has not may have had the turn.
            self._turn, self._process = RLock(), -1
        with self._turn:
            try:
                return call()
            except Exception as error:
                if is_lost(error):  # The next try begins with a new one.
                    self._process = -1
                    _hang_up(self._filesystem)
                raise

    def _find_root(self) -> str:
        try:
            kind = fsspec.get_filesystem_class(self.scheme)
        except ImportError:
            raise DependencyError(
                "a package for this kind of URL is missing",
                url=strip_credentials(self._raw_url),
                hint=f"Run: pip install '{self._backend.requires or self.scheme}'.",
            ) from None
        except ValueError:
            raise ConfigError(
                "unknown kind of URL",
                url=strip_credentials(self._raw_url),
                scheme=self.scheme,
                hint="Use a path, s3://, gs:// or the like.",
            ) from None
        return str(kind._strip_protocol(self._raw_url))  # noqa: SLF001 - as `url_to_fs` does


def _hang_up(fs: Any) -> None:
    """Close a connection that lasts; its thread would keep it for as long as the process lives."""
    close = getattr(getattr(fs, "client", None), "close", None)
    if close is not None:
        with suppress(Exception):
            close()


def _with_ours(ours: Mapping[str, Any], theirs: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options `given` and those that are ours; `theirs` are from fsspec's configuration, which it adds itself.

    Of an option that is itself a mapping each entry counts: who sets one does not lose the others.
    """
    merged: dict[str, Any] = {**ours, **given}
    for name, value in ours.items():
        if isinstance(value, Mapping):
            merged[name] = {**value, **(theirs.get(name) or {}), **(given.get(name) or {})}
    return merged


def configured(scheme: str) -> dict[str, Any]:
    """Return the options that fsspec's own configuration (its files and variables) holds for a scheme."""
    return dict(fsspec.config.conf.get(scheme, {}))
