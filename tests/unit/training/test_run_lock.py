import os
import subprocess
import sys

import msgspec
import pytest

from datastore.document import seal, unseal
from datastore.errors import ConflictError
from datastore.storage.backends.memory import MemoryStorage
from datastore.training.run.lock import LockHolder, RunLock


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> MemoryStorage:
    return MemoryStorage(request.node.name)


def holder_of(storage: MemoryStorage) -> LockHolder:
    (found,) = storage.list("lock")
    return unseal(LockHolder, storage.get(found.key), where=found.key)


def leave_a_lock(storage: MemoryStorage, **changes: object) -> None:
    with RunLock(storage, session="a"):
        held = msgspec.structs.replace(holder_of(storage), **changes)
    storage.put("lock/00000007.json", seal(held))


def a_dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def test_a_second_writer_is_refused_and_told_who_the_first_is(storage: MemoryStorage) -> None:
    with (
        RunLock(storage, session="a"),
        pytest.raises(ConflictError, match=f"pid={os.getpid()}"),
        RunLock(storage, session="b"),
    ):
        pass


def test_a_lock_that_was_given_back_can_be_taken(storage: MemoryStorage) -> None:
    for session in ("a", "b"):
        with RunLock(storage, session=session):
            assert holder_of(storage).session == session
    assert not list(storage.list("lock"))


def test_the_lock_of_a_dead_process_is_taken_over(storage: MemoryStorage) -> None:
    leave_a_lock(storage, pid=a_dead_process())
    with RunLock(storage, session="b"):
        assert holder_of(storage).session == "b"


def test_a_process_id_that_was_given_to_another_process_does_not_hold_the_lock(storage: MemoryStorage) -> None:
    leave_a_lock(storage, started="1")
    with RunLock(storage, session="b"):
        assert holder_of(storage).session == "b"


def test_a_lock_from_before_the_last_boot_is_taken_over(storage: MemoryStorage) -> None:
    leave_a_lock(storage, boot="another boot")
    with RunLock(storage, session="b"):
        assert holder_of(storage).session == "b"


def test_the_lock_of_another_machine_is_taken_over_only_if_one_is_told_to(storage: MemoryStorage) -> None:
    leave_a_lock(storage, host="elsewhere", pid=a_dead_process())
    with pytest.raises(ConflictError, match="host='elsewhere'"), RunLock(storage, session="b"):
        pass
    with RunLock(storage, session="b", take_over=True):
        assert holder_of(storage).session == "b"


def test_who_was_taken_over_knows_it(storage: MemoryStorage) -> None:
    first = RunLock(storage, session="a")
    with first:
        assert not first.lost
        with RunLock(storage, session="b", take_over=True):
            assert first.lost
