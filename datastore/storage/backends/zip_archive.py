"""Storage in a zip archive, to be read: a dataset that was put into one opens without being unpacked.

The archive is a key of another storage, so it may lie on a disk, in a bucket or on a web server. Files that are stored, not
compressed (`zip -0`), are read by ranges like files of their own; a compressed one is unpacked from its beginning for
each read, and shards hardly shrink.
"""

import io
import zipfile
from collections.abc import Iterator, Sequence
from threading import Lock

from typing_extensions import Buffer, override

from datastore.errors import ConfigError, FormatError
from datastore.storage.as_fsspec import StoredFile
from datastore.storage.base import ReadOnly, Stat, Storage, check_key
from datastore.storage.errors import missing, too_short
from datastore.storage.statistics import OperationStatistics

__all__ = ["ZipStorage"]

_HEADER_BYTES = 30
"""Of a local file header, before the name. Source: PKWARE, APPNOTE.TXT, 4.3.7."""

_BUFFER_BYTES = 64 * 2**10


class ZipStorage(ReadOnly):
    """The files below `folder` of the archive that is `key` of `outer`. Thread-safe. The archive must not change."""

    def __init__(self, outer: Storage, key: str, *, folder: str = "") -> None:
        self._outer, self._key = outer, check_key(key)
        self._prefix = f"{check_key(folder)}/" if folder else ""
        self._lock = Lock()
        self._archive: zipfile.ZipFile | None = None
        self._starts: dict[str, int] = {}

    @override
    def __repr__(self) -> str:
        return f"ZipStorage({self._outer!r}, {self._key!r}, folder={self._prefix.rstrip('/')!r})"

    @property
    @override
    def url(self) -> str:
        outer = self._outer.url
        where = f"{outer.rstrip('/')}/{self._key}"
        inner = self._prefix.rstrip("/")
        return f"zip://{inner}::{where}" if "://" in outer else f"zip://{where}{'/' if inner else ''}{inner}"

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        return self._outer.statistics()

    @override
    def get(self, key: str) -> bytes:
        return self._open().read(self._find(key))

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        found = self._find(key)
        last = max((stop for start, stop in ranges if stop > start), default=0)
        if last > found.file_size:
            raise too_short(key=key, url=self.url, wanted_bytes=last)
        if found.compress_type == zipfile.ZIP_STORED:
            first = self._start(found)
            return self._outer.get_ranges(self._key, [(first + start, first + stop) for start, stop in ranges])
        data = self._open().read(found)
        return [data[start:stop] for start, stop in ranges]

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        found, view = self._find(key), memoryview(target).cast("B")
        if start + len(view) > found.file_size:
            if view:
                raise too_short(key=key, url=self.url, wanted_bytes=start + len(view))
        elif found.compress_type == zipfile.ZIP_STORED:
            self._outer.read_into(self._key, self._start(found) + start, view)
        else:
            with self._open().open(found) as file:
                file.seek(start)
                view[:] = file.read(len(view))

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        below = f"{self._prefix}{check_key(folder)}/" if folder else self._prefix
        for found in sorted(self._open().infolist(), key=lambda info: info.filename):
            if found.filename.startswith(below) and not found.is_dir() and _is_key(found.filename):
                yield Stat(key=found.filename[len(self._prefix) :], size_bytes=found.file_size, modified=0.0)

    @override
    def stat(self, key: str) -> Stat:
        return Stat(key=key, size_bytes=self._find(key).file_size, modified=0.0)

    def _open(self) -> zipfile.ZipFile:
        with self._lock:
            if self._archive is None:
                file = io.BufferedReader(StoredFile(self._outer, self._key), _BUFFER_BYTES)
                try:
                    self._archive = zipfile.ZipFile(file)
                except zipfile.BadZipFile:
                    raise FormatError(
                        "not a zip archive", key=self._key, url=self._outer.url, hint="Check the URL, or make it again."
                    ) from None
            return self._archive

    def _find(self, key: str) -> zipfile.ZipInfo:
        name = f"{self._prefix}{check_key(key)}"
        try:
            return self._open().getinfo(name)
        except KeyError:
            raise missing(key=key, url=self.url) from None

    def _start(self, found: zipfile.ZipInfo) -> int:
        """Return where in the archive the bytes of a stored file begin: the length of its header stands in the header."""
        name = found.filename
        if name not in self._starts:
            start = found.header_offset
            header = self._outer.get_ranges(self._key, [(start, start + _HEADER_BYTES)])[0]
            lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            self._starts[name] = start + _HEADER_BYTES + lengths
        return self._starts[name]


def _is_key(name: str) -> bool:
    try:
        check_key(name)
    except ConfigError:
        return False
    return True
