"""An item is dropped from old steps: what is left is what was saved, what others need stays, and no collection comes in between."""

import threading
import uuid
from typing import Any

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.dropping import drop_item
from datastore.checkpoint.inspect import inspect_step, verify_step
from datastore.checkpoint.items import PerRank
from datastore.checkpoint.keeping import Keep, collect
from datastore.checkpoint.replica import replicate
from datastore.checkpoint.steps import StepLog
from datastore.errors import ConfigError, CorruptError, MissingError, ResumeError
from datastore.storage.backends.memory import MemoryStorage


def items(step: int) -> dict[str, Any]:
    shared = torch.full((40, 3), float(step))
    model = {
        "w": torch.full((300, 7), float(step)),
        "tied": shared,
        "again": shared,
        "none": torch.empty(0, 4),
        "n": step,
    }
    optim = {"m": torch.full((600, 7), step + 0.5), "frozen": torch.arange(5000)}
    return {"model": model, "optim": optim, "rng": PerRank({"key": torch.arange(3) + step})}


@pytest.fixture
def run() -> MemoryStorage:
    storage = MemoryStorage(uuid.uuid4().hex)
    with Checkpointer(storage, keep=Keep(last=9)) as ck:
        for step in (1, 2, 3):
            ck.save(step, items(step), blocking=True)
    return storage


def size(storage: MemoryStorage) -> int:
    return sum(stat.size_bytes for stat in storage.list("parts"))


def assert_model(storage: MemoryStorage, step: int) -> None:
    found = {"model": items(-1)["model"], "rng": PerRank({"key": torch.zeros(3, dtype=torch.int64)})}
    with Checkpointer(storage) as ck:
        assert ck.restore(found, step=step, partial=True).step == step
    wanted = items(step)["model"]
    assert all(torch.equal(found["model"][name], wanted[name]) for name in ("w", "tied", "again", "none"))
    assert torch.equal(found["rng"].state["key"], torch.arange(3) + step)


def test_what_is_left_of_a_step_is_what_was_saved_and_the_rest_is_gone(run: MemoryStorage) -> None:
    before = size(run)
    done = drop_item(run, "optim", steps=[1, 2])
    assert done.steps == (1, 2)
    # Step 1 wrote what never changes, which step 3 needs: its part stays as it is.
    assert done.size_bytes == before - size(run) > 12_000
    for step in (1, 2):
        assert_model(run, step)
        assert {item.name for item in inspect_step(run, step).items} == {"model", "rng@0"}
        assert not verify_step(run, step).bad
        with Checkpointer(run) as ck, pytest.raises(ResumeError, match="optim: expected, but not saved"):
            ck.restore(items(0), step=step)
    with Checkpointer(run, keep=Keep(last=9)) as ck:
        state = items(0)
        assert ck.restore(state).step == 3
        assert torch.equal(state["optim"]["frozen"], torch.arange(5000))
        ck.save(4, items(4), blocking=True)
        assert ck.steps() == [1, 2, 3, 4]
    assert drop_item(run, "optim", steps=[1, 2]).steps == ()


def test_what_each_rank_has_of_its_own_is_dropped_too(run: MemoryStorage) -> None:
    assert drop_item(run, "rng", steps=[2]).steps == (2,)
    assert {item.name for item in inspect_step(run, 2).items} == {"model", "optim"}
    assert not verify_step(run, 2).bad


def test_a_step_needs_something_and_the_newest_needs_all(run: MemoryStorage) -> None:
    with pytest.raises(ConfigError, match="the newest step keeps all"):
        drop_item(run, "optim", steps=[3])
    with pytest.raises(MissingError):
        drop_item(run, "optim", steps=[7])
    for item in ("optim", "rng"):
        drop_item(run, item, steps=[1])
    with pytest.raises(ConfigError, match="nothing else"):
        drop_item(run, "model", steps=[1])
    run.put("steps/0000000003.json", b"damaged")
    with pytest.raises(ConfigError, match="the newest step keeps all"):
        drop_item(run, "optim", steps=[2])


def test_damage_is_found_and_the_step_stays_as_it_was(run: MemoryStorage) -> None:
    part = StepLog(run).read(2).parts[0].part
    raw = bytearray(run.get(part))
    entry = next(e for e in StepLog(run).read_whole(2).parts[0].entries if e.tensor == "model/w")
    raw[entry.start] ^= 1
    run.put(part, bytes(raw))
    before = run.get("steps/0000000002.json")
    with pytest.raises(CorruptError):
        drop_item(run, "optim", steps=[2])
    assert run.get("steps/0000000002.json") == before


def test_a_collection_at_any_moment_takes_nothing_that_the_lighter_step_needs(
    run: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    inside = threading.local()
    for name in ("put", "put_new", "get", "list", "delete"):
        honest = getattr(MemoryStorage, name)

        def meanwhile(self: MemoryStorage, *rest: Any, honest: Any = honest) -> Any:
            nonlocal calls
            result = honest(self, *rest)
            if not getattr(inside, "busy", False):
                inside.busy = True
                calls += 1
                collect(self, Keep(last=9))
                inside.busy = False
            return result

        monkeypatch.setattr(MemoryStorage, name, meanwhile)
    drop_item(run, "optim", steps=[1, 2])
    monkeypatch.undo()
    assert calls > 20
    assert all(not verify_step(run, step).bad for step in (1, 2, 3))
    assert not list(run.list("refs/claims"))
    assert not list(run.list("refs/condemned"))


def test_a_copy_of_the_run_takes_no_notice(run: MemoryStorage) -> None:
    there = MemoryStorage(uuid.uuid4().hex)
    replicate(run, there, keep=Keep(last=9))
    drop_item(run, "optim", steps=[2])
    report = replicate(run, there, keep=Keep(last=9))
    assert (report.steps, report.dropped) == ((), ())
    assert {item.name for item in inspect_step(there, 2).items} == {"model", "optim", "rng@0"}
    new = MemoryStorage(uuid.uuid4().hex)
    replicate(run, new, keep=Keep(last=9))
    assert_model(new, 2)


def test_ranks_lose_their_shares(tmp_path: Any) -> None:
    session = uuid.uuid4().hex

    def rank(number: int) -> None:
        with Checkpointer(tmp_path, rank=number, world=3, session=session) as ck:
            for step in (1, 2):
                ck.save(step, items(step), blocking=True)
            assert ck.drop("optim", steps=[1]) == ([1] if number == 0 else [])

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Checkpointer(tmp_path) as ck:
        assert not ck.verify(1).bad
        assert {item.name for item in ck.inspect(1).items} == {"model", "rng@0", "rng@1", "rng@2"}
        found = {"model": items(-1)["model"]}
        assert ck.restore(found, step=1, partial=True).step == 1
        assert torch.equal(found["model"]["w"], items(1)["model"]["w"])


def test_an_item_that_no_step_has_is_a_mistake(run: MemoryStorage) -> None:
    with pytest.raises(ConfigError, match=r"no step has such an item.*'model', 'optim'"):
        drop_item(run, "optimizer", steps=[1])
    drop_item(run, "optim", steps=[1])
    assert drop_item(run, "optim", steps=[1]).steps == ()
