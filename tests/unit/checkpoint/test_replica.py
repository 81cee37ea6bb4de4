"""A run in a second place: what is there can be restored, damage stays where it is, and a kill in between costs nothing."""

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch

import datastore as ds
from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.replica import replicate
from datastore.errors import ConfigError, CorruptError, MissingError, StorageError
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage


def items(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((300, 7), float(step)), "frozen": torch.arange(5000), "n": step}}


def save(storage: Storage, *steps: int, keep: int = 9) -> None:
    with Checkpointer(storage, keep=Keep(last=keep)) as ck:
        if ck.latest() is not None:
            ck.restore(items(-1))
        for step in steps:
            ck.save(step, items(step), metrics={"loss": 1 / (step + 1)}, blocking=True)


def holds(storage: Storage, step: int) -> bool:
    target = items(-1)
    with Checkpointer(storage) as ck:
        assert ck.restore(target, step=step).step == step
        assert not ck.verify(step).bad
    return torch.equal(target["model"]["w"], items(step)["model"]["w"]) and target["model"]["n"] == step


@pytest.fixture
def here() -> Storage:
    return MemoryStorage(uuid.uuid4().hex)


@pytest.fixture
def there() -> Storage:
    return MemoryStorage(uuid.uuid4().hex)


def steps_of(storage: Storage) -> list[int]:
    with Checkpointer(storage) as ck:
        return ck.steps()


def test_what_is_new_is_copied_and_nothing_twice(here: Storage, there: Storage) -> None:
    save(here, 1, 2)
    first = replicate(here, there)
    assert (first.steps, first.damaged, first.dropped, first.removed) == ((1, 2), (), (), ())
    assert holds(there, 2)
    save(here, 3)
    told: list[tuple[int, int]] = []
    second = replicate(here, there, progress=lambda done, total: told.append((done, total)))
    assert second.steps == (3,)
    assert second.size_bytes < first.size_bytes  # What never changes lies in a part that is there.
    assert told[-1][0] == told[-1][1] > 0
    assert holds(there, 3)
    again = replicate(here, there)
    assert (again.steps, again.files, again.size_bytes) == ((), 0, 0)


def test_the_second_place_keeps_what_it_is_told(here: Storage, there: Storage) -> None:
    save(here, 1, 2, 3, 4)
    with Checkpointer(here) as ck:
        ck.pin(1)
    report = replicate(here, there, keep=Keep(last=2))
    assert (report.steps, report.removed) == ((1, 3, 4), ())
    assert steps_of(there) == [1, 3, 4]
    assert all(holds(there, step) for step in (1, 3))
    assert replicate(here, there, keep=Keep(last=2)).steps == ()
    save(here, 5)
    assert replicate(here, there, keep=Keep(last=2)).removed == (3,)
    assert steps_of(there) == [1, 4, 5]


def test_a_run_comes_back_and_goes_on(here: Storage, there: Storage) -> None:
    save(here, 1, 2)
    replicate(here, there)
    new = MemoryStorage(uuid.uuid4().hex)
    assert replicate(there, new).steps == (1, 2)
    save(new, 3)
    assert replicate(new, there).steps == (3,)
    assert holds(there, 3)


@pytest.mark.parametrize("where", ["data", "header"])
def test_damage_is_not_spread(here: Storage, there: Storage, where: str) -> None:
    save(here, 1)
    replicate(here, there)
    save(here, 2)
    part = max(stat.key for stat in here.list("parts") if stat.key.endswith(".safetensors"))
    raw = bytearray(here.get(part))
    raw[-1 if where == "data" else 20] ^= 1
    here.put(part, raw)
    report = replicate(here, there)
    assert (report.steps, report.damaged) == ((), (2,))
    assert steps_of(there) == [1]
    save(here, 3)  # It goes on from step 1, for step 2 is damaged; and replaces it.
    assert replicate(here, there).steps == (3,)
    assert holds(there, 3)


def test_killed_in_between_it_goes_on(here: Storage, there: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    save(here, 1, 2)
    wanted = MemoryStorage(uuid.uuid4().hex)
    replicate(here, wanted)
    writes = [0]
    put, put_new = MemoryStorage.put, MemoryStorage.put_new

    def limited(method: Any) -> Any:
        def write(self: MemoryStorage, key: str, *chunks: Any) -> None:
            if self is there:
                if writes[0] == 0:
                    raise StorageError("the power is gone")
                writes[0] -= 1
            method(self, key, *chunks)

        return write

    monkeypatch.setattr(MemoryStorage, "put", limited(put))
    monkeypatch.setattr(MemoryStorage, "put_new", limited(put_new))
    for budget in range(12):
        writes[0] = budget
        try:
            replicate(here, there)
        except StorageError:
            monkeypatch.undo()
            assert all(holds(there, step) for step in steps_of(there))
            monkeypatch.setattr(MemoryStorage, "put", limited(put))
            monkeypatch.setattr(MemoryStorage, "put_new", limited(put_new))
    monkeypatch.undo()
    replicate(here, there)
    assert {stat.key for stat in there.list()} == {stat.key for stat in wanted.list()}
    assert all(holds(there, step) for step in (1, 2))


def test_where_the_run_went_back_the_copy_follows(here: Storage, there: Storage) -> None:
    save(here, 1, 2, 3)
    replicate(here, there)
    with Checkpointer(here) as ck:
        ck.restore(items(-1), step=1)
        ck.rewind(1)
        other = items(2)
        other["model"]["w"] += 0.5
        ck.save(2, other, blocking=True)
    report = replicate(here, there)
    assert (report.steps, report.dropped) == ((2,), (2, 3))
    assert steps_of(there) == [1, 2]
    target = items(-1)
    with Checkpointer(there) as ck:
        ck.restore(target)
    assert torch.equal(target["model"]["w"], items(2)["model"]["w"] + 0.5)


def test_another_run_and_no_run_are_refused(here: Storage, there: Storage) -> None:
    with pytest.raises(MissingError, match="no run with checkpoints"):
        replicate(here, there)
    save(here, 1)
    save(there, 1)
    with pytest.raises(ConfigError, match="another run is there"):
        replicate(here, there)


def test_what_lies_beside_the_steps_goes_along_but_for_the_lock(here: Storage, there: Storage) -> None:
    save(here, 1)
    here.put("config.json", b"settings")
    here.put("metrics/0001.jsonl", b"{}\n")
    here.put("lock/1.json", b"mine")
    replicate(here, there)
    assert there.get("config.json") == b"settings"
    with pytest.raises(MissingError):
        there.get("lock/1.json")
    here.put("metrics/0001.jsonl", b"{}\n{}\n")
    assert replicate(here, there).files == 1
    assert there.get("metrics/0001.jsonl") == b"{}\n{}\n"


def test_a_copy_restores_where_the_first_place_is_damaged(tmp_path: Path) -> None:
    with Checkpointer(tmp_path / "run") as ck:
        ck.save(1, items(1), blocking=True)
    ds.replicate(tmp_path / "run", tmp_path / "copy")
    part = next((tmp_path / "run").glob("parts/*.safetensors"))
    part.write_bytes(part.read_bytes()[:-9])
    with Checkpointer(tmp_path / "run") as ck, pytest.raises(CorruptError):
        ck.restore(items(-1))
    target = items(-1)
    with Checkpointer(tmp_path / "copy") as ck:
        ck.restore(target)
    assert torch.equal(target["model"]["w"], items(1)["model"]["w"])
