"""Storage in a folder of this machine: each key is one file below the root.

A write goes to a file without a name, is flushed to the disk, and then gets its name by `link(2)`, which fails if the
name is taken. A `put` that replaces is called `.<name>.<random>.tmp` for a moment, and is renamed from there. The folder
is flushed last, so what was acknowledged survives a power cut. The price is two flushes per write (some milliseconds);
many tiny keys are slow, shards do not notice. The kernel removes a file without a name when its writer dies, so a killed
one leaves nothing but, for the moment of a replacing and where file systems have no such files (NFS), a hidden one,
which no listing shows.
"""

import errno
import os
import stat
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from typing_extensions import Buffer, override

from datastore.errors import DatastoreError
from datastore.storage.backends.syscalls import Unsupported, name_if_free, write_all
from datastore.storage.base import Stat, Storage, check_key
from datastore.storage.errors import ABSENT, conflict, explain, missing, too_short
from datastore.storage.statistics import OperationStatistics, RequestMeter

__all__ = ["LocalStorage"]

_linkat = os.link

_MAX_IO_BYTES = 2**30
"""Bytes per system call; Linux moves at most 2 GiB - 4 KiB at once."""

_ANONYMOUS = hasattr(os, "O_TMPFILE") and Path("/proc/self/fd").is_dir()
"""Whether this system has files without a name, and can name them later. Source: open(2) on O_TMPFILE."""

_NO_ANONYMOUS = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT, errno.EPERM}
"""What a file system without them says; or the folder is not there (ext4 says EPERM if it is just being removed), which
making a named file will tell."""

_NO_SECOND_NAME = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP}
"""Another file system, or one without links, a file of somebody else, or one that has many names. Source: link(2)."""

_STAGED_BYTES = 200
"""How much of a name is left in the one that it has for a moment."""

_ATTEMPTS = 5
"""How often a folder may vanish (emptied by a `delete`) between making and using it before we give up."""


class LocalStorage(Storage):
    """Stores each key as one file below `root`, which the first write creates."""

    def __init__(self, root: Path) -> None:
        self._base = str(root.absolute())
        self._exclusive = True
        self._meter = RequestMeter()

    @override
    def __repr__(self) -> str:
        return f"LocalStorage({self._base!r})"

    @property
    @override
    def url(self) -> str:
        return self._base

    @property
    @override
    def exclusive(self) -> bool:
        """True until a `put_new` finds that this file system has no step for it."""
        return self._exclusive

    @override
    def get(self, key: str) -> bytes:
        with self._meter.time("get") as timed, self._errors(key), open(self._path(key), "rb", buffering=0) as file:
            data = file.readall()
            timed.bytes = len(data)
            return data

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self._meter.time("get_ranges") as timed, self._open(key) as fd:
            parts = [self._read(fd, key, start, stop) for start, stop in ranges]
            timed.bytes = sum(map(len, parts))
            return parts

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        view = memoryview(target).cast("B")
        with self._meter.time("read_into") as timed, self._open(key) as fd:
            self._fill(fd, key, start, view)
            timed.bytes = len(view)

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        path = self._path(key)
        with self._meter.time("put") as timed:
            with self._errors(key, writing=True), _written(path, chunks) as new:
                new.name_or_replace(path)
            timed.bytes = sum(memoryview(chunk).nbytes for chunk in chunks)

    @override
    def put_hint(self, key: str, *chunks: Buffer) -> None:
        path = self._path(key)
        with self._meter.time("put") as timed:
            with self._errors(key, writing=True), _written(path, chunks, flush=False) as new:
                with suppress(FileNotFoundError):
                    # What a rename replaces is on its way to the disk before it returns: 0.12 ms where this takes 0.03
                    # (ext4 and its auto_da_alloc, 2026-11-28).
                    os.unlink(path)
                with suppress(FileExistsError):  # Another was faster, and its hint is as good.
                    os.rename(new.staged, path) if new.named else new.name(path)
                    new.named = False
            timed.bytes = sum(memoryview(chunk).nbytes for chunk in chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        path = self._path(key)
        with self._meter.time("put_new") as timed:
            if os.path.lexists(path):
                raise conflict(key=key, url=self._base)
            with self._errors(key, writing=True), _written(path, chunks) as new:
                try:
                    self._name_if_free(new.staged, path) if new.named else new.name(path)
                except FileExistsError:
                    raise conflict(key=key, url=self._base) from None
            timed.bytes = sum(memoryview(chunk).nbytes for chunk in chunks)

    @override
    def adopt(self, key: str, path: Path) -> bool:
        target = self._path(key)
        folder = os.path.dirname(target)
        with self._errors(key, writing=True):
            _make_folder(folder)
            try:
                os.link(path, target)
            except FileExistsError:
                raise conflict(key=key, url=self._base) from None
            except OSError as error:
                if error.errno in _NO_SECOND_NAME:
                    return False
                raise
            _flush_folder(folder)
        return True

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        self._meter.add("list", OperationStatistics(requests=1))  # A walk is as slow as its reader: not timed.
        yield from self._walk(f"{check_key(folder)}/" if folder else "")

    @override
    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._meter.time("delete"):
            try:
                os.unlink(path)
            except OSError as error:
                if error.errno in ABSENT:
                    return
                raise explain(error, key=key, url=self._base, writing=True) from None
        # Empty folders would pile up under retention; the first one in use stops the climb by refusing to go.
        with suppress(OSError):
            for parent in Path(key).parents[:-1]:
                os.rmdir(f"{self._base}/{parent}")

    @override
    def stat(self, key: str) -> Stat:
        with self._meter.time("stat"), self._errors(key):
            found = os.stat(self._path(key))
        if stat.S_ISDIR(found.st_mode):
            raise missing(key=key, url=self._base)
        return Stat(key=key, size_bytes=found.st_size, modified=found.st_mtime)

    @override
    def local_path(self, key: str) -> Path | None:
        path = Path(self._path(key))
        return path if path.is_file() else None

    @override
    def clear_unfinished(self, *, before: float, dry_run: bool = False) -> Sequence[Stat]:
        found = [stat for stat in self._walk("", unfinished=True) if stat.modified < before]
        for left in found if not dry_run else ():
            with self._errors(left.key, writing=True), suppress(FileNotFoundError):
                os.unlink(f"{self._base}/{left.key}")
        return found

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        return self._meter.statistics()

    def _path(self, key: str) -> str:
        return f"{self._base}/{check_key(key)}"

    @contextmanager
    def _errors(self, key: str, *, writing: bool = False) -> Iterator[None]:
        """Turn what the kernel says inside the block into errors of ours."""
        try:
            yield
        except DatastoreError:  # Some of ours are OSErrors, too.
            raise
        except OSError as error:
            raise explain(error, key=key, url=self._base, writing=writing) from None

    @contextmanager
    def _open(self, key: str) -> Iterator[int]:
        with self._errors(key):
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield fd
            finally:
                os.close(fd)

    def _read(self, fd: int, key: str, start: int, stop: int) -> bytes:
        data = os.pread(fd, stop - start, start)
        if len(data) == stop - start:
            return data
        whole = bytearray(stop - start)  # More than one system call moves, or the end: filling tells which.
        self._fill(fd, key, start, memoryview(whole))
        return bytes(whole)

    def _fill(self, fd: int, key: str, start: int, rest: memoryview) -> None:
        stop = start + len(rest)
        while rest:
            count = os.preadv(fd, [rest[:_MAX_IO_BYTES]], stop - len(rest))
            if count == 0:
                raise too_short(key=key, url=self._base, wanted_bytes=stop)
            rest = rest[count:]

    def _name_if_free(self, staged: str, path: str) -> None:
        try:
            name_if_free(staged, path)
        except Unsupported:
            self._exclusive = False
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
            os.replace(staged, path)

    def _walk(self, prefix: str, *, unfinished: bool = False) -> Iterator[Stat]:
        """Yield the keys below `prefix` ("" or ending in "/"): `a.txt` sorts before `a/b`, as whole keys do.

        With `unfinished`, only the hidden files that killed writers left.
        """
        try:
            with os.scandir(f"{self._base}/{prefix}") as entries:
                found = sorted((f"{entry.name}/" if entry.is_dir() else entry.name, entry) for entry in entries)
        except OSError as error:
            if error.errno in ABSENT:
                return
            raise explain(error, key=prefix, url=self._base) from None
        for name, entry in found:
            if name.endswith("/"):
                yield from self._walk(prefix + name, unfinished=unfinished)
            elif (name.startswith(".") and name.endswith(".tmp")) == unfinished:
                with suppress(FileNotFoundError):  # Deleted since.
                    facts = entry.stat()
                    yield Stat(key=prefix + name, size_bytes=facts.st_size, modified=facts.st_mtime)


class _NewFile:
    """A file on its way to its name: without one, or called `staged`, beside where it will be."""

    def __init__(self, path: str) -> None:
        self.folder, name = os.path.split(path)
        # A name may have 255 bytes, and what is added to it is 39 more.
        short = os.fsdecode(os.fsencode(name)[:_STAGED_BYTES])
        self.staged = f"{self.folder}/.{short}.{uuid.uuid4().hex}.tmp"
        self.fd, self.named = _create(self.folder, self.staged)

    def name_or_replace(self, path: str) -> None:
        """Give the file the name `path`, whatever has had it."""
        if not self.named:
            with suppress(FileExistsError):
                return self.name(path)
            self.name(self.staged)
            self.named = True
        os.replace(self.staged, path)
        self.named = False  # Nothing is left to remove.
        return None

    def name(self, path: str) -> None:
        """Give the file, which has no name, the name `path`; a `delete` may have emptied and removed its folder meanwhile.

        Raises:
            FileExistsError: there is such a file.
        """
        for last in range(_ATTEMPTS, -1, -1):
            try:
                # With a folder's descriptor Python calls linkat(2), which follows the link in /proc; link(2) does not.
                return _linkat(f"/proc/self/fd/{self.fd}", path, src_dir_fd=self.fd, follow_symlinks=True)
            except FileNotFoundError:
                if not last:
                    raise
            with suppress(FileNotFoundError):
                _make_folder(self.folder)
        return None


@contextmanager
def _written(path: str, chunks: Sequence[Buffer], *, flush: bool = True) -> Iterator[_NewFile]:
    """Yield a file that holds the chunks, to be called `path`; with `flush`, it and then its folder are flushed."""
    new = _NewFile(path)
    try:
        write_all(new.fd, chunks)
        if flush:
            os.fdatasync(new.fd) if sys.platform != "darwin" else os.fsync(new.fd)
        yield new
    finally:
        os.close(new.fd)
        if new.named:
            with suppress(OSError):
                os.unlink(new.staged)
    if flush:
        _flush_folder(new.folder)


def _create(folder: str, staged: str) -> tuple[int, bool]:
    """Return a descriptor of a new file, and whether it is called `staged` or nothing; make its folder if need be."""
    for last in range(_ATTEMPTS, -1, -1):
        try:
            return _open_new(folder, staged)
        except FileNotFoundError:
            if not last:
                raise
        with suppress(FileNotFoundError):
            _make_folder(folder)
    raise AssertionError  # The last attempt returns or raises.


def _open_new(folder: str, staged: str) -> tuple[int, bool]:
    if _ANONYMOUS:
        try:
            return os.open(folder, os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o666), False
        except OSError as error:
            if error.errno not in _NO_ANONYMOUS:
                raise
    return os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), True


def _make_folder(folder: str) -> None:
    """Make `folder` and what is missing above it; flush the parent of each, or a power cut may take its name."""
    if os.path.isdir(folder):
        return
    parent = os.path.dirname(folder)
    _make_folder(parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
    _flush_folder(parent)


def _flush_folder(folder: str) -> None:
    with suppress(FileNotFoundError):  # A `delete` emptied it since, so there is no name left to keep.
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
