"""Collections beside savers, at every moment of the one or the other: no step is ever without a part. And a budget that holds."""

import threading
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from typing_extensions import Buffer, override

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.inspect import verify_step
from datastore.checkpoint.keeping import Keep, collect
from datastore.checkpoint.steps import StepLog
from datastore.errors import ConfigError, StorageError
from datastore.storage.backends.memory import MemoryStorage


class Switching(MemoryStorage):
    """Does `other` once, before the `at`-th call from the thread that is watched."""

    def __init__(self) -> None:
        super().__init__(uuid.uuid4().hex)
        self.at = -1
        self.calls = 0
        self.other: Callable[[], object] = lambda: None
        self.largest = 0
        self._inside = threading.Lock()

    def _call(self) -> None:
        if self._inside.acquire(blocking=False):
            self.calls += 1
            if self.calls == self.at:
                self.other()
            self._inside.release()

    def parts_bytes(self) -> int:
        return sum(stat.size_bytes for stat in super().list("parts"))

    @override
    def get(self, key: str) -> bytes:
        self._call()
        return super().get(key)

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        self._call()
        super().put(key, *chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        self._call()
        super().put_new(key, *chunks)
        self.largest = max(self.largest, self.parts_bytes())

    @override
    def delete(self, key: str) -> None:
        self._call()
        super().delete(key)

    @override
    def list(self, folder: str = "") -> Any:
        self._call()
        return super().list(folder)


def items(step: int) -> dict[str, Any]:
    """Some of it never changes, some changes once at step 2, some always."""
    model = {"frozen": torch.arange(3000), "late": torch.arange(2000) + (step > 1), "w": torch.full((50,), float(step))}
    return {"model": model}


def fallen_back() -> tuple[Switching, Checkpointer]:
    """Return a run of steps 1 and 2, of which the second is damaged and the first was restored: its parts are what a save points into."""
    storage = Switching()
    with Checkpointer(storage, keep=Keep(last=9)) as ck:
        ck.save(1, items(1), blocking=True)
        ck.save(2, {"model": {name: tensor + 1 for name, tensor in items(2)["model"].items()}}, blocking=True)
    part = StepLog(storage).read(2).parts[0].part
    raw = bytearray(storage.get(part))
    raw[-1] ^= 1
    storage.put(part, bytes(raw))
    ck = Checkpointer(storage, keep=Keep(last=9))
    assert ck.restore(items(0)).step == 1
    return storage, ck


def assert_all_whole(storage: Switching) -> None:
    for step in StepLog(storage).steps():
        if step != 2:
            assert not verify_step(storage, step).bad, step


def test_a_part_that_went_is_found_before_the_commit_and_the_next_save_writes_all() -> None:
    storage, ck = fallen_back()
    collect(storage, Keep(last=1))  # By somebody who does not know that step 2 is damaged.
    assert StepLog(storage).steps() == [2]
    with pytest.raises(StorageError, match="a part of an earlier save is gone"):
        ck.save(3, items(1), blocking=True)
    ck.save(4, items(1), blocking=True)
    ck.close()
    assert verify_step(storage, 4).bad == ()
    assert StepLog(storage).read(4).uses == ()


@pytest.mark.parametrize("watched", ["save", "collect"])
def test_whenever_a_collection_and_a_save_meet_no_step_lacks_a_part(watched: str) -> None:
    failed = committed = at = 0
    while True:
        at += 1
        storage, ck = fallen_back()

        def save(ck: Checkpointer = ck) -> None:
            with suppress(StorageError):
                ck.save(3, items(1), blocking=True)

        def other(storage: Switching = storage) -> None:
            collect(storage, Keep(last=1))

        first, second = (save, other) if watched == "save" else (other, save)
        storage.other, storage.calls, storage.at = second, 0, at
        first()
        ck._settle()
        if storage.calls < at:
            break
        assert_all_whole(storage)
        committed += 3 in StepLog(storage).steps()
        failed += 3 not in StepLog(storage).steps()
        storage.at = -1
        ck.save(4, items(4), blocking=True)
        ck.close()
        assert verify_step(storage, 4).bad == ()
    assert committed > 1
    assert failed > 1


def big(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((50_000,), float(step))}}


def test_a_budget_holds_at_every_moment_and_the_oldest_go_first() -> None:
    storage = Switching()
    budget = 5 * 210_000
    with Checkpointer(storage, keep=Keep(last=50, budget_bytes=budget)) as ck:
        for step in range(1, 9):
            ck.save(step, big(step), blocking=True)
            if step == 2:
                ck.pin(2)
        ck.gc()
        assert ck.steps() == [2, 6, 7, 8]
    assert storage.parts_bytes() <= storage.largest <= budget
    assert all(not verify_step(storage, step).bad for step in (2, 6, 7, 8))
    assert collect(storage, Keep(last=50, budget_bytes=2 * 210_000), dry_run=True).steps == (6, 7)


def test_a_budget_that_cannot_hold_is_told_and_the_newest_step_stays() -> None:
    storage = Switching()
    with Checkpointer(storage, keep=Keep(budget_bytes=350_000)) as ck:
        ck.save(1, big(1), blocking=True)
        with pytest.raises(ConfigError, match="the budget does not hold another step"):
            ck.save(2, big(2), blocking=True)
        assert ck.steps() == [1]
    assert not verify_step(storage, 1).bad


def test_notes_of_programs_that_were_killed_go_after_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Switching()
    storage.put("refs/claims/old", b"parts/0000000001-0123456789abcdef-00000.safetensors")
    storage.put("refs/condemned/old", b"parts/0000000001-0123456789abcdef-00000.safetensors")
    with Checkpointer(storage, keep=Keep(last=1)) as ck:
        for step in (1, 2):
            ck.save(step, big(step), blocking=True)
        ck.gc()
        assert {stat.key for stat in storage.list("refs")} >= {"refs/claims/old", "refs/condemned/old"}
        monkeypatch.setattr("datastore.checkpoint.keeping._STALE_S", -1)
        ck.save(3, big(3), blocking=True)
        ck.gc()
        assert {stat.key for stat in storage.list("refs")} == {"refs/latest.json"}
