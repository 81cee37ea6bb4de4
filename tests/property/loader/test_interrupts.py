"""After any exception, wherever it was raised, the next call gives the very next batch."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import datastore
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.loader.loader import Loader
from datastore.loader.settings import LoaderSettings
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset
from datastore.torch import stream

PACKAGE = str(Path(datastore.__file__).parent / "loader")
BATCHES = 6


class InterruptError(BaseException):
    pass


class Once:
    """Raises at the `at`-th line that is run in the loader, in this thread."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and frame.f_code.co_filename.startswith(PACKAGE):
            self.left -= 1
            if not self.left:
                sys.settrace(None)
                raise InterruptError
        return self


@pytest.fixture(params=["mapped", "cached"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> Dataset:
    lengths = [[40, 70, 90]] * 4
    if request.param == "mapped":
        make_dataset(tmp_path / "set", lengths)
        return open_dataset(tmp_path / "set")
    storage = MemoryStorage(f"interrupts-{tmp_path.name}")
    make_dataset(storage, lengths)
    return open_dataset(storage)


def loaders(dataset: Dataset) -> Loader:
    options = LoaderSettings(lanes=4, window=8, threads=0, prefetch_batches=2)
    return Loader(dataset, seq_len=8, global_batch=4, seed=3, options=options)


def interrupted(take: Callable[[], Any], at: int) -> int:
    """Return how many of `BATCHES` came before something was raised at line `at`."""
    taken = 0
    sys.settrace(Once(at))
    try:
        while taken < BATCHES:
            take()
            taken += 1
    except InterruptError:
        pass
    finally:
        sys.settrace(None)
    return taken


def places() -> Iterator[int]:
    yield from range(1, 60)
    yield from range(60, 2500, 37)


def test_the_next_batch_of_a_loader_is_the_next_one(dataset: Dataset) -> None:
    whole = loaders(dataset)
    right = [next(whole).tokens.tolist() for _ in range(BATCHES + 2)]
    for at in places():
        loader = loaders(dataset)
        taken = interrupted(lambda: next(loader), at)  # noqa: B023 - called right here
        # The line that hands out a batch may be the one that raises: then the cursor says whether it counts.
        assert loader.cursor // 4 in {taken, min(taken + 1, BATCHES)}
        assert next(loader).tokens.tolist() == right[loader.cursor // 4 - 1]


def test_the_next_batch_of_tensors_is_the_next_one(dataset: Dataset) -> None:
    right = [batch.tokens.tolist() for batch, _ in zip(stream(loaders(dataset)), range(BATCHES + 1), strict=False)]
    for at in places():
        batches = stream(loaders(dataset))
        taken = interrupted(lambda: next(batches), at)  # noqa: B023 - called right here
        assert next(batches).tokens.tolist() == right[taken]


def test_a_batch_that_does_not_get_to_the_device_is_the_next_one_still(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = stream(loaders(dataset))
    right = next(stream(loaders(dataset))).tokens.tolist()
    with monkeypatch.context() as patch:
        patch.setattr("datastore.torch.batches.TensorBatch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(batches)
    assert next(batches).tokens.tolist() == right
