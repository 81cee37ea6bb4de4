"""Storage in a zip archive, to be read: a dataset that was put into one opens without being unpacked.

The archive is a key of another storage, so it may lie on a disk, in a bucket or on a web server. Files that are stored, not
compressed (`zip -0`), are read by ranges like files of their own. A compressed one is unpacked as it is read in order; for
a range that lies before the last one, from its beginning. Shards hardly shrink.
"""

import io
import zipfile
import zlib
from calendar import timegm
from collections.abc import Iterator, Sequence
from threading import Lock
from typing import IO

from typing_extensions import Buffer, override

from datastore.errors import ConfigError, CorruptError, FormatError
from datastore.storage.as_fsspec import StoredFile
from datastore.storage.base import ReadOnly, Stat, Storage, check_key
from datastore.storage.errors import missing, too_short
from datastore.storage.statistics import OperationStatistics

__all__ = ["ZipStorage"]

_HEADER_BYTES = 30
"""Of a local file header, before the name. Source: PKWARE, APPNOTE.TXT, 4.3.7."""

_ENCRYPTED = 1
"""The flag of a file with a password."""

_BUFFER_BYTES = 64 * 2**10


class ZipStorage(ReadOnly):
    """The files below `folder` of the archive that is `key` of `outer`. Thread-safe. The archive must not change."""

    def __init__(self, outer: Storage, key: str, *, folder: str = "") -> None:
        self._outer, self._key = outer, check_key(key)
        self._prefix = f"{check_key(folder)}/" if folder else ""
        self._lock = Lock()
        self._archive: zipfile.ZipFile | None = None
        self._starts: dict[str, int] = {}
        self._reading: tuple[str, IO[bytes]] | None = None
        """The compressed file that was read last, and where in it."""

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
        found = self._find(key)
        return self._unpacked(found, 0, found.file_size)

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        found = self._find(key)
        last = max((stop for start, stop in ranges if stop > start), default=0)
        if last > found.file_size:
            raise too_short(key=key, url=self.url, wanted_bytes=last)
        if found.compress_type == zipfile.ZIP_STORED:
            first = self._start(found)
            return self._outer.get_ranges(self._key, [(first + start, first + stop) for start, stop in ranges])
        return [self._unpacked(found, start, stop) for start, stop in ranges]

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        found, view = self._find(key), memoryview(target).cast("B")
        if start + len(view) > found.file_size:
            if view:
                raise too_short(key=key, url=self.url, wanted_bytes=start + len(view))
        elif found.compress_type == zipfile.ZIP_STORED:
            self._outer.read_into(self._key, self._start(found) + start, view)
        else:
            view[:] = self._unpacked(found, start, start + len(view))

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        below = f"{self._prefix}{check_key(folder)}/" if folder else self._prefix
        for found in sorted(self._open().infolist(), key=lambda info: info.filename):
            if found.filename.startswith(below) and not found.is_dir() and _is_key(found.filename):
                yield _stat(found, found.filename[len(self._prefix) :])

    @override
    def stat(self, key: str) -> Stat:
        return _stat(self._find(key), key)

    def odd_files(self) -> tuple[Sequence[str], Sequence[str]]:
        """Return the names that no key can have, such as `../x`, and the keys of files that are encrypted."""
        files = [found for found in self._open().infolist() if not found.is_dir()]
        odd = [found.filename for found in files if not _is_key(found.filename)]
        return odd, [found.filename for found in files if found.flag_bits & _ENCRYPTED]

    def _unpacked(self, found: zipfile.ZipInfo, start: int, stop: int) -> bytes:
        """Return a range of a file; its checksum is checked where it is read in order to its end."""
        archive = self._open()
        try:
            with self._lock:
                if self._reading is None or self._reading[0] != found.filename or self._reading[1].tell() > start:
                    self._reading = (found.filename, archive.open(found))
                file = self._reading[1]
                if file.tell() < start:
                    file.seek(start)
                return file.read(max(0, stop - start))
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            self._reading = None
            raise CorruptError(
                f"a file in a zip archive cannot be unpacked: {error}",
                where=f"{self.url.rstrip('/')}/{found.filename}",
                hint="Make the archive again, with deflate and without a password.",
            ) from None

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


def _stat(found: zipfile.ZipInfo, key: str) -> Stat:
    """Return the facts of a file. A zip tells time in steps of two seconds; the checksum stands for what is finer."""
    try:
        seconds = timegm((*found.date_time, 0, 0, 0))
    except ValueError:  # Month 0 or so, as some tools write it.
        seconds = 0
    return Stat(key=key, size_bytes=found.file_size, modified=seconds + found.CRC / 2**32)


def _is_key(name: str) -> bool:
    try:
        check_key(name)
    except ConfigError:
        return False
    return True
