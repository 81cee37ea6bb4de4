"""After any exception, at any call that planning, reading, gathering or fetching ahead makes, the next batch is the next one."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import datastore
from datastore.dataset.operations.delete import delete
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import StorageError
from datastore.ingestion.writers.records import record_writer
from datastore.ingestion.writers.tokens import token_writer
from datastore.loader.loader import Loader
from datastore.loader.rows.batch import RowBatch
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.torch import stream

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
"""What is raised between opening a file and keeping it leaves that file to the garbage collector, which closes it."""

PACKAGE = str(Path(datastore.__file__).parent)

GLOBAL_BATCH = 6

LOCKING = {"__enter__", "__exit__", "acquire", "release"}

ERRORS = [KeyboardInterrupt, MemoryError, OSError, RuntimeError]


class Fault:
    """Raises `error` at the `at`-th call, of Python or of C, that the package makes in this thread; counts them all."""

    def __init__(self, at: int, error: type[BaseException]) -> None:
        self.calls = 0
        self._at, self._error = at, error

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and function.__name__ in LOCKING:
            return  # Nothing is ever raised in the place of these.
        if event in {"call", "c_call"} and frame.f_code.co_filename.startswith(PACKAGE):
            self.calls += 1
            if self.calls == self._at:
                sys.setprofile(None)
                raise self._error

    def __enter__(self) -> Self:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


@pytest.fixture(scope="module", params=["files", "memory", "short of memory"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, int]:
    """A dataset with a loss mask and a deleted document, and the memory to read it with."""
    folder = tmp_path_factory.mktemp("faults")
    place = str(folder / "set") if request.param == "files" else f"memory://faults-{folder.name}"
    generator = np.random.default_rng(0)
    for _ in range(3):
        with token_writer(place, vocab_size=300, columns={"loss_mask": "bool"}) as out:
            for length in generator.integers(20, 90, 6):
                out.write(generator.integers(0, 300, length), id=str(length), loss_mask=np.ones(length, np.bool_))
    delete(place, ids=[str(length)])
    largest = int(open_dataset(place).segments.size_bytes.max())
    return open_dataset(place), 2 * largest if request.param == "short of memory" else 2**20


def taker(kind: str, loader: Loader) -> Callable[[], Any]:
    source: Iterator[Any] = stream(loader) if kind == "stream" else loader
    return lambda: next(source)


def contents(batch: Any) -> tuple[Any, ...]:
    return batch.tokens.tolist(), batch.columns["loss_mask"].tolist(), batch.valid.tolist()


def loader_of(dataset: Dataset, memory_bytes: int, rank: Rank, *, threads: int, seed: int = 3) -> Loader:
    options = LoaderSettings(
        lanes=3, window=4, epochs=2, threads=threads, prefetch_batches=2, memory_bytes=memory_bytes, end_of_text=0
    )
    return Loader(dataset, seq_len=9, global_batch=GLOBAL_BATCH, seed=seed, rank=rank, options=options)


def everything(take: Callable[[], Any]) -> list[Any]:
    found = []
    with_stop = True
    while with_stop:
        try:
            found.append(contents(take()))
        except StopIteration:
            with_stop = False
    return found


@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["loader", "stream"]),
    rank=st.sampled_from([Rank(), Rank(1, 2), Rank(2, 3)]),
    threads=st.sampled_from([0, 2]),
    faults=st.lists(st.tuples(st.integers(1, 2_500), st.sampled_from(ERRORS)), min_size=1, max_size=4),
)
def test_whatever_is_raised_wherever_no_batch_is_left_out_and_none_comes_twice(
    source: tuple[Dataset, int], kind: str, rank: Rank, threads: int, faults: list[tuple[int, type[BaseException]]]
) -> None:
    right = everything(taker(kind, loader_of(*source, rank, threads=0)))
    with loader_of(*source, rank, threads=threads) as loader:
        take, taken = taker(kind, loader), list[Any]()
        for at, error in faults:
            with Fault(at, error):
                try:
                    while True:
                        taken.append(take())
                except (error, StopIteration):
                    pass
            # The position counts what was handed out: in the last batch fewer samples than it has rows.
            assert -(-loader.cursor // GLOBAL_BATCH) == len(taken)
        assert [contents(batch) for batch in taken] + everything(take) == right


@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("error", [MemoryError, OSError, StorageError])
def test_whatever_a_read_raises_in_any_thread_no_batch_is_lost(
    source: tuple[Dataset, int], threads: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = everything(taker("loader", loader_of(*source, Rank(), threads=0)))
    storage = LocalStorage if source[0].storage.local_path(source[0].segments.shard(0).path) else MemoryStorage
    good, turn, calls = storage.read_into, threading.Lock(), iter(range(10**9))

    def read_into(self: Any, key: str, start: int, target: Any) -> None:
        with turn:
            number = next(calls)
        if number in {1, 4, 20, 21, 50, 90}:
            raise error("no luck")
        good(self, key, start, target)

    monkeypatch.setattr(storage, "read_into", read_into)
    with loader_of(*source, Rank(), threads=threads) as loader:
        found = []
        for _ in range(500):
            try:
                found.append(contents(next(loader)))
            except StopIteration:
                break
            except error:
                assert -(-loader.cursor // GLOBAL_BATCH) == len(found)
        alive = [thread.name for thread in threading.enumerate() if thread.name == "datastore-prefetch"]
        assert len(alive) == threads
    assert found == right


@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
def test_a_loader_that_can_start_no_thread_reads_by_itself(
    source: tuple[Dataset, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = everything(taker("loader", loader_of(*source, Rank(), threads=0)))

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with loader_of(*source, Rank(), threads=2) as loader:
        assert everything(taker("loader", loader)) == right


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    place = str(tmp_path_factory.mktemp("rows") / "set")
    for part in range(3):
        with record_writer(place, schema=pa.schema([("a", pa.int64()), ("t", pa.string())])) as out:
            out.write([{"a": 20 * part + row, "t": "x" * row} for row in range(20)])
    delete(place, where="a = 7")
    return open_dataset(place)


def rows_of(dataset: Dataset, rank: Rank, *, threads: int) -> RowLoader:
    options = LoaderSettings(lanes=3, window=4, epochs=2, threads=threads, prefetch_batches=2, memory_bytes=2_000)
    return RowLoader(dataset, global_batch=GLOBAL_BATCH, seed=3, rank=rank, options=options)


def rest_of(loader: RowLoader) -> list[Any]:
    return [batch.numbers.tolist() for batch in loader]


# An error that is raised while a generator is closed is heard by nobody.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rank=st.sampled_from([Rank(), Rank(1, 2), Rank(2, 3)]),
    threads=st.sampled_from([0, 2]),
    faults=st.lists(st.tuples(st.integers(1, 2_500), st.sampled_from(ERRORS)), min_size=1, max_size=4),
)
def test_no_batch_of_rows_is_left_out_and_none_comes_twice(
    records: Dataset, rank: Rank, threads: int, faults: list[tuple[int, type[BaseException]]]
) -> None:
    right = rest_of(rows_of(records, rank, threads=0))
    with rows_of(records, rank, threads=threads) as loader:
        taken: list[RowBatch] = []
        for at, error in faults:
            with Fault(at, error):
                try:
                    while True:
                        taken.append(next(loader))
                except (error, StopIteration):
                    pass
            assert -(-loader.cursor // GLOBAL_BATCH) == len(taken)
        assert [batch.numbers.tolist() for batch in taken] + rest_of(loader) == right
