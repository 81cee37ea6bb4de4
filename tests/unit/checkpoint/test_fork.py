"""A run that begins with a step of another: all of its state, no byte copied on one file system, and neither harms the other."""

import errno
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.codec import Codec
from datastore.checkpoint.inspect import inspect_step, verify_step
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.ranks import read_run
from datastore.checkpoint.replica import fork_step
from datastore.checkpoint.steps import CheckpointerSettings
from datastore.errors import ConfigError, CorruptError, MissingError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage


def items(value: float) -> dict[str, Any]:
    """What changes with each step, and what never does and lies in the part of the first."""
    return {"model": {"w": torch.full((1000,), value), "frozen": torch.arange(500)}, "data": {"cursor": value}}


def save(storage: Storage, *steps: int, keep: int = 5, codec: Codec = "none") -> None:
    state = items(0.0)
    with Checkpointer(storage, keep=Keep(last=keep), options=CheckpointerSettings(codec=codec)) as ck:
        if ck.latest() is not None:
            ck.restore(state)
        for step in steps:
            state["model"]["w"].fill_(step)
            state["data"]["cursor"] = float(step)
            ck.save(step, state, blocking=True, metrics={"loss": 1.0 / step})


def check_it_holds(storage: Storage, step: int) -> None:
    into = items(-1.0)
    with Checkpointer(storage) as ck:
        assert ck.restore(into).step == step
    assert into["model"]["w"].unique().tolist() == [step]
    assert into["model"]["frozen"].equal(torch.arange(500))
    assert into["data"] == {"cursor": float(step)}
    assert not verify_step(storage, step).bad


@pytest.fixture
def here(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "there")


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_on_one_file_system_no_tensor_is_copied(here: LocalStorage, there: LocalStorage, codec: Codec) -> None:
    save(here, 1, 2, 3, codec=codec)
    told: list[tuple[int, int]] = []
    done = fork_step(here, there, step=2, progress=lambda now, whole: told.append((now, whole)))
    assert (done.step, done.copied_bytes) == (2, 0)
    assert told[-1] == (done.shared_bytes, done.shared_bytes)
    parts = [stat.key for stat in there.list("parts") if ".safetensors" in stat.key]
    assert len(parts) == 2  # The frozen tensor lies in the part of the first step.
    assert all(Path(here.url, key).samefile(Path(there.url, key)) for key in parts)
    check_it_holds(there, 2)


def test_the_new_run_has_a_name_of_its_own_and_no_past(here: LocalStorage, there: LocalStorage) -> None:
    save(here, 1, 2)
    done = fork_step(here, there, step=2)
    first, second = read_run(here), read_run(there)
    assert first is not None
    assert second is not None
    assert first.run_id != second.run_id == done.run_id
    report = inspect_step(there, 2)
    assert (report.parent, report.summary.metrics) == (None, {"loss": 0.5})


def test_both_go_on_and_neither_takes_a_file_of_the_other(here: LocalStorage, there: LocalStorage) -> None:
    save(here, 1, 2)
    fork_step(here, there, step=1)
    save(there, 7, keep=1)
    save(here, 3, keep=1)
    assert [stat.key for stat in here.list("steps")] == ["steps/0000000003.json"]
    assert [stat.key for stat in there.list("steps")] == ["steps/0000000007.json"]
    check_it_holds(here, 3)
    check_it_holds(there, 7)


@pytest.mark.parametrize("why", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_files_cannot_have_two_names_they_are_copied(
    here: LocalStorage, there: LocalStorage, monkeypatch: pytest.MonkeyPatch, why: int
) -> None:
    save(here, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(why, os.strerror(why))

    monkeypatch.setattr("datastore.storage.backends.local.os.link", refuse)
    done = fork_step(here, there, step=1)
    assert (done.shared_bytes, done.copied_bytes > 0) == (0, True)
    check_it_holds(there, 1)


def test_between_two_kinds_of_storage_parts_are_copied_and_checked_on_the_way(here: LocalStorage) -> None:
    save(here, 1, 2)
    far = MemoryStorage(uuid.uuid4().hex)
    assert fork_step(here, far, step=2).shared_bytes == 0
    check_it_holds(far, 2)
    part = max(Path(here.url).glob("parts/*.safetensors"))
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    other = MemoryStorage(uuid.uuid4().hex)
    with pytest.raises(CorruptError, match="does not match its digest"):
        fork_step(here, other, step=2)
    assert not list(other.list("steps"))


def test_what_several_ranks_saved_is_forked_as_a_whole(here: LocalStorage, there: LocalStorage) -> None:
    def rank(number: int) -> None:
        with Checkpointer(here, rank=number, world=3, session="s") as ck:
            ck.save(1, items(1.0)).committed(timeout_s=60)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(rank, range(3)))
    fork_step(here, there, step=1)
    check_it_holds(there, 1)


def test_what_lies_beside_the_steps_goes_along_but_not_what_is_said_of_other_steps(
    here: LocalStorage, there: LocalStorage
) -> None:
    save(here, 1, 2)
    here.put("config.json", b"settings")
    here.put("lock/now", b"mine")
    with Checkpointer(here) as ck:
        ck.pin(1)
    fork_step(here, there, step=2)
    beside = {stat.key.split("/")[0] for stat in there.list()}
    assert beside == {"config.json", "parts", "refs", "run.json", "steps"}
    assert [stat.key for stat in there.list("refs")] == ["refs/latest.json"]


def test_a_place_that_is_not_empty_and_a_step_that_is_not_there_are_refused(
    here: LocalStorage, there: LocalStorage
) -> None:
    save(here, 1)
    with pytest.raises(MissingError, match="no such step"):
        fork_step(here, there, step=9)
    there.put("notes.txt", b"mine")
    with pytest.raises(ConfigError, match=r"something is there.*notes\.txt"):
        fork_step(here, there, step=1)
    assert [stat.key for stat in there.list()] == ["notes.txt"]
