"""Storage in the memory of this process, for tests and for trying things out.

`memory://name` names the same bytes wherever it is opened in this process. Nothing survives the process, and no
other process sees it: a forked worker gets a copy. Threads need no lock, because each call is one step of a dictionary.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from typing_extensions import Buffer, override

from datastore.storage.base import Stat, Storage, check_key
from datastore.storage.errors import conflict, missing, too_short
from datastore.storage.statistics import OperationStatistics, RequestMeter

__all__ = ["MemoryStorage"]


_spaces: dict[str, dict[str, tuple[bytes | memoryview, float]]] = {}
"""Every name ever opened in this process: key -> (bytes, time of writing)."""


class MemoryStorage(Storage):
    """The keys stored in this process under `name`."""

    def __init__(self, name: str) -> None:
        self._name = check_key(name)
        self._values = _spaces.setdefault(name, {})
        self._meter = RequestMeter()

    @override
    def __repr__(self) -> str:
        return f"MemoryStorage({self._name!r})"

    @property
    @override
    def url(self) -> str:
        return f"memory://{self._name}"

    @property
    @override
    def exclusive(self) -> bool:
        return True

    @override
    def get(self, key: str) -> bytes:
        with self._meter.time("get") as timed:
            data = bytes(self._find(key)[0])
            timed.bytes = len(data)
            return data

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        with self._meter.time("get_ranges") as timed:
            data = self._find(key)[0]
            parts = [bytes(self._cut(data, key, start, stop)) for start, stop in ranges]
            timed.bytes = sum(map(len, parts))
            return parts

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        view = memoryview(target).cast("B")
        with self._meter.time("read_into") as timed:
            view[:] = self._cut(self._find(key)[0], key, start, start + len(view))
            timed.bytes = len(view)

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        with self._meter.time("put") as timed:
            data = b"".join(chunks)
            self._values[check_key(key)] = (data, time.time())
            timed.bytes = len(data)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        with self._meter.time("put_new") as timed:
            entry = (b"".join(chunks), time.time())
            if self._values.setdefault(check_key(key), entry) is not entry:  # One step, whatever other threads do.
                raise conflict(key=key, url=self.url)
            timed.bytes = len(entry[0])

    def hold(self, key: str, data: memoryview) -> None:
        """Have `key` be `data` itself, without a copy: it must not change as long as the key is there."""
        self._values[check_key(key)] = (data.cast("B"), time.time())

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        prefix = f"{check_key(folder)}/" if folder else ""
        with self._meter.time("list"):
            found = sorted(self._values.copy().items())
        for key, (data, written) in found:
            if key.startswith(prefix):
                yield Stat(key=key, size_bytes=len(data), modified=written)

    @override
    def delete(self, key: str) -> None:
        with self._meter.time("delete"):
            self._values.pop(check_key(key), None)

    @override
    def stat(self, key: str) -> Stat:
        with self._meter.time("stat"):
            data, written = self._find(key)
        return Stat(key=key, size_bytes=len(data), modified=written)

    @override
    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        return self._meter.statistics()

    def _find(self, key: str) -> tuple[bytes | memoryview, float]:
        entry = self._values.get(check_key(key))
        if entry is None:
            raise missing(key=key, url=self.url)
        return entry

    def _cut(self, data: bytes | memoryview, key: str, start: int, stop: int) -> memoryview:
        if stop > len(data):
            raise too_short(key=key, url=self.url, wanted_bytes=stop)
        return memoryview(data)[start:stop]
