"""How a save goes on in the background, who hears of its failure, what may follow it, and what is forgotten."""

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import Buffer, override

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.format.manifest import Entry
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.saving import write as save
from datastore.checkpoint.saving.snapshot import BufferPool
from datastore.errors import (
    ConfigError,
    ConflictError,
    CorruptError,
    MissingError,
    ResumeError,
    StorageError,
    WaitError,
)
from datastore.storage.backends.memory import MemoryStorage


class Flaky(MemoryStorage):
    """Storage in memory that calls `before(key)` ahead of each exclusive write, and `after(key)` behind it."""

    def __init__(self) -> None:
        super().__init__(uuid.uuid4().hex)
        self.before: Callable[[str], object] = lambda _key: None
        self.after: Callable[[str], object] = lambda _key: None

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        self.before(key)
        super().put_new(key, *chunks)
        self.after(key)

    def names(self) -> list[str]:
        return [stat.key for stat in self.list()]


def failing(*kinds: str, error: Exception | None = None) -> Callable[[str], None]:
    def before(key: str) -> None:
        if key.startswith(kinds) or key.endswith(kinds):
            raise error or StorageError("the disk is full", key=key, hint="Free some space.")

    return before


@pytest.fixture
def storage() -> Flaky:
    return Flaky()


@pytest.fixture
def ck(storage: Flaky) -> Iterator[Checkpointer]:
    with Checkpointer(storage) as ck:
        yield ck


def state(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"state": {"a": torch.full((100,), value), "b": torch.full((3,), value)}}


def value_of(items: dict[str, dict[str, torch.Tensor]]) -> float:
    (value,) = {tensor.min().item() for tensor in items["state"].values()} | {
        tensor.max().item() for tensor in items["state"].values()
    }
    return value


def restored(storage: Flaky, step: Any = "latest") -> float:
    into = state(-1.0)
    with Checkpointer(storage) as ck:
        ck.restore(into, step=step)
    return value_of(into)


# The save in flight


def test_what_was_staged_is_saved_though_the_state_changes_while_it_is_written(
    storage: Flaky, ck: Checkpointer
) -> None:
    gate = threading.Event()
    storage.before = lambda key: gate.wait() if key.endswith(".safetensors") else None
    items = state(1.0)
    handle = ck.save(1, items)
    handle.staged(timeout_s=60)
    done_early = handle.done
    with suppress(WaitError):
        handle.committed(timeout_s=0.01)
        done_early = True
    for tensor in items["state"].values():
        tensor.fill_(2.0)
    gate.set()
    handle.committed(timeout_s=60)
    assert not done_early
    assert restored(storage) == 1.0


def test_guard_holds_the_optimizer_back_only_while_the_state_is_copied(
    ck: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, passed = threading.Event(), threading.Event()
    take = BufferPool.take

    def take_later(self: BufferPool, size_bytes: int) -> torch.Tensor:
        gate.wait()
        return take(self, size_bytes)

    def step() -> None:
        with ck.guard():
            passed.set()

    monkeypatch.setattr(BufferPool, "take", take_later)
    handle = ck.save(1, state(1.0))
    thread = threading.Thread(target=step)
    thread.start()
    held = not passed.wait(0.1)
    gate.set()
    thread.join()
    handle.committed(timeout_s=60)
    assert held
    with ck.guard():
        pass


def test_a_second_save_waits_for_the_first_and_both_are_there(storage: Flaky, ck: Checkpointer) -> None:
    for step in range(5):
        ck.save(step, state(float(step)))
    ck.close()
    assert [restored(storage, step) for step in (2, 3, 4)] == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("kind", ["parts/", ".json", "steps/", ".safetensors"])
def test_a_failed_write_is_raised_by_the_handle_and_the_step_before_is_intact(storage: Flaky, kind: str) -> None:
    ck = Checkpointer(storage)
    ck.save(1, state(1.0), blocking=True)
    storage.before = failing(kind)
    handle = ck.save(2, state(2.0))
    with pytest.raises(StorageError, match="the disk is full"):
        handle.committed(timeout_s=60)
    assert ck.steps() == [1]
    storage.before = lambda _key: None
    ck.save(2, state(2.5)).committed(timeout_s=60)  # It has been heard of, so one may try again.
    ck.close()
    assert (restored(storage, 1), restored(storage)) == (1.0, 2.5)


def test_an_error_nobody_has_heard_of_is_raised_by_the_next_save_and_once(storage: Flaky, ck: Checkpointer) -> None:
    storage.before = failing(".safetensors")
    ck.save(1, state(1.0))
    with pytest.raises(StorageError, match="the disk is full"):
        ck.save(2, state(2.0))
    storage.before = lambda _key: None
    ck.save(2, state(2.0), blocking=True)
    assert ck.steps() == [2]


def test_an_error_nobody_has_heard_of_is_raised_at_close(storage: Flaky) -> None:
    storage.before = failing(".safetensors")
    ck = Checkpointer(storage)
    ck.save(1, state(1.0))
    with pytest.raises(StorageError, match="the disk is full"):
        ck.close()
    ck.close()
    with pytest.raises(ConfigError, match="closed"):
        ck.save(1, state(1.0))


def test_an_error_of_the_block_is_not_hidden_by_one_of_the_save(
    storage: Flaky, caplog: pytest.LogCaptureFixture
) -> None:
    storage.before = failing(".safetensors")

    def fail() -> None:
        with Checkpointer(storage) as ck:
            ck.save(1, state(1.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "the disk is full" in caplog.text


def test_a_save_whose_acknowledgement_is_lost_is_committed(storage: Flaky, ck: Checkpointer) -> None:
    lost = iter([StorageError("the connection was reset", transient=True), ConflictError("key already written")])

    def after(key: str) -> None:
        if key.startswith("steps/"):
            raise next(lost)

    storage.after = after
    assert ck.save(1, state(1.0), blocking=True).committed().step == 1
    assert ck.save(2, state(2.0), blocking=True).committed().step == 2


def test_a_transient_error_of_the_commit_is_tried_again(
    storage: Flaky, ck: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.checkpoint.saving.commit._FIRST_PAUSE_S", 0.001)
    errors = [StorageError("slow down", transient=True)] * 2

    def before(key: str) -> None:
        if key.startswith("steps/") and errors:
            raise errors.pop()

    storage.before = before
    ck.save(1, state(1.0), blocking=True)
    assert ck.steps() == [1]


def test_only_its_own_process_uses_a_checkpointer(ck: Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    ck.save(1, state(1.0), blocking=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        with ck.guard():
            pass
        with pytest.raises(ConfigError, match="fork"):
            ck.save(2, state(2.0))
        ck.close()  # Does nothing there.
    ck.save(2, state(2.0), blocking=True)


# What may follow


def test_an_unchanged_step_saved_twice_is_one_step_and_a_changed_one_is_refused(
    storage: Flaky, ck: Checkpointer
) -> None:
    items = state(1.0)
    first = ck.save(1, items, metrics={"loss": 1.0}, blocking=True).committed()
    for metrics in ({"loss": 1.0}, None):
        assert ck.save(1, items, metrics=metrics).committed(timeout_s=60) == first
    with pytest.raises(ConflictError, match="another content"):
        ck.save(1, items, metrics={"loss": 2.0}, blocking=True)
    items["state"]["b"][0] = 5
    with pytest.raises(ConflictError, match="another content"):
        ck.save(1, items, blocking=True)
    with pytest.raises(ConflictError, match="another content"):
        ck.save(1, {**state(1.0), "more": {}}, blocking=True)
    with pytest.raises(ConflictError, match="lies before"):
        ck.save(0, items)
    assert restored(storage) == 1.0


@pytest.mark.parametrize("step", [-1, 1.5, True, "3"])
def test_a_step_is_a_number_from_zero_on(ck: Checkpointer, step: Any) -> None:
    with pytest.raises(ConfigError, match="not a step"):
        ck.save(step, state(1.0))


def test_a_run_that_was_not_restored_is_not_written_to(storage: Flaky, ck: Checkpointer) -> None:
    ck.save(5, state(5.0), blocking=True)
    for step in (4, 5, 6):
        with Checkpointer(storage) as other, pytest.raises(ConflictError, match="has not restored"):
            other.save(step, state(0.0), blocking=True)
    assert (ck.steps(), restored(storage)) == ([5], 5.0)


def test_of_two_writers_that_restored_the_same_step_one_goes_on(storage: Flaky, ck: Checkpointer) -> None:
    ck.save(5, state(5.0), blocking=True)
    other = Checkpointer(storage)
    other.restore(state(0.0))
    ck.save(6, state(6.0), blocking=True)
    for step in (6, 7):
        with pytest.raises(ConflictError):
            other.save(step, state(0.0), blocking=True)
    other.close()
    assert restored(storage) == 6.0


def test_a_step_committed_by_another_at_the_last_moment_wins(storage: Flaky, ck: Checkpointer) -> None:
    other = Checkpointer(storage)

    def before(key: str) -> None:
        if key.startswith("steps/"):
            storage.before = lambda _key: None
            other.save(1, state(2.0), blocking=True)

    storage.before = before
    with pytest.raises(ConflictError, match="committed by another save"):
        ck.save(1, state(1.0), blocking=True)
    other.close()
    assert restored(storage) == 2.0


def test_going_back_needs_a_rewind_and_then_the_history_is_one_line_again(storage: Flaky) -> None:
    with Checkpointer(storage) as ck:
        for step in (10, 20, 30):
            ck.save(step, state(float(step)), blocking=True)
    with Checkpointer(storage) as ck:
        ck.restore(state(0.0), step=10)
        with pytest.raises(ConflictError, match=r"rewind\(\)"):
            ck.save(15, state(15.0), blocking=True)
        with pytest.raises(MissingError, match="There are: 10, 20, 30"):
            ck.rewind(11)
        assert ck.rewind(10) == [20, 30]
        commit = ck.save(15, state(15.0), blocking=True).committed()
        assert ck.steps() == [10, 15]
    assert commit.parent is not None
    assert commit.parent.step == 10
    assert not [key for key in storage.names() if "0000000020" in key or "0000000030" in key]
    assert restored(storage) == 15.0


def test_rewinding_below_the_own_step_forgets_it(ck: Checkpointer) -> None:
    for step in (10, 20):
        ck.save(step, state(float(step)), blocking=True)
    ck.rewind(10)
    with pytest.raises(ConflictError, match="has not restored"):
        ck.save(30, state(0.0), blocking=True)
    ck.restore(state(0.0))
    ck.save(20, state(21.0), blocking=True)


def test_after_a_fall_back_the_damaged_step_is_replaced_by_its_second_coming(
    storage: Flaky, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(storage) as ck:
        for step in (10, 20):
            ck.save(step, state(float(step)), blocking=True)
    (part,) = [key for key in storage.names() if "0000000020" in key and key.endswith(".safetensors")]
    storage.delete(part)
    with Checkpointer(storage) as ck:
        info = ck.restore(state(0.0))
        assert (info.step, [bad.step for bad in info.fell_back]) == (10, [20])
        assert ck.steps() == [10, 20]  # Restoring removes nothing.
        ck.save(15, state(15.0), blocking=True)
        ck.save(20, state(21.0), blocking=True)
        assert ck.steps() == [10, 15, 20]
    assert "removing the damaged step 20" in caplog.text
    assert restored(storage) == 21.0


def test_a_step_asked_for_by_number_is_never_replaced(storage: Flaky, ck: Checkpointer) -> None:
    ck.save(10, state(10.0), blocking=True)
    ck.save(20, state(20.0), blocking=True)
    storage.put("steps/0000000020.json", b"{}")
    with pytest.raises(CorruptError):
        ck.restore(state(0.0), step=20)
    assert ck.restore(state(0.0), step=10).step == 10


# What is written again, and what is forgotten


def sizes(storage: Flaky) -> dict[str, int]:
    return {stat.key: stat.size_bytes for stat in storage.list("parts") if stat.key.endswith(".safetensors")}


def test_unchanged_tensors_are_not_written_again_and_outlive_the_step_that_wrote_them(storage: Flaky) -> None:
    frozen, trained = torch.arange(5000.0), torch.zeros(10)
    items: dict[str, Any] = {"state": {"frozen": frozen, "trained": trained, "gaps": torch.ones(6, 2)[:, 0]}}
    with Checkpointer(storage, keep=Keep(last=2)) as ck:
        for step in range(6):
            trained.fill_(step)
            commit = ck.save(step, items).committed(timeout_s=60)
        assert len(commit.uses) == 1
        assert "/0000000000-" in commit.uses[0]
        ck.gc()  # What the last save lets go, it does in the background.
        assert ck.steps() == [4, 5]
        assert ck.verify(5).bad == ()
        ck.save(6, items).committed(timeout_s=60)
        assert ck.save(7, items).committed(timeout_s=60).parts[0].part == ""
    assert max(sizes(storage).values()) > 20_000 > sorted(sizes(storage).values())[-2]
    frozen_again, trained_again = torch.zeros(5000), torch.zeros(10)
    with Checkpointer(storage) as ck:
        ck.restore({"state": {"frozen": frozen_again, "trained": trained_again, "gaps": torch.zeros(6)}})
        assert ck.save(8, {"state": {"frozen": frozen_again}}, blocking=True).committed().parts[0].part == ""
    assert torch.equal(frozen_again, frozen)
    assert trained_again.eq(5).all()


def test_the_newest_steps_are_kept_and_nothing_of_the_others(storage: Flaky) -> None:
    with Checkpointer(storage, keep=Keep(last=2)) as ck:
        for step in range(5):
            ck.save(step, state(float(step)), blocking=True)
    assert {key.split("/")[-1][:10] for key in storage.names() if key.startswith(("parts", "steps"))} == {
        "0000000003",
        "0000000004",
    }


def test_what_a_killed_session_left_goes_once_a_later_step_is_committed_but_not_before(storage: Flaky) -> None:
    left = f"parts/0000000007-{'ab' * 8}-00000.safetensors"
    with Checkpointer(storage) as ck:
        ck.save(5, state(5.0), blocking=True)
        storage.put(left, b"half of a save")
        ck.save(6, state(6.0), blocking=True)
        ck.gc()
        assert left in storage.names()
        ck.save(8, state(8.0), blocking=True)
        ck.gc()
        assert left not in storage.names()


def test_what_a_killed_writer_left_unfinished_goes_with_the_first_save_of_the_next(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"state": {"w": torch.ones(3)}}, blocking=True)
    left = parts / ".0000000002-0123456789abcdef-00000.safetensors.9.tmp"
    left.write_bytes(b"half")
    os.utime(left, (time.time() - 1, time.time() - 1))
    with Checkpointer(tmp_path) as ck:
        ck.restore({"state": {}})
        own = parts / ".of-another-rank.tmp"
        own.write_bytes(b"in flight")
        os.utime(own, (time.time() + 1, time.time() + 1))
        ck.save(2, {"state": {"w": torch.zeros(3)}}, blocking=True)
    assert not left.exists()
    assert own.exists()


def test_a_step_on_trial_does_not_count_as_kept_until_it_is_approved(storage: Flaky) -> None:
    with Checkpointer(storage, keep=Keep(last=1)) as ck:
        for step in (1, 2):
            ck.save(step, state(float(step)), on_trial=True).committed()
        ck.save(2, state(2.0)).committed()
        ck.approve()
    assert len(Checkpointer(storage).steps()) == 1
    with Checkpointer(storage, keep=Keep(last=1)) as ck:
        ck.restore(state(0.0))
        ck.save(3, state(3.0), blocking=True, on_trial=True)
        ck.gc(dry_run=True)
        assert ck.steps() == [2, 3]
        ck.approve()
        ck.gc(dry_run=True)
        assert ck.steps() == [3]


def test_what_a_step_refers_to_is_stored_before_it_is_committed_or_it_is_not_committed(ck: Checkpointer) -> None:
    seen: list[list[int]] = []
    ck.save(1, state(1.0), first=lambda: seen.append(ck.steps())).committed()
    assert seen == [[]]

    def fail() -> None:
        raise StorageError("no room for what it refers to")

    handle = ck.save(2, state(2.0), first=fail)
    with pytest.raises(StorageError, match="no room"):
        handle.committed()
    assert isinstance(handle.failure(), StorageError)
    assert ck.steps() == [1]
    ck.save(3, state(3.0)).committed()
    assert ck.steps() == [1, 3]


def test_gc_can_say_what_it_would_do(storage: Flaky, ck: Checkpointer) -> None:
    for step in range(3):
        ck.save(step, state(float(step)), blocking=True)
    with Checkpointer(storage, keep=Keep(last=1)) as other:
        before = storage.names()
        plan = other.gc(dry_run=True)
        assert storage.names() == before
        assert plan.steps == (0, 1)
        assert other.gc() == plan
        assert set(before) - set(storage.names()) == {*plan.keys, "steps/0000000000.json", "steps/0000000001.json"}
        assert plan.size_bytes > 0
    assert restored(storage) == 2.0


def test_a_damaged_step_does_not_count_as_kept_and_its_parts_stay_while_it_is_young(storage: Flaky) -> None:
    with Checkpointer(storage, keep=Keep(last=2)) as ck:
        for step in (1, 2):
            ck.save(step, state(float(step)), blocking=True)
        storage.put("steps/0000000002.json", b"{}")
        ck.save(3, state(3.0), blocking=True)
        ck.gc()
        assert ck.steps() == [1, 2, 3]
        assert [key for key in storage.names() if "/0000000002-" in key]
        ck.save(4, state(4.0), blocking=True)
        ck.gc()
        assert ck.steps() == [3, 4]
        assert not [key for key in storage.names() if "/0000000002-" in key]


def test_a_failed_collection_is_logged_and_the_save_stands(
    storage: Flaky, ck: Checkpointer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_self: Flaky, key: str) -> None:
        raise StorageError("permission denied", key=key)

    for step in range(3):
        ck.save(step, state(float(step)), blocking=True)
    with monkeypatch.context() as patch:
        patch.setattr(Flaky, "delete", refuse)
        ck.save(3, state(3.0), blocking=True).committed()
        ck.steps()
        ck.save(4, state(4.0)).committed(timeout_s=60)
        ck.close()
    assert "old checkpoints were not removed" in caplog.text
    assert restored(storage) == 4.0


def test_at_least_one_step_is_kept(storage: Flaky) -> None:
    with pytest.raises(ConfigError, match=r"`last`: expected `int` >= 1"):
        Checkpointer(storage, keep=Keep(last=0))


def test_a_state_of_another_shape_after_a_restore_is_written_whole(storage: Flaky) -> None:
    with Checkpointer(storage) as ck:
        ck.save(1, state(1.0), blocking=True)
        ck.save(2, {"state": {"a": torch.ones(50), "b": torch.ones(3)}}, blocking=True)
        with pytest.raises(ResumeError):
            ck.restore(state(0.0))
        into = {"a": torch.zeros(50), "b": torch.zeros(3)}
        ck.restore({"state": into})
    assert into["a"].eq(1).all()


def test_a_commit_that_seemed_to_fail_and_did_not_is_part_of_the_history(storage: Flaky, ck: Checkpointer) -> None:
    ck.save(1, state(1.0), blocking=True)
    late: list[tuple[str, tuple[Buffer, ...]]] = []
    honest = MemoryStorage.put_new

    def before(key: str) -> None:
        if key.startswith("steps/"):
            raise StorageError("the gateway did not answer")

    def remember(key: str, *chunks: Buffer) -> None:
        late.append((key, chunks))
        before(key)
        honest(storage, key, *chunks)

    storage.put_new = remember  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="did not answer"):
        ck.save(2, state(2.0), blocking=True)
    del storage.put_new  # type: ignore[method-assign]
    (request,) = [(key, chunks) for key, chunks in late if key.startswith("steps/")]
    storage.put_new(request[0], *request[1])  # The request was under way all the time.
    ck.save(3, state(3.0), blocking=True)
    assert ck.steps() == [1, 2, 3]
    assert (restored(storage, 2), restored(storage)) == (2.0, 3.0)


def test_what_has_changed_is_not_compared_first_until_it_stays_the_same(
    storage: Flaky, ck: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[int] = []
    still = save._still

    def record(entry: Entry | None, data: Any) -> Entry | None:
        compared.append(entry is not None)
        return still(entry, data)

    monkeypatch.setattr(save, "_still", record)
    weights = torch.zeros(50)
    items = {"state": {"w": weights}}
    # step: does it change before, is it compared, is it written
    for step, (changes, asked, written) in enumerate(
        [(1, 0, 1), (1, 1, 1), (1, 0, 1), (0, 0, 1), (0, 1, 0), (0, 1, 0), (1, 1, 1), (1, 0, 1)]
    ):
        weights += changes
        compared.clear()
        commit = ck.save(step, items, blocking=True).committed()
        assert (sum(compared), bool(commit.parts[0].part)) == (asked, bool(written)), step
    assert restored_weights(storage).eq(weights).all()


def restored_weights(storage: Flaky) -> torch.Tensor:
    into = torch.zeros(50)
    with Checkpointer(storage) as ck:
        ck.restore({"state": {"w": into}})
    return into


ENDS_WITHOUT_CLOSING = """
import sys, torch
from datastore.checkpoint.checkpointer import Checkpointer  # noqa: E402
ck = Checkpointer(sys.argv[1])
ck.save(1, {"state": {f"t{i}": torch.full((1000,), 1.0) for i in range(200)}})
if len(sys.argv) > 2:
    import shutil
    import datastore.storage.backends.local as local
    def full(*_):
        raise OSError(28, "No space left on device")
    ck._flights[0].committed()
    local.os.fdatasync = full
    ck.save(2, {"state": {"t": torch.ones(5)}})
"""


def test_a_program_that_ends_without_closing_still_finishes_its_save(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS_WITHOUT_CLOSING, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    into = {f"t{i}": torch.zeros(1000) for i in range(200)}
    with Checkpointer(tmp_path) as ck:
        ck.restore({"state": into})
    assert all(tensor.eq(1).all() for tensor in into.values())


def test_a_program_that_ends_without_closing_tells_of_a_save_that_failed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS_WITHOUT_CLOSING, str(tmp_path), "fail"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("step 2 was not saved: the disk is full")
    with Checkpointer(tmp_path) as ck:
        assert ck.steps() == [1]


def test_a_step_of_what_changes_each_time_may_be_saved_twice_too(ck: Checkpointer) -> None:
    items = state(1.0)
    for step in (1, 2, 3):
        items["state"]["a"] += 1
        commit = ck.save(step, items, blocking=True).committed()
        assert ck.save(step, items, blocking=True).committed() == commit
    assert ck.steps() == [1, 2, 3]


def test_a_large_part_is_written_without_a_condition_unless_somebody_has_its_name(
    storage: Flaky, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = {"model": {"w": torch.arange(5000.0)}}
    conditional: list[str] = []
    storage.before = conditional.append
    monkeypatch.setattr(save, "_ONE_WRITE_BYTES", 5000 * 4)
    with Checkpointer(storage, session="s") as ck:
        ck.save(1, items, blocking=True)
    assert not [key for key in conditional if key.endswith(".safetensors")]
    parts = [key for key in storage.names() if key.endswith(".safetensors")]
    raw = storage.get(parts[0])
    storage.delete("steps/0000000001.json")
    with Checkpointer(storage, session="s") as other, pytest.raises(ConflictError):
        other.save(1, {"model": {"w": torch.zeros(5000)}}, blocking=True)
    assert storage.get(parts[0]) == raw
