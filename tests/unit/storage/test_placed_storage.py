"""Several roots seen as one storage, when some of them fail, hang, come back, or hold something wrong."""

import threading
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import Buffer, override

from datastore.dataset.log.keys import behind_key, is_data, is_immutable
from datastore.dataset.roots import placement_rules
from datastore.errors import ConflictError, MissingError, StorageError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Root, Stat, Storage
from datastore.storage.hedging import Patience, all_answers, first_answer
from datastore.storage.placed import PlacedStorage
from datastore.storage.rendezvous import rank_roots

SOON = Patience(hedge_s=0.05, read_s=0.3, write_s=0.3)


class Fragile(MemoryStorage):
    """A storage that fails or hangs on demand."""

    def __init__(self) -> None:
        super().__init__(uuid.uuid4().hex)
        self.broken = self.full = False
        self.hung: threading.Event | None = None

    def _trouble(self, key: str) -> None:
        if self.hung is not None:
            self.hung.wait(10)
        if self.broken:
            raise StorageError("input/output error", key=key)

    @override
    def get(self, key: str) -> bytes:
        self._trouble(key)
        return super().get(key)

    @override
    def stat(self, key: str) -> Stat:
        self._trouble(key)
        return super().stat(key)

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        self._trouble(key)
        if self.full:
            raise StorageError("the disk is full", key=key)
        super().put(key, *chunks)


def three(*, copies: int) -> tuple[PlacedStorage, list[Fragile]]:
    disks = [Fragile() for _ in range(3)]
    for disk in disks:
        MemoryStorage.put(disk, "guard", b"x")
    roots = [Root(str(number), disk) for number, disk in enumerate(disks)]
    return PlacedStorage(roots, placement_rules(copies, guard="guard"), patience=SOON), disks


def holders(disks: list[Fragile], key: str) -> list[int]:
    return [number for number, disk in enumerate(disks) if key in disk._values]


def homes(storage: PlacedStorage, key: str) -> list[int]:
    return [int(root.id) for root in storage.homes(key)]


def wait_until(done: object, timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not done() and time.monotonic() < deadline:  # type: ignore[operator]
        threading.Event().wait(0.005)


keys = st.text("abcdef0123456789", min_size=1, max_size=32).map(lambda name: f"shards/{name[:2]}/{name}")
root_ids = st.lists(st.text("0123456789abcdef", min_size=4, max_size=32), min_size=1, max_size=8, unique=True)


@given(root_ids, keys)
def test_every_root_has_its_rank_whatever_order_they_are_named_in(ids: list[str], key: str) -> None:
    ranked = [ids[index] for index in rank_roots(ids, key)]
    assert sorted(ranked) == sorted(ids)
    turned = ids[::-1]
    assert [turned[index] for index in rank_roots(turned, key)] == ranked


@given(root_ids.filter(lambda ids: len(ids) > 1), keys, st.data())
def test_a_root_that_goes_moves_no_file_but_its_own(ids: list[str], key: str, data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(ids))
    left = [name for name in ids if name != gone]
    ranked = [ids[index] for index in rank_roots(ids, key) if ids[index] != gone]
    assert [left[index] for index in rank_roots(left, key)] == ranked


def test_files_are_spread_evenly() -> None:
    first = [rank_roots(["a", "b", "c", "d"], f"shards/{number}")[0] for number in range(4000)]
    assert all(850 < first.count(root) < 1150 for root in range(4))


@pytest.mark.parametrize(
    ("key", "facts"),
    [
        ("shards/ab/x.arrow", {"data", "immutable"}),
        ("docs/ab/x.parquet", {"data", "immutable"}),
        ("parity/ab/x.xor", {"data", "immutable"}),
        ("_parity/x.arrow", {"immutable"}),
        ("_log/00000000000000000001.json", {"immutable"}),
        ("_log/_last", set()),
        ("refs/tags/v1.json", set()),
        ("datastore.json", set()),
        ("shardsx/a", set()),
    ],
)
def test_what_is_data_and_what_never_changes_follows_from_the_key(key: str, facts: set[str]) -> None:
    found = {"data": is_data(key), "immutable": is_immutable(key)}
    assert {name for name, holds in found.items() if holds} == facts


def test_data_lies_on_as_many_roots_as_copies_and_all_else_on_all() -> None:
    storage, disks = three(copies=2)
    storage.put("shards/a", b"x")
    storage.put_new("_log/1", b"x")
    assert holders(disks, "shards/a") == sorted(homes(storage, "shards/a"))
    assert len(holders(disks, "shards/a")) == 2
    assert holders(disks, "_log/1") == [0, 1, 2]


def test_a_read_goes_past_a_root_that_fails() -> None:
    storage, disks = three(copies=2)
    storage.put("shards/a", b"value")
    disks[homes(storage, "shards/a")[0]].broken = True
    assert storage.get("shards/a") == b"value"


def test_a_read_goes_past_a_root_that_hangs_and_then_asks_it_last() -> None:
    storage, disks = three(copies=2)
    storage.put("shards/a", b"value")
    hung = disks[homes(storage, "shards/a")[0]]
    hung.hung = threading.Event()
    started = time.monotonic()
    assert storage.get("shards/a") == b"value"
    first_s = time.monotonic() - started
    started = time.monotonic()
    assert storage.get("shards/a") == b"value"
    assert first_s >= SOON.hedge_s > time.monotonic() - started
    hung.hung.set()


def test_a_late_answer_does_not_write_into_what_was_read() -> None:
    class Late(MemoryStorage):
        go = threading.Event()
        done = threading.Event()

        @override
        def read_into(self, key: str, start: int, target: Buffer) -> None:
            self.go.wait(10)
            memoryview(target)[:] = b"wrong"
            self.done.set()

    late, other = Late(uuid.uuid4().hex), MemoryStorage(uuid.uuid4().hex)
    storage = PlacedStorage([Root("0", late), Root("1", other)], placement_rules(2, guard=""), patience=SOON)
    storage.put("log", b"right")
    target = bytearray(5)
    storage.read_into("log", 0, target)
    late.go.set()
    assert late.done.wait(5)
    assert target == b"right"


def test_all_roots_hanging_is_an_error_in_time() -> None:
    storage, disks = three(copies=2)
    storage.put("shards/a", b"value")
    for disk in disks:
        disk.hung = threading.Event()
    with pytest.raises(StorageError, match="no answer in time"):
        storage.get("shards/a")
    for disk in disks:
        disk.hung.set()  # type: ignore[union-attr]


def test_a_key_is_missing_only_if_roots_that_are_there_say_so() -> None:
    storage, disks = three(copies=1)
    storage.put("shards/a", b"value")
    home = disks[homes(storage, "shards/a")[0]]
    disks[0].delete("guard") if home is not disks[0] else None
    with pytest.raises(MissingError):
        PlacedStorage(storage.roots(), placement_rules(1, guard="")).get("shards/never")
    home._values.clear()  # The empty folder below which a disk is not mounted.
    with pytest.raises(StorageError, match="a root of the dataset is not there"):
        storage.get("shards/a")


def test_a_commit_that_no_root_has_is_missing_though_a_mirror_is_dead() -> None:
    storage, disks = three(copies=3)
    disks[2].broken = True
    with pytest.raises(MissingError):
        storage.get("_log/00000000000000000009.json")


def test_a_missed_write_is_said_and_recorded_and_the_root_believed_no_more(caplog: pytest.LogCaptureFixture) -> None:
    storage, disks = three(copies=3)
    storage.put("refs/tags/t.json", b"old")
    disks[1].broken = True
    storage.put("refs/tags/t.json", b"new")
    assert "missed refs/tags/t.json" in caplog.text
    assert holders(disks, behind_key("1")) == [0, 2]
    disks[1].broken = False
    disks[0].broken = True
    assert storage.get("refs/tags/t.json") == b"new"
    disks[2].broken = True
    assert storage.get("refs/tags/t.json") == b"old"  # It is all that is left.


def test_a_deleted_key_does_not_come_back_with_the_root_that_missed_it() -> None:
    storage, disks = three(copies=3)
    storage.put("refs/tags/t.json", b"x")
    MemoryStorage.delete(disks[1], "guard")
    storage.delete("refs/tags/t.json")
    MemoryStorage.put(disks[1], "guard", b"x")
    with pytest.raises(MissingError):
        storage.get("refs/tags/t.json")
    assert [stat.key for stat in storage.list("refs")] == []


def test_data_that_cannot_go_to_its_root_goes_to_the_next(caplog: pytest.LogCaptureFixture) -> None:
    storage, disks = three(copies=2)
    home = homes(storage, "shards/a")
    disks[home[0]].full = True
    storage.put("shards/a", b"value")
    assert holders(disks, "shards/a") == sorted({0, 1, 2} - {home[0]})
    assert storage.get("shards/a") == b"value"
    assert [stat.key for stat in storage.list("shards")] == ["shards/a"]
    assert "the disk is full" in caplog.text


def test_a_write_that_no_root_takes_is_an_error() -> None:
    storage, disks = three(copies=2)
    for disk in disks:
        disk.full = True
    with pytest.raises(StorageError, match="disk is full"):
        storage.put("shards/a", b"value")


def test_nothing_is_written_without_the_first_root_and_everything_read() -> None:
    storage, disks = three(copies=2)
    storage.put("shards/a", b"value")
    storage.put("refs/tags/t.json", b"x")
    disks[0]._values.clear()
    assert storage.get("shards/a") == b"value"
    assert storage.get("refs/tags/t.json") == b"x"
    for write in (
        lambda: storage.put("shards/b", b"x"),
        lambda: storage.put_new("_log/2", b"x"),
        lambda: storage.delete("_log/1"),
    ):
        with pytest.raises(StorageError, match="--promote"):
            write()
    assert storage.lost() == [disks[0].url]


def test_the_first_root_decides_who_was_first() -> None:
    storage, disks = three(copies=2)
    disks[0].put("_log/1", b"mine")
    with pytest.raises(ConflictError):
        storage.put_new("_log/1", b"other")
    disks[1].put("_log/2", b"left by nobody")
    storage.put_new("_log/2", b"mine")
    assert disks[1].get("_log/2") == b"mine"


def test_a_gap_is_filled_in_the_background() -> None:
    storage, disks = three(copies=2)
    storage.put("shards/a", b"value")
    first = homes(storage, "shards/a")[0]
    disks[first].delete("shards/a")
    assert storage.get("shards/a") == b"value"
    wait_until(lambda: storage.healed)
    assert disks[first].get("shards/a") == b"value"
    assert storage.healed == [("shards/a", disks[first].url)]


def test_only_good_bytes_heal() -> None:
    storage, disks = three(copies=3)
    storage.put("shards/a", b"good")
    order = homes(storage, "shards/a")
    MemoryStorage.put(disks[order[0]], "shards/a", b"evil")
    MemoryStorage.put(disks[order[1]], "shards/a", b"also")
    assert sorted(storage.heal_now("shards/a", lambda raw: raw == b"good")) == sorted(disks[n].url for n in order[:2])
    assert all(disk.get("shards/a") == b"good" for disk in disks)
    assert storage.heal_now("shards/a", lambda raw: raw == b"never") == []
    assert all(disk.get("shards/a") == b"good" for disk in disks)


def test_a_copy_of_what_is_deleted_meanwhile_does_not_stay() -> None:
    storage, disks = three(copies=3)
    source, *others = homes(storage, "shards/a")
    MemoryStorage.put(disks[source], "shards/a", b"good")

    def is_good(raw: bytes) -> bool:
        # Whoever deletes it comes between the reading and the writing.
        MemoryStorage.delete(disks[source], "shards/a")
        return raw == b"good"

    assert storage.heal_now("shards/a", is_good) == []
    assert holders(disks, "shards/a") == []
    assert others


def test_what_is_deleted_goes_from_the_root_that_decides_last(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, disks = three(copies=3)
    storage.put("refs/tags/t.json", b"x")
    left: list[list[int]] = []
    inner = MemoryStorage.delete

    def delete(self: MemoryStorage, key: str) -> None:
        inner(self, key)
        left.append(holders(disks, key))

    monkeypatch.setattr(MemoryStorage, "delete", delete)
    storage.delete("refs/tags/t.json")
    assert left[-1] == []
    assert all(0 in still for still in left[:-1])


def test_what_may_change_is_not_healed_behind_the_back_of_who_changes_it() -> None:
    storage, disks = three(copies=3)
    storage.put("refs/tags/t.json", b"x")
    disks[0].delete("refs/tags/t.json")
    assert storage.get("refs/tags/t.json") == b"x"
    storage.heal("refs/tags/t.json", lambda _: True)
    threading.Event().wait(0.05)
    assert holders(disks, "refs/tags/t.json") == [1, 2]


def test_a_mapped_file_is_the_first_that_is_there(tmp_path: Path) -> None:
    disks = [LocalStorage(tmp_path / str(number)) for number in range(2)]
    storage: Storage = PlacedStorage(
        [Root(str(number), disk) for number, disk in enumerate(disks)], placement_rules(2, guard="")
    )
    storage.put("shards/a", b"x")
    paths = []
    for _ in range(2):
        path = storage.local_path("shards/a")
        assert path is not None
        paths.append(path.parents[1])
        path.unlink()
    assert sorted(paths) == [tmp_path / "0", tmp_path / "1"]
    assert storage.local_path("shards/a") is None


def test_the_first_good_answer_counts() -> None:
    def fail() -> int:
        raise StorageError("no")

    answers = first_answer([fail, lambda: 2, lambda: 3], SOON)
    assert (answers.values, list(answers.errors)) == ({1: 2}, [0])
    assert all_answers([fail, lambda: 2], 1).values == {1: 2}
    assert first_answer([], SOON).values == {}
