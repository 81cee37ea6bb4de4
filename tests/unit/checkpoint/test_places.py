"""Two places behind one checkpointer: either brings the run back, and whoever waits for a copy hears how it went."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from typing_extensions import Buffer, override

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.places.two import TwoPlaces
from datastore.checkpoint.steps import CheckpointerSettings, StepLog
from datastore.errors import ConfigError, CorruptError, MissingError, StorageError, WaitError
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Stat, Storage


class Far(MemoryStorage):
    """A place that calls `before(key)` ahead of each write, and can be out of reach."""

    def __init__(self) -> None:
        super().__init__(uuid.uuid4().hex)
        self.before: Callable[[str], object] = lambda _key: None
        self.down = False

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        self._reach(key)
        super().put(key, *chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        self._reach(key)
        super().put_new(key, *chunks)

    @override
    def get(self, key: str) -> bytes:
        self._reach("")
        return super().get(key)

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        self._reach("")
        return super().list(folder)

    def _reach(self, key: str) -> None:
        if self.down:
            raise StorageError("no connection", url=self.url, hint="Check the network.")
        if key:
            self.before(key)


def items(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((300, 7), float(step)), "frozen": torch.arange(5000), "n": step}}


def fresh_place() -> MemoryStorage:
    return MemoryStorage(uuid.uuid4().hex)


@pytest.fixture
def near() -> Storage:
    return fresh_place()


@pytest.fixture
def far() -> Far:
    return Far()


def save(ck: Checkpointer, *steps: int) -> None:
    for step in steps:
        ck.save(step, items(step), metrics={"loss": 1 / (step + 1)}).replicated()


def restored(place: Storage | TwoPlaces, step: int) -> bool:
    """Return whether `step` is what is restored, to the bit."""
    found = items(-1)
    with Checkpointer(place) as ck:
        assert ck.restore(found).step == step
    return torch.equal(found["model"]["w"], items(step)["model"]["w"]) and found["model"]["n"] == step


def wipe(place: Storage) -> None:
    for stat in list(place.list()):
        place.delete(stat.key)


def steps_of(place: Storage) -> list[int]:
    return StepLog(place).steps()


def test_each_place_keeps_steps_by_its_own_rule_and_has_the_newest(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far, keep=Keep(last=4)), keep=Keep(last=1)) as ck:
        save(ck, 1, 2, 3, 4, 5)
        assert ck.steps() == [2, 3, 4, 5]
        assert ck.latest() == 5
        assert ck.inspect(2).summary.step == 2
        assert ck.verify(2).bad == ()
        assert ck.best("loss") == 5
    assert steps_of(near) == [5]
    assert steps_of(far) == [2, 3, 4, 5]


def test_the_run_goes_on_after_either_place_is_lost(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        save(ck, 1, 2)
    for lost in (near, far):
        wipe(lost)
        with Checkpointer(TwoPlaces(near, far)) as ck:
            found = items(-1)
            info = ck.restore(found)
            newest = info.step
            assert torch.equal(found["model"]["w"], items(newest)["model"]["w"])
            assert info.url == (far if lost is near else near).url
            save(ck, newest + 1)
        assert restored(near, newest + 1)
        assert restored(far, newest + 1)
    assert near.get("run.json") != b""


def test_what_comes_after_a_restore_from_the_second_place_needs_nothing_of_it(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        save(ck, 1)
    wipe(near)
    with Checkpointer(TwoPlaces(near, far)) as ck:
        ck.restore(items(-1))
        save(ck, 2)
    wipe(far)
    assert restored(near, 2)


def test_a_step_that_is_damaged_in_the_first_place_is_read_from_the_second(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        save(ck, 1, 2)
        part = next(
            stat.key for stat in near.list("parts") if "0000000002" in stat.key and stat.key.endswith("safetensors")
        )
        raw = bytearray(near.get(part))
        raw[-5] ^= 1
        near.put(part, bytes(raw))
        with pytest.raises(CorruptError):
            restored_exactly(near, 2)
        found = items(-1)
        info = ck.restore(found, step=2)
        assert (info.url, info.fell_back) == (far.url, ())
        assert torch.equal(found["model"]["w"], items(2)["model"]["w"])
        save(ck, 3)
    assert restored(near, 3)


def restored_exactly(place: Storage, step: int) -> None:
    with Checkpointer(place) as ck:
        ck.restore(items(-1), step=step)


def test_a_copy_that_fails_is_heard_of_once_and_made_up_for_by_the_next(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        save(ck, 1)
        far.down = True
        handle = ck.save(2, items(2))
        handle.committed()
        with pytest.raises(StorageError, match="no connection"):
            ck._second.finish()  # type: ignore[union-attr]
        ck.save(3, items(3)).committed()
        wait_until_idle(ck)
        with pytest.raises(StorageError, match="no connection"):
            ck.save(4, items(4))
        far.down = False
        save(ck, 4)
        assert steps_of(near) == [2, 3, 4]
        assert steps_of(far) == [2, 3, 4]
        assert ck.copy_failure() is None


def test_a_program_that_asks_for_failed_copies_is_not_stopped_by_one_that_fails_just_before_a_save(
    near: Storage, far: Far
) -> None:
    far.down = True
    ck = Checkpointer(TwoPlaces(near, far))
    assert ck.copy_failure() is None
    for step in (1, 2):
        ck.save(step, items(step)).committed()
        wait_until_idle(ck)  # The copy of the step before fails after the program has asked, and before it saves again.
    ck.save(3, items(3), blocking=True)
    wait_until_idle(ck)
    assert "no connection" in str(ck.copy_failure())
    assert ck.copy_failure() is None
    ck.save(4, items(4), blocking=True)
    with pytest.raises(StorageError, match="no connection"):
        ck.close()
    assert steps_of(near) == [2, 3, 4]


def wait_until_idle(ck: Checkpointer) -> None:
    for _ in range(500):
        if ck._second is not None and (ck._second._job is None or ck._second._job.done()):
            return
        time.sleep(0.01)
    raise AssertionError("the copy does not end")


def test_who_waits_for_the_copy_has_heard_of_its_failure(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        far.down = True
        with pytest.raises(StorageError, match="no connection"):
            ck.save(1, items(1)).replicated()
        far.down = False
        save(ck, 2)


def test_closing_waits_for_the_copy_and_raises_its_failure(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        ck.save(1, items(1))
    assert steps_of(far) == [1]
    ck = Checkpointer(TwoPlaces(near, far))
    ck.restore(items(-1))
    far.before = lambda key: fail(key) if key.startswith("parts") else None
    ck.save(2, items(2))
    with pytest.raises(StorageError, match="full"):
        ck.close()
    assert steps_of(near) == [1, 2]
    assert steps_of(far) == [1]


def fail(key: str) -> None:
    raise StorageError("the disk is full", key=key, hint="Free some space.")


def test_a_slow_copy_holds_up_no_save_and_its_step_is_not_let_go_meanwhile(near: Storage, far: Far) -> None:
    go, begun = threading.Event(), threading.Event()

    def wait_in_part(key: str) -> None:
        if key.startswith("parts/0000000001") and key.endswith("safetensors"):
            begun.set()
            go.wait(10)

    far.before = wait_in_part
    with Checkpointer(TwoPlaces(near, far), keep=Keep(last=1)) as ck:
        first = ck.save(1, items(1))
        assert begun.wait(10)
        for step in (2, 3, 4):
            last = ck.save(step, items(step))
            last.committed()
        ck._settle()
        assert steps_of(near) == [1, 4]
        with pytest.raises(WaitError, match="not in the second place yet"):
            first.replicated(timeout_s=0.05)
        go.set()
        first.replicated()
        last.replicated()
    assert steps_of(far) == [1, 4]


def test_a_step_that_went_before_its_turn_came_is_told(near: Storage, far: Far) -> None:
    go, begun = threading.Event(), threading.Event()
    far.before = lambda key: (begun.set(), go.wait(10)) if key.startswith("parts/0000000001") else None
    with Checkpointer(TwoPlaces(near, far), keep=Keep(last=1)) as ck:
        ck.save(1, items(1))
        assert begun.wait(10)
        second = ck.save(2, items(2))
        ck.save(3, items(3)).committed()
        ck._settle()
        go.set()
        with pytest.raises(StorageError, match="let go before it was copied"):
            second.replicated()


def test_going_back_goes_back_in_both_places(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        save(ck, 1, 2, 3)
        ck.restore(items(-1), step=1)
        assert ck.rewind(1) == [2, 3]
        assert steps_of(near) == steps_of(far) == [1]
        save(ck, 2)
    assert restored(far, 2)


def test_one_goes_back_to_a_step_that_only_the_second_place_has(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far, keep=Keep(last=9)), keep=Keep(last=1)) as ck:
        save(ck, 1, 2, 3)
        ck.gc()
        assert steps_of(near) == [3]
        assert ck.restore(items(-1), step=1).url == far.url
        assert ck.rewind(1) == [2, 3]
        save(ck, 2)
        assert ck.steps() == [1, 2]
        with pytest.raises(MissingError):
            ck.rewind(0)
    assert restored(near, 2)


def test_the_second_place_follows_when_the_first_has_gone_back_alone(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        save(ck, 1, 3)
    with Checkpointer(near) as ck:
        ck.restore(items(-1), step=1)
        ck.rewind(1)
        ck.save(2, items(2), blocking=True)
    with Checkpointer(TwoPlaces(near, far)) as ck:
        ck.restore(items(-1), step=2)
        ck.rewind(2)
        save(ck, 4)
    assert steps_of(far) == [1, 2, 4]


def test_a_pinned_step_stays_in_both_places(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far, keep=Keep(last=1)), keep=Keep(last=1)) as ck:
        save(ck, 1)
        ck.pin(1)
        save(ck, 2, 3)
        assert steps_of(near) == steps_of(far) == [1, 3]
        ck.unpin(1)
    with Checkpointer(TwoPlaces(near, far, keep=Keep(last=1)), keep=Keep(last=1)) as ck:
        ck.restore(items(-1))
        save(ck, 4)
    assert steps_of(near) == steps_of(far) == [4]


def test_places_that_do_not_go_together_are_refused(near: Storage, far: Far) -> None:
    with Checkpointer(near) as ck:
        ck.save(1, items(1), blocking=True)
    with Checkpointer(far) as ck:
        ck.save(1, items(1), blocking=True)
    with pytest.raises(ConfigError, match="another run"):
        Checkpointer(TwoPlaces(near, far))
    with pytest.raises(ConfigError, match="is the first"):
        Checkpointer(TwoPlaces(near, near))
    with Checkpointer(fresh_place()) as ck, pytest.raises(ConfigError, match="no second place"):
        ck.save(1, items(1)).replicated()


def test_a_second_place_out_of_reach_stops_no_restart(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        save(ck, 1)
    far.down = True
    assert restored(TwoPlaces(near, far), 1)
    wipe(near)
    with pytest.raises(StorageError, match="no connection"):
        restored(TwoPlaces(near, far), 1)


def test_two_empty_places_have_nothing_to_restore(near: Storage, far: Far) -> None:
    with Checkpointer(TwoPlaces(near, far)) as ck:
        assert ck.latest() is None
        with pytest.raises(MissingError):
            ck.restore(items(-1))


def test_another_rank_sees_when_a_step_is_there(near: Storage, far: Far) -> None:
    places, session = TwoPlaces(near, far), uuid.uuid4().hex
    done: list[int] = []

    def rank(number: int) -> None:
        with Checkpointer(places, rank=number, world=2, session=session) as ck:
            ck.save(1, items(1)).replicated(timeout_s=20)
            done.append(number)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1]
    assert restored(far, 1)


def test_a_save_that_fits_beside_the_one_being_written_does_not_wait_for_it(far: Far) -> None:
    go, begun = threading.Event(), threading.Event()
    far.before = lambda key: (begun.set(), go.wait(10)) if key.startswith("parts/0000000001") else None
    size = sum(t.nbytes for t in items(1)["model"].values() if isinstance(t, torch.Tensor))
    with Checkpointer(far, options=CheckpointerSettings(in_flight_bytes=2 * size)) as ck:
        state = items(1)
        first = ck.save(1, state)
        assert begun.wait(10)
        with ck.guard():
            state["model"]["w"].fill_(2.0)
        state["model"]["n"] = 2
        second = ck.save(2, state)
        second.staged(timeout_s=10)
        state["model"]["w"].fill_(77.0)
        assert not first.done
        third: list[Any] = []
        late = threading.Thread(target=lambda: third.append(ck.save(3, items(3))))
        late.start()  # There is room for two.
        late.join(0.2)
        assert late.is_alive()
        go.set()
        late.join()
        third[0].committed()
    assert steps_of(far) == [1, 2, 3]
    for step in (1, 2, 3):
        found = items(-1)
        with Checkpointer(far) as ck:
            ck.restore(found, step=step)
        assert torch.equal(found["model"]["w"], items(step)["model"]["w"])
    frozen = items(1)["model"]["frozen"].nbytes
    sizes = [ref.size_bytes for step in (1, 2, 3) for ref in StepLog(far).read(step).parts]
    assert (
        sizes[0] > frozen > sizes[1]
    )  # What is frozen is not written again, though it was copied before that was known.


def test_without_room_a_save_waits_and_one_that_fails_costs_not_the_next(far: Far) -> None:
    size = sum(t.nbytes for t in items(1)["model"].values() if isinstance(t, torch.Tensor))
    go, begun = threading.Event(), threading.Event()

    def once(key: str) -> None:
        if key.startswith("parts/0000000001"):
            begun.set()
            go.wait(10)
            fail(key)

    far.before = once
    with Checkpointer(far, options=CheckpointerSettings(in_flight_bytes=2 * size)) as ck:
        ck.save(1, items(1))
        assert begun.wait(10)
        second = ck.save(2, items(2))
        go.set()
        second.committed()
        with pytest.raises(StorageError, match="full"):
            ck.save(3, items(3), blocking=True)
        ck.save(3, items(3), blocking=True)
    assert steps_of(far) == [2, 3]
    with Checkpointer(fresh_place(), options=CheckpointerSettings(in_flight_bytes=2 * size - 1)) as ck:
        handles = [ck.save(step, items(step)) for step in (1, 2)]
        assert handles[0].done
