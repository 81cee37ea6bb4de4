"""The contract itself is checked: each way to break a storage is caught by the test that names the promise."""

import threading
import uuid
from collections.abc import Iterator, Sequence

import pytest
from typing_extensions import Buffer, override

from datastore.errors import MissingError
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Stat, Storage, check_key
from datastore.storage.errors import conflict
from datastore.testing.storage import StorageContract

PAUSE = threading.Event()


class LooksThenWrites(MemoryStorage):
    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        if any(found.key == key for found in self.list()):
            raise conflict(key=key, url=self.url)
        PAUSE.wait(0.001)
        self.put(key, *chunks)


class Overwrites(MemoryStorage):
    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        self.put(key, *chunks)


class WritesInPlace(MemoryStorage):
    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        whole = b"".join(chunks)
        super().put(key, whole[: len(whole) // 2])
        PAUSE.wait(0.001)
        super().put(key, whole)


class ShowsUnfinishedWrites(MemoryStorage):
    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        self._values[f"{key}.tmp"] = (b"", 0.0)
        PAUSE.wait(0.001)
        super().put(key, *chunks)
        del self._values[f"{key}.tmp"]


class ForgetsLaterChunks(MemoryStorage):
    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        super().put(key, *chunks[:1])


class CutsRangesShort(MemoryStorage):
    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.get(key)[start:stop] for start, stop in ranges]


class SortsRanges(MemoryStorage):
    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return super().get_ranges(key, sorted(ranges))


class IgnoresTheStart(MemoryStorage):
    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        super().read_into(key, 0, target)


class FillsWhatItHas(MemoryStorage):
    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        data = self.get(key)[start : start + memoryview(target).nbytes]
        memoryview(target).cast("B")[: len(data)] = data


class ListsByFolder(MemoryStorage):
    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        yield from sorted(super().list(folder), key=lambda found: found.key.split("/"))


class ListsByPrefix(MemoryStorage):
    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        yield from (found for found in super().list() if found.key.startswith(folder))


class ListsOneLevel(MemoryStorage):
    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        depth = folder.count("/") + 2 if folder else 1
        yield from (found for found in super().list(folder) if found.key.count("/") < depth)


class InsistsOnDeleting(MemoryStorage):
    @override
    def delete(self, key: str) -> None:
        self.get(key)
        super().delete(key)


class DeletesFolders(MemoryStorage):
    @override
    def delete(self, key: str) -> None:
        super().delete(key)
        for found in list(self.list(key)):
            super().delete(found.key)


class MissesQuietly(MemoryStorage):
    @override
    def get(self, key: str) -> bytes:
        try:
            return super().get(key)
        except MissingError:
            return b""


class TakesAnyKey(MemoryStorage):
    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        super().put(key if is_valid(key) else "other", *chunks)


class SaysItIsExclusive(Overwrites):
    """And is not: the gateways that ignore If-None-Match."""


def is_valid(key: str) -> bool:
    try:
        check_key(key)
    except ValueError:
        return False
    return True


BROKEN: list[tuple[type[MemoryStorage], str]] = [
    (LooksThenWrites, "test_of_many_concurrent_put_new_exactly_one_wins"),
    (Overwrites, "test_put_new_refuses_a_second_write_and_keeps_the_first"),
    (Overwrites, "test_put_new_never_overwrites_what_put_wrote"),
    (WritesInPlace, "test_readers_during_a_put_see_the_old_or_the_new_bytes"),
    (ShowsUnfinishedWrites, "test_unfinished_writes_never_show"),
    (ForgetsLaterChunks, "test_chunks_of_any_kind_are_laid_end_to_end"),
    (CutsRangesShort, "test_a_range_past_the_end_is_refused"),
    (SortsRanges, "test_ranges_come_in_the_order_asked"),
    (IgnoresTheStart, "test_read_into_fills_the_target_from_the_start_given"),
    (FillsWhatItHas, "test_read_into_past_the_end_is_refused"),
    (ListsByFolder, "test_list_is_deep_and_in_lexicographic_order"),
    (ListsByPrefix, "test_list_of_a_folder_holds_only_what_is_below_it"),
    (ListsOneLevel, "test_list_of_a_folder_holds_only_what_is_below_it"),
    (DeletesFolders, "test_a_folder_is_not_a_key"),
    (MissesQuietly, "test_a_key_that_is_not_there_is_missing"),
    (TakesAnyKey, "test_a_key_that_leaves_the_root_is_refused"),
    (SaysItIsExclusive, "test_the_probe_agrees_with_the_storage_and_leaves_nothing"),
]


def run(promise: str, storage: Storage) -> None:
    getattr(StorageContract(), promise)(storage)


@pytest.mark.parametrize(("broken", "promise"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_storage_is_caught(broken: type[MemoryStorage], promise: str) -> None:
    run(promise, MemoryStorage(uuid.uuid4().hex))
    with pytest.raises((AssertionError, MissingError)):
        run(promise, broken(uuid.uuid4().hex))


def test_a_storage_that_insists_on_deleting_is_caught() -> None:
    with pytest.raises(MissingError):
        run("test_deleting_is_idempotent", InsistsOnDeleting(uuid.uuid4().hex))


def test_the_contract_needs_no_pytest() -> None:
    import subprocess
    import sys

    program = "import sys; sys.modules['pytest'] = None; import datastore.testing.storage"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
