"""The contract of `Storage` as tests that a backend inherits.

    class TestMyStorage(StorageContract):
        between_processes = True                      # other processes reach it by its URL

        @pytest.fixture
        def storage(self) -> Storage:                 # empty, and of its own for each test
            return open_storage(f"mine://{uuid.uuid4().hex}")

Needs nothing but this package: pytest collects the subclass and supplies `storage`; another runner may call each
`test_...` method with a fresh storage itself. With pytest, `pytest.register_assert_rewrite("datastore.testing.storage")`
in `conftest.py` makes failures show their values.

The races are real threads and processes, so a broken backend fails some of the time; raise `rounds` to be surer.
"""

import multiprocessing
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import ClassVar, TypeVar

from datastore.errors import ConfigError, ConflictError, MissingError, StorageError
from datastore.storage.base import Storage, probe_exclusive
from datastore.storage.resolve import open_storage
from datastore.storage.wrappers import Subfolder

__all__ = ["StorageContract", "raises"]

T = TypeVar("T")

_WRITERS = 8
_PROCESSES = 4
_OUTSIDE = ("", "/etc/passwd", "../up", "a/../../up", "a//b", "a/", "./a", "a/.b.tmp", "a\\b", "a\nb", "a\0b", "\ud800")


class StorageContract:
    """What every storage promises. Subclass it and give a `storage` fixture."""

    between_processes: ClassVar[bool] = False
    """Whether another process that opens `storage.url` sees the same bytes."""

    rounds: ClassVar[int] = 40
    """How often each race is run."""

    large_bytes: ClassVar[int] = 24 * 2**20
    """Size of the value that is written in several chunks."""

    def test_what_was_put_is_what_is_read(self, storage: Storage) -> None:
        storage.put("a/b/c.bin", bytes(range(256)))
        assert storage.get("a/b/c.bin") == bytes(range(256))

    def test_chunks_of_any_kind_are_laid_end_to_end(self, storage: Storage) -> None:
        numbers = array("H", [1, 2, 3])
        storage.put("k", b"ab", bytearray(b"cd"), memoryview(b"xefx")[1:3], numbers)
        storage.put_new("n", b"ab", bytearray(b"cd"), memoryview(b"xefx")[1:3], numbers)
        assert storage.get("k") == storage.get("n") == b"abcdef" + numbers.tobytes()

    def test_a_large_value_in_several_chunks_comes_back_unharmed(self, storage: Storage) -> None:
        block = bytes(range(251)) * (self.large_bytes // 251 // 3)
        storage.put("large", block, memoryview(block), bytearray(block))
        storage.put_new("large-new", block, block, block)
        assert storage.get("large") == block * 3
        assert storage.get("large-new") == block * 3
        assert storage.stat("large").size_bytes == len(block) * 3

    def test_an_empty_value_is_a_value(self, storage: Storage) -> None:
        storage.put("nothing")
        storage.put("empty", b"")
        assert storage.get("nothing") == storage.get("empty") == b""
        assert storage.stat("empty").size_bytes == 0
        assert [found.key for found in storage.list()] == ["empty", "nothing"]

    def test_put_replaces_what_was_there(self, storage: Storage) -> None:
        storage.put("k", b"a long first value")
        storage.put("k", b"short")
        assert storage.get("k") == b"short"
        assert storage.stat("k").size_bytes == 5

    def test_a_hint_is_read_as_it_was_put_last(self, storage: Storage) -> None:
        for value in (b"a long first value", b"short", b"longer again"):
            storage.put_hint("a/hint", value)
            assert storage.get("a/hint") == value
        assert [found.key for found in storage.list()] == ["a/hint"]

    def test_put_new_refuses_a_second_write_and_keeps_the_first(self, storage: Storage) -> None:
        storage.put_new("k", b"first")
        with raises(ConflictError):
            storage.put_new("k", b"second")
        assert storage.get("k") == b"first"

    def test_put_new_never_overwrites_what_put_wrote(self, storage: Storage) -> None:
        storage.put("k", b"first")
        with raises(ConflictError):
            storage.put_new("k", b"second")
        assert storage.get("k") == b"first"

    def test_a_deleted_key_is_free_again(self, storage: Storage) -> None:
        storage.put_new("a/k", b"first")
        storage.delete("a/k")
        storage.put_new("a/k", b"second")
        assert storage.get("a/k") == b"second"

    def test_of_many_concurrent_put_new_exactly_one_wins(self, storage: Storage) -> None:
        if not storage.exclusive:
            return
        with ThreadPoolExecutor(_WRITERS) as pool:
            for round_ in range(self.rounds):
                key = f"race/{round_}"
                winners = [who for who in pool.map(partial(_try, storage, key), range(_WRITERS)) if who >= 0]
                assert len(winners) == 1, f"{len(winners)} writers won {key}"
                assert storage.get(key) == _value(winners[0])

    def test_of_many_processes_exactly_one_put_new_wins(self, storage: Storage) -> None:
        if not (self.between_processes and storage.exclusive):
            return
        with ProcessPoolExecutor(_PROCESSES, mp_context=multiprocessing.get_context("spawn")) as pool:
            tasks = [pool.submit(_race, storage.url, self.rounds, who) for who in range(_PROCESSES)]
            won = [key for task in tasks for key in task.result(timeout=120)]
        assert sorted(won) == sorted(f"race/{round_}" for round_ in range(self.rounds))

    def test_another_process_reads_what_this_one_wrote(self, storage: Storage) -> None:
        if not self.between_processes:
            return
        storage.put("k", b"value")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(_get, storage.url, "k").result(timeout=60) == b"value"

    def test_readers_during_a_put_see_the_old_or_the_new_bytes(self, storage: Storage) -> None:
        values = [bytes([number]) * (300_000 + number) for number in (1, 2)]
        storage.put("k", values[0])

        def write() -> None:
            for round_ in range(self.rounds):
                storage.put("k", values[round_ % 2])

        assert set(_sample(write, lambda: storage.get("k"))) <= set(values)

    def test_readers_during_a_put_new_see_nothing_or_all(self, storage: Storage) -> None:
        value = bytes(300_000)
        seen: list[bytes | None] = []

        def read(key: str) -> bytes | None:
            try:
                return storage.get(key)
            except MissingError:
                return None

        for round_ in range(self.rounds):
            key = f"fresh/{round_}"
            seen += _sample(partial(storage.put_new, key, value), partial(read, key))
        assert all(found in (None, value) for found in seen)

    def test_concurrent_writers_of_different_keys_lose_nothing(self, storage: Storage) -> None:
        keys = [f"{number % 3}/{number}" for number in range(max(self.rounds, _WRITERS))]
        with ThreadPoolExecutor(_WRITERS) as pool:
            list(pool.map(lambda key: storage.put(key, key.encode()), keys))
        assert [found.key for found in storage.list()] == sorted(keys)
        assert all(storage.get(key) == key.encode() for key in keys)

    def test_writers_survive_a_delete_that_empties_their_folder(self, storage: Storage) -> None:
        def put_and_delete(who: int) -> None:
            for _ in range(self.rounds):
                storage.put(f"deep/er/{who}", b"x")
                storage.delete(f"deep/er/{who}")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(put_and_delete, range(4)))
        assert list(storage.list()) == []

    def test_ranges_come_in_the_order_asked(self, storage: Storage) -> None:
        storage.put("k", b"0123456789")
        assert storage.get_ranges("k", [(7, 10), (0, 1), (2, 2), (0, 10), (7, 9)]) == [
            b"789", b"0", b"", b"0123456789", b"78",
        ]  # fmt: skip
        assert storage.get_ranges("k", []) == []

    def test_many_ranges_at_once_are_all_right(self, storage: Storage) -> None:
        data = bytes(range(256)) * 64
        storage.put("k", data)
        ranges = [(start, start + 100) for start in range(0, 16_000, 251)]
        assert storage.get_ranges("k", ranges) == [data[start:stop] for start, stop in ranges]

    def test_a_range_past_the_end_is_refused(self, storage: Storage) -> None:
        storage.put("k", b"0123456789")
        for outside in ((5, 11), (10, 11), (20, 30)):
            with raises(StorageError):
                storage.get_ranges("k", [(0, 2), outside])

    def test_read_into_fills_the_target_from_the_start_given(self, storage: Storage) -> None:
        storage.put("k", b"0123456789")
        target = bytearray(b"........")
        storage.read_into("k", 2, memoryview(target)[1:5])
        assert target == b".2345..."
        storage.read_into("k", 2, target)
        assert target == b"23456789"

    def test_read_into_takes_any_item_size_and_an_empty_target(self, storage: Storage) -> None:
        numbers = array("I", range(1000))
        storage.put("k", numbers)
        target = array("I", bytes(4 * 990))
        storage.read_into("k", 40, target)
        assert target == numbers[10:]
        storage.read_into("k", 0, bytearray())

    def test_read_into_past_the_end_is_refused(self, storage: Storage) -> None:
        storage.put("k", b"0123456789")
        for start in (8, 10, 99):
            with raises(StorageError):
                storage.read_into("k", start, bytearray(3))

    def test_a_key_that_is_not_there_is_missing(self, storage: Storage) -> None:
        for read in _reads(storage, "no/such/key"):
            with raises(MissingError):
                read()

    def test_a_folder_is_not_a_key(self, storage: Storage) -> None:
        storage.put("folder/k", b"x")
        for read in _reads(storage, "folder"):
            with raises(MissingError):
                read()
        storage.delete("folder")
        assert storage.get("folder/k") == b"x"

    def test_deleting_is_idempotent(self, storage: Storage) -> None:
        storage.put("a/k", b"x")
        storage.delete("a/k")
        storage.delete("a/k")
        storage.delete("never/there")
        assert list(storage.list()) == []
        with raises(MissingError):
            storage.get("a/k")

    def test_deleting_one_key_leaves_its_neighbours(self, storage: Storage) -> None:
        for key in ("a/b/1", "a/b/2", "a/3", "a-b"):
            storage.put(key, b"x")
        storage.delete("a/b/1")
        assert [found.key for found in storage.list()] == ["a-b", "a/3", "a/b/2"]

    def test_list_is_deep_and_in_lexicographic_order(self, storage: Storage) -> None:
        keys = ["a-b", "a.txt", "a/b", "a/c/d/e", "a/c0", "a0", "ab/c", "b", "zebra", "Zoo", "é"]
        for key in keys:
            storage.put(key, key.encode())
        found = list(storage.list())
        assert [stat.key for stat in found] == sorted(keys)
        assert [stat.size_bytes for stat in found] == [len(key.encode()) for key in sorted(keys)]

    def test_list_of_a_folder_holds_only_what_is_below_it(self, storage: Storage) -> None:
        for key in ("a/1", "a/b/2", "a/b/c/3", "ab/4", "a.5"):
            storage.put(key, b"x")
        assert [found.key for found in storage.list("a")] == ["a/1", "a/b/2", "a/b/c/3"]
        assert [found.key for found in storage.list("a/b")] == ["a/b/2", "a/b/c/3"]
        assert list(storage.list("nothing/here")) == []
        assert list(storage.list("ab/4")) == []

    def test_a_storage_without_keys_lists_nothing(self, storage: Storage) -> None:
        assert list(storage.list()) == []

    def test_unfinished_writes_never_show(self, storage: Storage) -> None:
        def write() -> None:
            for _ in range(self.rounds):
                storage.put("k/k", bytes(100_000))

        seen = _sample(write, lambda: [found.key for found in storage.list()])
        assert all(keys in ([], ["k/k"]) for keys in seen)
        assert [found.key for found in storage.list()] == ["k/k"]

    def test_stat_and_list_say_the_same(self, storage: Storage) -> None:
        storage.put("a/k", b"12345")
        assert list(storage.list()) == [storage.stat("a/k")]
        written = storage.stat("a/k").modified
        assert written == 0.0 or abs(written - time.time()) < 3600

    def test_a_key_that_leaves_the_root_is_refused(self, storage: Storage) -> None:
        for key in _OUTSIDE:
            writes: list[Callable[[], object]] = [
                partial(storage.put, key, b"x"),
                partial(storage.put_new, key, b"x"),
                partial(storage.delete, key),
                partial(storage.local_path, key),
            ]
            for call in (*writes, *_reads(storage, key)):
                with raises(ConfigError):
                    call()
        assert list(storage.list()) == []

    def test_names_may_hold_what_people_put_into_names(self, storage: Storage) -> None:
        for key in ("two words/a+b", "100% 'quoted'", "wörter/日本語", "a=1,b=2/[x]{y}(z)", "@7~#", ".hidden/.file"):
            storage.put_new(key, key.encode())
            assert storage.get(key) == key.encode()
            assert [found.key for found in storage.list()] == [key]
            storage.delete(key)

    def test_a_subfolder_is_a_view_of_the_same_bytes(self, storage: Storage) -> None:
        below = Subfolder(storage, "a/b")
        below.put("k", b"value")
        assert storage.get("a/b/k") == below.get("k") == b"value"
        assert [found.key for found in below.list()] == ["k"]
        assert below.url == f"{storage.url}/a/b"

    def test_a_local_path_holds_the_bytes_of_the_key(self, storage: Storage) -> None:
        assert storage.local_path("a/k") is None
        storage.put("a/k", b"value")
        path = storage.local_path("a/k")
        assert path is None or path.read_bytes() == b"value"

    def test_the_probe_agrees_with_the_storage_and_leaves_nothing(self, storage: Storage) -> None:
        assert probe_exclusive(storage) == storage.exclusive
        assert list(storage.list()) == []


@contextmanager
def raises(kind: type[Exception]) -> Iterator[None]:
    """Demand that the block raises `kind` (`pytest.raises` without pytest)."""
    try:
        yield
    except kind:
        return
    raise AssertionError(f"{kind.__name__} was not raised")


def _reads(storage: Storage, key: str) -> list[Callable[[], object]]:
    """Return every way to read `key`."""
    return [
        lambda: storage.get(key),
        lambda: storage.get_ranges(key, [(0, 1)]),
        lambda: storage.read_into(key, 0, bytearray(1)),
        lambda: storage.stat(key),
    ]


def _sample(write: Callable[[], None], read: Callable[[], T]) -> list[T]:
    """Return what `read` saw, again and again, while `write` ran in another thread."""
    seen = []
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(write)
        while not task.done():
            seen.append(read())
        task.result()
    return [*seen, read()]


def _value(who: int) -> bytes:
    return f"written by {who} ".encode() * 100


def _try(storage: Storage, key: str, who: int) -> int:
    """Return `who` if its `put_new` won, else -1; a doubtful answer is settled as a commit does: by reading back."""
    try:
        storage.put_new(key, _value(who))
    except ConflictError:
        return -1
    except StorageError as error:
        if not error.transient:
            raise
        return who if storage.get(key) == _value(who) else -1
    return who


def _race(url: str, rounds: int, who: int) -> list[str]:
    """Return the keys that this process won; the processes begin when the storage shows all of them that all are up."""
    storage = open_storage(url)
    storage.put(f"ready/{who}", b"x")
    deadline = time.monotonic() + 60
    while len(list(storage.list("ready"))) < _PROCESSES and time.monotonic() < deadline:
        pass
    return [key for key in (f"race/{round_}" for round_ in range(rounds)) if _try(storage, key, who) >= 0]


def _get(url: str, key: str) -> bytes:
    return open_storage(url).get(key)
