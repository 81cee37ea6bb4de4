"""Requests are repeated while that can help, within their budget, never into a lie, and each is counted."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import ConflictError, MissingError, StorageError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.retry import Requests, RetryPolicy
from datastore.storage.statistics import OperationStatistics, add_statistics, total_statistics
from datastore.storage.wrappers import Subfolder

QUICK = RetryPolicy(tries=5, first_tries=2, first_pause_s=0.0)

PASSING = [ConnectionResetError("reset"), TimeoutError(), StorageError("cut", transient=True)]
LASTING = [PermissionError("no"), FileNotFoundError("k"), StorageError("full"), ValueError("bad")]


class Failing:
    """A call that fails with each of `errors` in turn, and then returns `value`."""

    def __init__(self, *errors: Exception, value: bytes = b"value") -> None:
        self.errors, self.value, self.calls = list(errors), value, 0

    def __call__(self) -> bytes:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.value


def requests(policy: RetryPolicy = QUICK) -> Requests:
    return Requests("s3://bucket", policy=policy)


@given(st.lists(st.sampled_from(PASSING), max_size=QUICK.tries - 1))
def test_what_passes_within_the_budget_is_never_seen(errors: list[Exception]) -> None:
    sender, call = requests(), Failing(*errors)
    assert sender.run("get", "k", call, sized=len) == b"value"
    counted = sender.meter.statistics()["get"]
    assert (counted.requests, counted.retries, counted.bytes) == (len(errors) + 1, len(errors), 5)


@given(st.lists(st.sampled_from(PASSING), max_size=QUICK.tries - 1), st.sampled_from(LASTING))
def test_what_does_not_pass_is_raised_at_once(errors: list[Exception], last: Exception) -> None:
    sender, call = requests(), Failing(*errors, last)
    with pytest.raises((StorageError, MissingError)):
        sender.run("get", "k", call)
    assert call.calls == len(errors) + 1
    assert sender.meter.statistics()["get"].bytes == 0


def test_the_budget_of_a_request_is_a_number_of_tries() -> None:
    call = Failing(*[TimeoutError()] * 50)
    with pytest.raises(StorageError) as caught:
        requests().run("get", "k", call)
    assert caught.value.transient
    assert call.calls == QUICK.tries


def test_no_try_begins_after_the_deadline() -> None:
    call = Failing(*[TimeoutError()] * 50)
    with pytest.raises(StorageError):
        requests(RetryPolicy(tries=50, first_pause_s=0.001, deadline_s=0.0)).run("get", "k", call)
    assert call.calls == 1


def test_a_server_that_never_answered_gets_few_tries_and_one_that_did_gets_all() -> None:
    sender, refused = requests(), ConnectionRefusedError("nobody listens")
    never = Failing(*[refused] * 50)
    with pytest.raises(StorageError):
        sender.run("get", "k", never)
    assert never.calls == QUICK.first_tries
    with pytest.raises(MissingError):
        sender.run("get", "k", Failing(FileNotFoundError("k")))
    down = Failing(*[refused] * 50)
    with pytest.raises(StorageError):
        sender.run("get", "k", down)
    assert down.calls == QUICK.tries


def test_pauses_are_random_below_a_bound_that_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    here, real = threading.current_thread(), threading.Event.wait

    def wait(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is not here:  # Threads that other tests' libraries have left wait, too.
            return real(event, timeout)
        waited.append(timeout or 0.0)
        return False

    monkeypatch.setattr(threading.Event, "wait", wait)
    policy = RetryPolicy(tries=12, first_pause_s=1.0, longest_pause_s=8.0, deadline_s=1000.0)
    runs = [waited]
    for _ in range(200):
        with pytest.raises(StorageError):
            requests(policy).run("get", "k", Failing(*[TimeoutError()] * 12))
        runs.append(waited.copy())
        waited.clear()
    pauses = [run for run in runs if run]
    bounds = [1.0, 2.0, 4.0, *[8.0] * 8]
    for number, bound in enumerate(bounds):
        seen = [run[number] for run in pauses]
        assert max(seen) <= bound
        assert max(seen) > bound * 0.8
        assert min(seen) < bound * 0.2


class Place:
    """One key of a store with put-if-absent, whose answers can be lost before or after it acts."""

    def __init__(self) -> None:
        self.value: bytes | None = None

    def write(self, mine: bytes, fates: list[str]) -> Callable[[], None]:
        def call() -> None:
            fate = fates.pop(0) if fates else "answered"
            if fate == "never arrived":
                raise ConnectionResetError(fate)
            taken, self.value = self.value is not None, self.value or mine
            if fate == "answer lost":
                raise TimeoutError(fate)
            if taken:
                raise FileExistsError

        return call


FATES = st.lists(st.sampled_from(["never arrived", "answer lost", "answered"]), max_size=QUICK.tries - 1)


@given(
    st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c"]), FATES), min_size=1, max_size=4, unique_by=lambda w: w[0])
)
def test_put_new_succeeds_exactly_for_the_writer_whose_bytes_are_stored(writers: list[tuple[bytes, list[str]]]) -> None:
    place, won = Place(), []
    for mine, fates in writers:
        try:
            requests().create(
                "k", place.write(mine, list(fates)), size_bytes=1, is_mine=lambda mine=mine: place.value == mine
            )
        except ConflictError:
            continue
        won.append(mine)
    assert won == [place.value]


def test_a_refusal_that_nothing_made_doubtful_is_a_conflict_without_another_request() -> None:
    place = Place()
    place.value = b"same"

    def never() -> bool:
        raise AssertionError

    with pytest.raises(ConflictError):
        requests().create("k", place.write(b"same", []), size_bytes=4, is_mine=never)


@pytest.fixture(params=["local", "memory", "subfolder"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    local = LocalStorage(tmp_path / "root")
    memory = MemoryStorage(f"statistics-{request.node.name}")
    return {"local": local, "memory": memory, "subfolder": Subfolder(local, "below")}[request.param]


def test_each_kind_of_operation_is_counted_with_its_bytes(storage: Storage) -> None:
    storage.put("k", b"12345")
    storage.put_new("n", b"123", b"456")
    with pytest.raises(ConflictError):
        storage.put_new("n", b"again")
    storage.get("k")
    storage.get_ranges("k", [(0, 2), (1, 5)])
    storage.read_into("k", 1, bytearray(3))
    list(storage.list())
    storage.stat("k")
    storage.delete("k")
    with pytest.raises(MissingError):
        storage.get("k")
    counted = {name: (found.requests, found.bytes, found.retries) for name, found in storage.statistics().items()}
    assert counted == {
        "put": (1, 5, 0),
        "put_new": (2, 6, 0),
        "get": (2, 5, 0),
        "get_ranges": (1, 6, 0),
        "read_into": (1, 3, 0),
        "list": (1, 0, 0),
        "stat": (1, 0, 0),
        "delete": (1, 0, 0),
    }
    total = total_statistics(storage.statistics())
    assert (total.requests, total.bytes) == (10, 25)
    assert total.seconds >= 0


def test_threads_that_count_at_once_lose_nothing() -> None:
    storage = MemoryStorage("counted-by-threads")
    storage.put("k", b"x")
    threads = [threading.Thread(target=lambda: [storage.get("k") for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.statistics()["get"].requests == 4000


def test_what_stands_behind_one_storage_adds_up() -> None:
    one, two = OperationStatistics(requests=1, bytes=2), OperationStatistics(requests=3, retries=1, seconds=0.5)
    both = OperationStatistics(requests=4, bytes=2, retries=1, seconds=0.5)
    assert add_statistics([{"get": one}, {"get": two, "put": one}]) == {"get": both, "put": one}
