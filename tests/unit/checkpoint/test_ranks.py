"""Several ranks, here as threads that meet in storage: who writes what, who waits for whom, and that all restore one step."""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.items import PerRank
from datastore.checkpoint.ranks import SavingRank, StorageVote, all_equal
from datastore.checkpoint.steps import CheckpointerSettings
from datastore.errors import ConflictError, CorruptError, DatastoreError, ResumeError, StorageError, WaitError
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.errors import missing

T = TypeVar("T")
PATIENT = CheckpointerSettings(wait_s=60)
HASTY = CheckpointerSettings(wait_s=0.3)


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage(uuid.uuid4().hex)


def on_ranks(world: int, work: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, range(world)))


def member(storage: Storage, rank: int, world: int, *, options: CheckpointerSettings = PATIENT) -> Checkpointer:
    return Checkpointer(storage, rank=rank, world=world, session="s1", options=options)


def state(value: float, count: int = 9) -> dict[str, Any]:
    return {"state": {f"t{i}": torch.full((i * 10 + 1,), value) for i in range(count)}}


def save(storage: Storage, world: int, step: int, value: float = 1.0) -> None:
    def one(rank: int) -> None:
        with member(storage, rank, world) as ck:
            if ck.latest() is not None:
                ck.restore(state(0.0))
            ck.save(step, state(value)).committed(timeout_s=60)

    on_ranks(world, one)


def values(items: dict[str, Any]) -> set[float]:
    return {number for tensor in items["state"].values() for number in tensor.tolist()}


@pytest.mark.parametrize(("world", "later"), [(1, 3), (3, 1), (4, 2), (12, 5)])
def test_what_some_ranks_saved_together_any_number_of_ranks_restores(
    storage: MemoryStorage, world: int, later: int
) -> None:
    save(storage, world, 10)

    def restore(rank: int) -> set[float]:
        into = state(0.0)
        with member(storage, rank, later) as ck:
            assert ck.restore(into).world == world
        return values(into)

    assert on_ranks(later, restore) == [{1.0}] * later


def test_each_replicated_tensor_is_written_by_one_rank_and_the_bytes_are_shared_out(storage: MemoryStorage) -> None:
    save(storage, 3, 10)
    sizes = [stat.size_bytes - 4096 for stat in storage.list("parts") if stat.key.endswith(".safetensors")]
    assert len(sizes) == 3
    assert sum(sizes) == sum(4 * (i * 10 + 1) for i in range(9))
    assert max(sizes) < 1.2 * min(sizes)


def test_ranks_with_nothing_to_write_take_part_all_the_same(storage: MemoryStorage) -> None:
    def one(rank: int) -> Any:
        with member(storage, rank, 4) as ck:
            return ck.save(1, {"state": {"only": torch.ones(3)}}).committed(timeout_s=60)

    commits = on_ranks(4, one)
    assert all(commit == commits[0] for commit in commits)
    assert len([part for part in commits[0].parts if part.part]) == 1


def test_a_rank_that_does_not_come_is_named_and_nothing_is_committed(storage: MemoryStorage) -> None:
    def one(rank: int) -> str:
        ck = member(storage, rank, 4, options=HASTY)
        if rank in {1, 3}:
            return ""
        with pytest.raises(DatastoreError) as caught:
            ck.save(1, state(1.0)).committed(timeout_s=60)
        ck.close()
        return str(caught.value)

    of_rank_0, _, of_rank_2, _ = on_ranks(4, one)
    assert "ranks=[1, 3]" in of_rank_0
    assert "rank 0 could not save: ranks did not deliver" in of_rank_2
    assert not list(storage.list("steps"))


def test_if_rank_0_is_gone_the_others_name_it_in_finite_time(storage: MemoryStorage) -> None:
    save(storage, 1, 1)
    ck = member(storage, 1, 2, options=HASTY)
    ck.restore(state(0.0), agree=lambda value: value)
    begun = time.monotonic()
    with pytest.raises(WaitError, match="rank=0"):
        ck.save(2, state(1.0)).committed(timeout_s=60)
    assert time.monotonic() - begun < 30
    ck.close()


def test_a_rank_that_fails_tells_the_others_why(storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = MemoryStorage.put_new

    def full(self: MemoryStorage, key: str, *chunks: Any) -> None:
        if key.endswith("00002.safetensors"):
            raise StorageError("the disk is full", key=key)
        honest(self, key, *chunks)

    monkeypatch.setattr(MemoryStorage, "put_new", full)

    def one(rank: int) -> str:
        ck = member(storage, rank, 3)
        with pytest.raises(StorageError) as caught:
            ck.save(1, state(1.0)).committed(timeout_s=60)
        ck.close()
        return str(caught.value)

    begun = time.monotonic()
    of_rank_0, of_rank_1, of_rank_2 = on_ranks(3, one)
    assert time.monotonic() - begun < PATIENT.wait_s / 2
    assert "rank 2 could not save: the disk is full" in of_rank_0
    assert "the disk is full" in of_rank_1
    assert of_rank_2.startswith("the disk is full")
    assert not list(storage.list("steps"))


@pytest.mark.parametrize(
    "differs",
    [
        lambda rank: {"a": {"cursor": rank}, "b": {"x": 1}},
        lambda rank: {"a": {"w": torch.ones(2 + rank)}, "b": {"x": 1}},
        lambda rank: {"a": {"x": 1}} if rank else {"a": {"x": 1}, "b": {"x": 1}},
    ],
)
def test_ranks_that_hold_different_state_are_found_before_the_commit(
    storage: MemoryStorage, differs: Callable[[int], dict[str, Any]]
) -> None:
    def one(rank: int) -> DatastoreError:
        ck = member(storage, rank, 2)
        with pytest.raises(DatastoreError, match="ranks hold different values") as caught:
            ck.save(1, differs(rank)).committed(timeout_s=60)
        ck.close()
        return caught.value

    of_rank_0, _ = on_ranks(2, one)
    assert isinstance(of_rank_0, ConflictError)
    assert not list(storage.list("steps"))


def test_an_item_of_which_each_rank_has_its_own_goes_back_to_each(storage: MemoryStorage) -> None:
    def items(rank: int) -> dict[str, Any]:
        return {"rng": PerRank({"seed": rank, "state": torch.full((4,), float(rank))}), "n": {"n": 1}}

    def save_and_restore(rank: int) -> tuple[int, float]:
        with member(storage, rank, 3) as ck:
            ck.save(1, items(rank)).committed(timeout_s=60)
            into = {"seed": -1, "state": torch.zeros(4)}
            ck.restore({"rng": PerRank(into), "n": {"n": 0}})
            return into["seed"], into["state"].mean().item()

    assert on_ranks(3, save_and_restore) == [(0, 0.0), (1, 1.0), (2, 2.0)]


class Blind(MemoryStorage):
    """One rank's view of storage in which `hidden` is not there: as a network file system may have it, or a bad disk."""

    hidden: tuple[str, ...] = ()

    def _find(self, key: str) -> Any:
        if key.startswith(self.hidden):
            raise missing(key=key, url=self.url)
        return super()._find(key)

    def list(self, folder: str = "") -> Any:
        return (stat for stat in super().list(folder) if not stat.key.startswith(self.hidden))


@pytest.mark.parametrize("hidden", ["steps/0000000020", "parts/0000000020"])
@pytest.mark.parametrize("through_storage", [True, False])
def test_if_one_rank_cannot_read_the_newest_step_all_take_the_one_before(
    storage: MemoryStorage, hidden: str, *, through_storage: bool
) -> None:
    save(storage, 2, 10, value=10.0)
    save_again = storage.url.removeprefix("memory://")
    save(storage, 2, 20, value=20.0)
    agree = None if through_storage else Meeting(3).least

    def restore(rank: int) -> tuple[int, set[float]]:
        view: MemoryStorage = storage
        if rank == 1:
            view = Blind(save_again)
            view.hidden = (hidden,)
        into = state(0.0)
        with Checkpointer(view, rank=rank, world=3, session="s2", options=PATIENT) as ck:
            info = ck.restore(into, agree=agree)
            return info.step, values(into)

    assert on_ranks(3, restore) == [(10, {10.0})] * 3


class Meeting:
    """What a trainer would do with an all-reduce."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world)
        self._values: list[int] = []

    def least(self, value: int) -> int:
        self._barrier.wait()
        self._values.append(value)
        self._barrier.wait()
        found = min(self._values)
        if self._barrier.wait() == 0:
            self._values.clear()
        self._barrier.wait()
        return found


def test_a_step_asked_for_by_number_fails_on_all_ranks_if_one_cannot_read_it(storage: MemoryStorage) -> None:
    save(storage, 2, 10)

    def restore(rank: int) -> set[float]:
        view: MemoryStorage = storage
        if rank == 1:
            view = Blind(storage.url.removeprefix("memory://"))
            view.hidden = ("parts/",)
        into = state(0.0)
        with member(view, rank, 2) as ck, pytest.raises(CorruptError):
            ck.restore(into, step=10)
        return values(into)

    assert on_ranks(2, restore) == [{0.0}] * 2


def test_if_the_state_of_one_rank_does_not_fit_no_rank_loads_anything(storage: MemoryStorage) -> None:
    save(storage, 2, 10)

    def restore(rank: int) -> set[float]:
        into = state(0.0, count=9 + rank)
        with member(storage, rank, 2) as ck, pytest.raises(ResumeError):
            ck.restore(into)
        return values(into)

    assert on_ranks(2, restore) == [{0.0}] * 2


def test_a_rank_that_does_not_vote_is_named(storage: MemoryStorage) -> None:
    save(storage, 1, 10)
    with member(storage, 1, 4, options=HASTY) as ck, pytest.raises(WaitError, match=r"ranks=\[0, 2, 3\]"):
        ck.restore(state(0.0))


def test_a_session_used_twice_is_noticed_instead_of_reading_old_votes(storage: MemoryStorage) -> None:
    save(storage, 1, 10)

    def restore(rank: int) -> None:
        with member(storage, rank, 2) as ck:
            ck.restore(state(0.0))

    on_ranks(2, restore)
    with pytest.raises(ConflictError, match="voted in this place"):
        on_ranks(2, restore)


def test_votes_of_earlier_sessions_are_swept(storage: MemoryStorage) -> None:
    save(storage, 1, 10)

    def go_on(rank: int, session: str) -> None:
        with Checkpointer(storage, rank=rank, world=2, session=session, options=PATIENT) as ck:
            into = state(0.0)
            step = ck.restore(into).step
            ck.save(step + 10, into).committed(timeout_s=60)

    for session in ("s2", "s3"):
        on_ranks(2, lambda rank, session=session: go_on(rank, session))
    assert {stat.key.split("/")[1] for stat in storage.list("votes")} == {"s3"}


def test_an_agreement_is_the_least_of_all_votes_each_time(storage: MemoryStorage) -> None:
    def one(rank: int) -> list[Any]:
        vote = StorageVote(SavingRank(storage, rank, 3, "s", PATIENT))
        return [vote(rank + 5), vote(-rank), all_equal(vote, 7), all_equal(vote, rank)]

    assert on_ranks(3, one) == [[5, -2, True, False]] * 3


def test_ranks_that_see_different_saves_of_one_step_load_neither(storage: MemoryStorage) -> None:
    save(storage, 1, 10, value=1.0)
    other = MemoryStorage(uuid.uuid4().hex)
    with Checkpointer(other, session="another") as ck:
        ck.save(10, state(2.0), blocking=True)
    meeting = Meeting(2)

    def restore(rank: int) -> set[float]:
        into = state(0.0)
        with member([storage, other][rank], rank, 2) as ck, pytest.raises(ConflictError, match="different saves"):
            ck.restore(into, agree=meeting.least)
        return values(into)

    assert on_ranks(2, restore) == [{0.0}] * 2


def test_a_part_that_is_not_as_long_as_it_was_written_is_not_committed(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = MemoryStorage.put_new

    def lossy(self: MemoryStorage, key: str, *chunks: Any) -> None:
        honest(self, key, *(chunks[:-1] if key.endswith("00001.safetensors") else chunks))

    monkeypatch.setattr(MemoryStorage, "put_new", lossy)

    def one(rank: int) -> str:
        ck = member(storage, rank, 2)
        with pytest.raises(StorageError, match="not as long as it was written") as caught:
            ck.save(1, state(1.0)).committed(timeout_s=60)
        ck.close()
        return str(caught.value)

    assert "00001.safetensors" in on_ranks(2, one)[0]
    assert not list(storage.list("steps"))


def test_weights_tied_on_one_rank_only_are_found_before_the_commit(storage: MemoryStorage) -> None:
    def one(rank: int) -> None:
        a, b = torch.ones(5), torch.ones(5)
        ck = member(storage, rank, 2)
        with pytest.raises(DatastoreError, match="a tensor"):
            ck.save(1, {"state": {"a": a, "b": a if rank else b}}).committed(timeout_s=60)
        ck.close()

    on_ranks(2, one)
    assert not list(storage.list("steps"))


def test_a_rank_whose_state_cannot_be_stored_tells_the_others_and_all_can_save_the_step_again(
    storage: MemoryStorage,
) -> None:
    def one(rank: int) -> str:
        ck = member(storage, rank, 3)
        with pytest.raises(DatastoreError) as caught:
            ck.save(1, {"state": {"x": object() if rank == 1 else 0}}).committed(timeout_s=60)
        ck.save(1, {"state": {"x": 0}}).committed(timeout_s=60)
        ck.close()
        return str(caught.value)

    begun = time.monotonic()
    told = on_ranks(3, one)
    assert time.monotonic() - begun < PATIENT.wait_s / 2
    assert all("this value cannot be stored in a checkpoint (path='state/x'" in text for text in told)
    assert "rank 1 could not save" in told[0]
    assert len(list(storage.list("steps"))) == 1
