"""One writer at a time where put-if-absent does not hold."""

import threading
import time
import uuid

import pytest
from typing_extensions import Buffer, override

from datastore.dataset.log.identity import create_dataset
from datastore.dataset.log.keys import INFO_KEY, LEASE_KEY
from datastore.dataset.log.lease import WriterLease, single_writer
from datastore.dataset.log.manifest import DatasetInfo
from datastore.dataset.snapshot import open_dataset
from datastore.document import seal, unseal
from datastore.errors import ConflictError
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset


class Careless(MemoryStorage):
    """A gateway that takes the condition of an exclusive write and ignores it."""

    def __init__(self) -> None:
        super().__init__(uuid.uuid4().hex)

    @property
    @override
    def exclusive(self) -> bool:
        return False

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        self.put(key, *chunks)


def test_creating_a_dataset_finds_out_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    storage = Careless()
    assert not create_dataset(storage).exclusive
    assert "one writer at a time" in caplog.text
    assert not unseal(DatasetInfo, storage.get(INFO_KEY), where=INFO_KEY).exclusive


def test_one_writer_after_another_is_fine() -> None:
    storage = Careless()
    make_dataset(storage, [[1, 2]], name="first")
    assert make_dataset(storage, [[3]], name="second").version == 2
    assert len(open_dataset(storage).segments) == 2


def test_a_second_writer_is_refused_while_the_first_is_at_work() -> None:
    storage = Careless()
    make_dataset(storage, [[1, 2]], name="first")
    with single_writer(storage), pytest.raises(ConflictError, match="another writer is at work"):
        make_dataset(storage, [[3]], name="second")
    assert open_dataset(storage).version == 1


def test_the_lease_of_a_writer_that_died_runs_out() -> None:
    storage = Careless()
    storage.put(LEASE_KEY, seal(WriterLease(writer_id="gone", expires=time.time() - 1)))
    with single_writer(storage):
        pass


def test_a_damaged_lease_holds_nobody_back() -> None:
    storage = Careless()
    storage.put(LEASE_KEY, b"{}")
    with single_writer(storage):
        pass


class Together(Careless):
    """Lets no writer go on until all have looked for a lease and seen none."""

    def __init__(self, writers: int) -> None:
        super().__init__()
        self.gate = threading.Barrier(writers)
        self.looked = threading.local()

    @override
    def get(self, key: str) -> bytes:
        try:
            return super().get(key)
        finally:
            if not hasattr(self.looked, "once"):
                self.looked.once = True
                self.gate.wait()


def test_of_writers_that_start_together_at_most_one_goes_on() -> None:
    storage = Together(8)
    entered: list[int] = []

    def work(index: int) -> None:
        try:
            with single_writer(storage):
                entered.append(index)
                time.sleep(0.5)
        except ConflictError:
            return

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 1
