"""The contract of a storage that can only be read, as tests that a backend inherits.

    class TestMyArchive(ReadOnlyContract):
        @pytest.fixture
        def storage(self) -> Storage:                 # holds CONTENT, however it got there
            return open_storage("mine://archive")

What it promises it promises as any `Storage` does; what would write is refused and says so.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import ClassVar

from datastore.errors import ConfigError, MissingError, StorageError
from datastore.storage.base import Stat, Storage
from datastore.storage.wrappers import Subfolder
from datastore.testing.storage import raises

__all__ = ["CONTENT", "ReadOnlyContract"]

CONTENT: Mapping[str, bytes] = {
    "a/b/c.bin": bytes(range(256)),
    "a/k": b"0123456789",
    "a-b": b"x",
    "empty": b"",
    "large": bytes(range(251)) * 40_000,
    "two words/100% a+b 'quoted' ü#?.txt": b"name",
}
"""What the storage holds. All of it is read."""


class ReadOnlyContract:
    """What every storage that can only be read promises. Subclass it and give a `storage` fixture."""

    lists: ClassVar[bool] = True
    """Whether it can be listed."""

    def test_each_key_has_its_bytes(self, storage: Storage) -> None:
        for key, value in CONTENT.items():
            assert storage.get(key) == value
            assert storage.stat(key).size_bytes == len(value)

    def test_ranges_come_in_the_order_asked(self, storage: Storage) -> None:
        assert storage.get_ranges("a/k", [(7, 10), (0, 1), (2, 2), (0, 10)]) == [b"789", b"0", b"", b"0123456789"]
        assert storage.get_ranges("a/k", []) == []
        far = [(9_000_000, 9_000_005), (3, 5), (1_000_000, 1_000_100)]
        assert storage.get_ranges("large", far) == [CONTENT["large"][start:stop] for start, stop in far]

    def test_read_into_fills_the_target_from_the_start_given(self, storage: Storage) -> None:
        target = bytearray(b"........")
        storage.read_into("a/k", 2, memoryview(target)[1:5])
        assert target == b".2345..."
        large = bytearray(2**20)
        storage.read_into("large", 12_345, large)
        assert large == CONTENT["large"][12_345 : 12_345 + 2**20]
        storage.read_into("a/k", 0, bytearray())

    def test_a_range_past_the_end_is_refused(self, storage: Storage) -> None:
        for outside in ((5, 11), (10, 11), (20, 30)):
            with raises(StorageError):
                storage.get_ranges("a/k", [(0, 2), outside])
        for start in (8, 10, 99):
            with raises(StorageError):
                storage.read_into("a/k", start, bytearray(3))

    def test_a_key_that_is_not_there_is_missing_and_so_is_a_folder(self, storage: Storage) -> None:
        for key in ("no/such/key", "a/b", "a"):
            for read in _reads(storage, key):
                with raises(MissingError):
                    read()

    def test_a_key_that_leaves_the_root_is_refused(self, storage: Storage) -> None:
        for key in ("", "/etc/passwd", "../up", "a/../../up", "a//b", "a\0b"):
            for read in _reads(storage, key):
                with raises(ConfigError):
                    read()

    def test_a_listing_is_whole_or_refused(self, storage: Storage) -> None:
        if not self.lists:
            with raises(ConfigError):
                list(storage.list())
            return
        found = [Stat(key=stat.key, size_bytes=stat.size_bytes, modified=0.0) for stat in storage.list()]
        assert found == [Stat(key=key, size_bytes=len(CONTENT[key]), modified=0.0) for key in sorted(CONTENT)]
        assert [stat.key for stat in storage.list("a")] == ["a/b/c.bin", "a/k"]
        assert list(storage.list("nothing/here")) == []
        assert list(storage.list()) == [storage.stat(key) for key in sorted(CONTENT)]

    def test_writing_is_refused_and_changes_nothing(self, storage: Storage) -> None:
        writes: list[Callable[[], object]] = [
            partial(storage.put, "a/k", b"new"),
            partial(storage.put_new, "fresh", b"new"),
            partial(storage.delete, "a/k"),
        ]
        for write in writes:
            with raises(ConfigError):
                write()
        assert storage.get("a/k") == CONTENT["a/k"]
        assert not storage.exclusive

    def test_a_subfolder_is_a_view_of_the_same_bytes(self, storage: Storage) -> None:
        below = Subfolder(storage, "a/b")
        assert below.get("c.bin") == CONTENT["a/b/c.bin"]

    def test_what_is_read_is_counted(self, storage: Storage) -> None:
        storage.get_ranges("a/k", [(0, 4)])
        counted = storage.statistics()["get_ranges"]
        assert counted.requests > 0
        assert counted.bytes >= 4


def _reads(storage: Storage, key: str) -> list[Callable[[], object]]:
    return [
        lambda: storage.get(key),
        lambda: storage.get_ranges(key, [(0, 1)]),
        lambda: storage.read_into(key, 0, bytearray(1)),
        lambda: storage.stat(key),
    ]
