"""Steps in the memory of ranks, here threads with a gloo group each: what outlives a rank, what does not, and what it takes."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.inspect import inspect_step, verify_step
from datastore.checkpoint.items import PerRank
from datastore.checkpoint.places.memory import MemoryCheckpointer
from datastore.checkpoint.places.peers import Peers
from datastore.checkpoint.replica import replicate
from datastore.errors import ConfigError, DatastoreError, MissingError, WaitError

T = TypeVar("T")
WAIT_S = 30.0


def on_ranks(world: int, work: Callable[[int], T]) -> list[T]:
    with ThreadPoolExecutor(world) as pool:
        return [each.result() for each in [pool.submit(work, rank) for rank in range(world)]]


def groups(world: int, *, wait_s: float = WAIT_S) -> list[Any]:
    """Return a gloo group for each of `world` threads."""
    store = dist.HashStore()
    return on_ranks(world, lambda rank: dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=wait_s)))


def members(world: int) -> list[MemoryCheckpointer]:
    return [MemoryCheckpointer(group, timeout_s=WAIT_S) for group in groups(world)]


def state(value: float, rank: int = 0) -> dict[str, Any]:
    """Return some tensors that all ranks share, some plain values, and what each rank has of its own."""
    model = {f"t{i}": torch.full((i * 1000 + 1, 3), float(value + i)) for i in range(7)}
    return {"model": {**model, "n": int(value)}, "own": PerRank({"rank": torch.tensor([rank, int(value)])})}


def same(items: dict[str, Any], other: dict[str, Any]) -> bool:
    def flat(found: dict[str, Any]) -> dict[str, Any]:
        return {**found["model"], **found["own"].state}

    one, two = flat(items), flat(other)
    return one.keys() == two.keys() and all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(two[k])) for k in one)


def save(ranks: list[MemoryCheckpointer], step: int) -> None:
    on_ranks(len(ranks), lambda rank: ranks[rank].save(step, state(step, rank)).committed(timeout_s=WAIT_S))


def restore(ranks: list[MemoryCheckpointer | None], **options: Any) -> list[tuple[int, dict[str, Any]]]:
    """Restore on old ranks and, in place of those that are None, on new ones; return the step and what each has."""
    world = len(ranks)
    meeting = groups(world)
    fresh = [each is None for each in ranks]
    for rank, each in enumerate(ranks):
        ranks[rank] = each or MemoryCheckpointer(meeting[rank], timeout_s=WAIT_S)

    def one(rank: int) -> tuple[int, dict[str, Any]]:
        items = state(-1.0, rank)
        member = ranks[rank]
        assert member is not None
        return member.restore(items, group=None if fresh[rank] else meeting[rank], **options).step, items

    return on_ranks(world, one)


def errors(ranks: list[MemoryCheckpointer], work: Callable[[int], object]) -> list[str]:
    """Return the error that each rank hears, or nothing."""

    def one(rank: int) -> str:
        try:
            work(rank)
        except DatastoreError as error:
            return f"{error.code}: {error}"
        return ""

    return on_ranks(len(ranks), one)


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_after_the_death_of_any_rank_all_have_the_newest_step_and_the_copies_are_whole_again(dead: int) -> None:
    ranks: list[MemoryCheckpointer | None] = [*members(3)]
    save(ranks, 4)
    save(ranks, 5)
    for _ in range(2):
        ranks[dead] = None
        found = restore(ranks)
        assert [step for step, _ in found] == [5, 5, 5]
        assert all(same(items, state(5, rank)) for rank, (_, items) in enumerate(found))
        dead = (dead + 1) % 3  # The neighbour, which had the only copy meanwhile.
    save(ranks, 6)
    ranks[dead] = None
    assert {step for step, _ in restore(ranks)} == {6}


def test_a_step_that_was_being_sent_when_a_rank_died_comes_back_if_all_its_parts_are_somewhere_else_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = Peers.exchange
    for reached, step in ((True, 2), (False, 1)):
        ranks: list[MemoryCheckpointer | None] = [*members(4)]
        save(ranks, 1)

        def dying(peers: Peers, *moves: Any, reached: bool = reached) -> None:
            if reached:
                honest(peers, *moves)
            if peers.rank == 1:
                peers.abort()
                raise WaitError("this rank dies")
            if not reached:
                honest(peers, *moves)

        with monkeypatch.context() as patch:
            patch.setattr(Peers, "exchange", dying)
            begun = time.monotonic()
            heard = errors(ranks, lambda rank, ranks=ranks: ranks[rank].save(2, state(2, rank)).committed())
        assert all(error.startswith("timeout: ") for error in heard)
        assert (
            time.monotonic() - begun < WAIT_S / 2
        )  # Also where it is no neighbour: nobody waits for who has given up.
        assert [each.latest() for each in ranks if each] == [1] * 4
        ranks[1] = None
        found = restore(ranks)
        assert [now for now, _ in found] == [step] * 4
        assert all(same(items, state(step, rank)) for rank, (_, items) in enumerate(found))


def test_two_neighbours_that_die_together_take_a_part_along_and_the_error_names_it() -> None:
    ranks: list[MemoryCheckpointer | None] = [*members(4)]
    save(ranks, 7)
    ranks[1] = ranks[2] = None
    with pytest.raises(MissingError, match=r"step=7, parts_of_ranks=\[1\]\). Restore from storage"):
        restore(ranks)


def test_two_ranks_that_are_no_neighbours_may_die_together() -> None:
    ranks: list[MemoryCheckpointer | None] = [*members(4)]
    save(ranks, 7)
    ranks[0] = ranks[2] = None
    assert all(same(items, state(7, rank)) for rank, (_, items) in enumerate(restore(ranks)))


@pytest.mark.parametrize("world", [2, 3, 5])
def test_those_that_are_left_may_be_fewer_or_have_more_beside_them_in_any_order(world: int) -> None:
    old = members(4)
    save(old, 3)
    left: dict[int, list[MemoryCheckpointer | None]] = {
        2: [old[3], old[1]],
        3: [old[3], old[0], old[1]],
        5: [old[3], None, old[0], old[1], None],
    }
    ranks = left[world]

    def one(rank: int, meeting: list[Any]) -> dict[str, Any]:
        items = {"model": state(-1.0)["model"]}
        fresh = ranks[rank] is None
        member = ranks[rank] = ranks[rank] or MemoryCheckpointer(meeting[rank], timeout_s=WAIT_S)
        assert member.restore(items, group=None if fresh else meeting[rank], partial=True).world == 4
        return items

    for _ in range(2):
        meeting = groups(world)
        for items in on_ranks(world, lambda rank, meeting=meeting: one(rank, meeting)):
            assert all(torch.equal(items["model"][f"t{i}"], state(3)["model"][f"t{i}"]) for i in range(7))
        ranks[0] = None  # The copies are whole again, so another one may die.


def test_new_ranks_that_know_nothing_are_told_so() -> None:
    with pytest.raises(MissingError, match="no rank has a step in its memory"):
        restore([None, None])


def test_what_does_not_fit_is_refused_on_all_ranks_and_the_step_stays() -> None:
    ranks = members(2)
    save(ranks, 1)

    def one(rank: int) -> None:
        items = state(0, rank)
        if rank:
            items["model"]["t3"] = torch.zeros(5)
        ranks[rank].restore(items)

    of_rank_0, of_rank_1 = errors(ranks, one)
    assert of_rank_0.startswith("resume: another rank could not restore")
    assert "model/t3: saved as F32[3001, 3], expected as F32[5]" in of_rank_1
    assert [step for step, _ in restore([*ranks])] == [1, 1]


def test_ranks_that_hold_different_values_or_save_different_steps_hear_of_it_and_may_save_again() -> None:
    ranks = members(2)
    save(ranks, 1)
    heard = errors(ranks, lambda rank: ranks[rank].save(2, {"data": {"n": rank}}).committed())
    assert all("conflict: ranks hold different values" in error for error in heard)
    heard = errors(ranks, lambda rank: ranks[rank].save(2 + rank, state(2, rank)).committed())
    assert all("conflict: the ranks save different steps (steps=[2, 3])" in error for error in heard)
    heard = errors(ranks, lambda rank: ranks[rank].save(1, state(1, rank)).committed())
    assert all("conflict: this step is not after the last one" in error for error in heard)
    save(ranks, 4)
    assert [each.latest() for each in ranks] == [4, 4]


def test_memory_that_changed_after_the_save_is_found_and_nothing_is_loaded() -> None:
    ranks = members(2)
    save(ranks, 1)
    whole = ranks[0]._whole
    assert whole is not None
    for part in whole.parts.values():
        part.data[-1] ^= 1
    into = [state(-1.0, rank) for rank in range(2)]
    heard = errors(ranks, lambda rank: ranks[rank].restore(into[rank]))
    assert all(error.startswith("corrupt: ") for error in heard)
    assert all(same(items, state(-1.0, rank)) for rank, items in enumerate(into))


def test_of_each_rank_there_are_two_steps_of_two_parts_at_most_and_memory_is_used_again() -> None:
    ranks = members(3)
    seen: list[set[int]] = []
    for step in range(1, 7):
        save(ranks, step)
        whole = ranks[0]._whole
        assert whole is not None
        assert sorted(whole.parts) == [0, 2]
        seen.append({part.buffer.data_ptr() for part in whole.parts.values()})
    assert seen[2:] == [seen[0], seen[1]] * 2
    assert not seen[0] & seen[1]


def test_the_state_may_change_once_it_is_staged() -> None:
    ranks = members(2)

    def one(rank: int) -> None:
        items = state(1, rank)
        handle = ranks[rank].save(1, items)
        with ranks[rank].guard():
            for name in range(7):
                items["model"][f"t{name}"].fill_(9.0)
        handle.committed()

    on_ranks(2, one)
    assert all(same(items, state(1, rank)) for rank, (_, items) in enumerate(restore([*ranks])))


def test_of_two_ranks_each_has_the_whole_step_as_any_run_has_it(tmp_path: Path) -> None:
    ranks = members(2)
    save(ranks, 1)
    save(ranks, 2)
    for each in ranks:
        assert [item.name for item in inspect_step(each.storage, 2).items] == ["model", "own@0", "own@1"]
        assert not verify_step(each.storage, 2).bad
    assert replicate(ranks[1].storage, tmp_path).steps == (2,)
    into = {"model": state(0.0)["model"]}
    with Checkpointer(tmp_path) as ck:
        assert ck.restore(into, partial=True).step == 2
    assert torch.equal(into["model"]["t5"], state(2)["model"]["t5"])


def test_a_group_of_one_of_another_kind_or_of_the_whole_program_is_refused() -> None:
    for group, reason in (
        (groups(1)[0], "there is no other rank that could keep a copy"),
        (dist.HashStore(), "not a process group"),
        (None, "not a process group"),
    ):
        with pytest.raises(ConfigError, match=reason):
            MemoryCheckpointer(group)
    with pytest.raises(ConfigError, match="`timeout_s`"):
        MemoryCheckpointer(groups(2)[0], timeout_s=0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ConfigError, match="the group of the whole program"):
            MemoryCheckpointer(dist.group.WORLD)
        with pytest.raises(ConfigError, match="gloo only"):
            MemoryCheckpointer(dist.new_group())
    finally:
        dist.destroy_process_group()


def test_what_is_closed_holds_nothing() -> None:
    ranks = members(2)
    save(ranks, 1)
    for each in ranks:
        each.close()
        assert not list(each.storage.list())
    assert all("no rank has a step" in error for error in errors(ranks, lambda rank: ranks[rank].restore(state(0.0))))
