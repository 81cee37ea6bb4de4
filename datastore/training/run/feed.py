"""The feed of a run: what the trainer asks of a loader, whether the dataset holds tokens or records.

Both kinds have the same order, cursor and state, so a run on records resumes, and is proven, as one on tokens. Their record
has the same fingerprints: of which rows, at which positions, with which contents, here as the objective has encoded them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.loader.loader import Loader
from datastore.loader.mixture.request import Mixture
from datastore.loader.order.mix import mix64
from datastore.loader.rows.batch import RowBatch, Rows
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.training.objectives.base import Context, HostRows, Objective, Share
from datastore.training.objectives.records import RecordObjective
from datastore.training.run.data import ChangeableLoader
from datastore.training.run.split import Split, ValidationSamples
from datastore.training.settings import Settings

__all__ = ["AnyFeed", "FedBatch", "RecordBatch", "RecordFeed", "calibration_rows", "held_out", "open_feed", "saved"]

I64 = npt.NDArray[np.int64]

_CALIBRATION_SEED = 1
"""Of the order in which the rows for calibration are drawn, whatever the seed of the run."""


class FedBatch(Share, Protocol):
    """One rank's part of a global batch, as the trainer sees it."""

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """[B] whether a row holds a sample."""
        ...

    @property
    def cursor(self) -> int:
        """Samples that all ranks had been given before it."""
        ...

    def fingerprint(self) -> int:
        """Return 64 bits that name what is here and where."""
        ...


@dataclass(frozen=True, slots=True)
class RecordBatch:
    """Records as their objective has encoded them."""

    rows: HostRows
    positions: I64
    numbers: I64
    cursor: int

    @property
    def tokens(self) -> npt.NDArray[Any]:
        """The ids of each row."""
        return self.rows.tokens

    @property
    def loss_mask(self) -> npt.NDArray[np.bool_] | None:
        """Which of them are to be learned."""
        return self.rows.loss_mask

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """All of them: a row that is not there is left out."""
        return np.ones(len(self.positions), np.bool_)

    def fingerprint(self) -> int:
        """Return the sum, mod 2^64, of a hash of (position, number, arrays) of each row."""
        arrays = [self.rows.tokens, self.rows.loss_mask, *(self.rows.more[name] for name in sorted(self.rows.more))]
        there = [one for one in arrays if one is not None]
        contents = [_hash_of([one[row] for one in there]) for row in range(len(self.positions))]
        places = mix64(mix64(self.positions.astype(np.uint64)) ^ self.numbers.astype(np.uint64))
        return int(mix64(places ^ np.array(contents, np.uint64)).sum(dtype=np.uint64))


def _hash_of(arrays: list[Any]) -> int:
    state = xxhash.xxh3_64()
    for one in arrays:
        state.update(np.ascontiguousarray(one).data)
    return state.intdigest()


class RecordFeed(Iterator[RecordBatch]):
    """A loader of rows whose batches are encoded by an objective."""

    def __init__(self, loader: RowLoader, dataset: Dataset, objective: RecordObjective, context: Context) -> None:
        self.loader = loader
        self.storage = dataset.storage
        self.rows_per_epoch = loader.rows_per_epoch
        self._blank = objective.blank(0, context)

    def __next__(self) -> RecordBatch:
        """Return the next batch."""
        return _encoded(next(self.loader), self._blank)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def end(self) -> int | None:
        """None: it does not end."""
        return None

    @property
    def cursor(self) -> int:
        """Rows delivered so far, over all ranks."""
        return self.loader.cursor

    def stats(self) -> dict[str, Any]:
        """Return counts since the start."""
        return self.loader.stats()

    def state_dict(self) -> dict[str, Any]:
        """Return where it stands."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.loader.load_state_dict(state)

    def close(self) -> None:
        """End its threads."""
        self.loader.close()


AnyFeed = Loader | RecordFeed
"""What a run is fed with."""


def _encoded(batch: RowBatch, blank: HostRows) -> RecordBatch:
    """Return what the objective made of each row of `batch`, stacked; `blank` says what there is if there is no row."""
    found: dict[str, npt.NDArray[Any]] = {}
    if batch.data:
        found = {name: np.stack([np.asarray(row[name]) for row in batch.data]) for name in batch.data[0]}
    rows = (
        HostRows(found.pop("tokens"), found.pop("loss_mask", None), found.pop("counts", None), found)
        if found
        else blank
    )
    return RecordBatch(rows, batch.positions, batch.numbers, batch.cursor)


def open_feed(split: Split, settings: Settings, objective: Objective, context: Context, *, rank: Rank) -> AnyFeed:
    """Return what `rank` of a run is fed with.

    Raises:
        ConfigError: the dataset does not hold what the objective reads.
    """
    data = settings.data
    if split.rows is None:
        _check(objective, "tokens", split)
        return Loader(
            split.training,
            seq_len=data.seq_len,
            global_batch=data.global_batch,
            seed=data.seed,
            rank=rank,
            options=settings.loader,
        )
    _check(objective, "records", split)
    rows = np.arange(split.rows.kept)
    return _records(split.datasets[0], rows, (settings, objective, context), rank=rank, global_batch=data.global_batch)


def _records(
    dataset: Dataset,
    numbers: I64,
    of: tuple[Settings, Objective, Context],
    *,
    rank: Rank,
    global_batch: int,
    options: LoaderSettings | None = None,
) -> RecordFeed:
    settings, objective, context = of
    assert isinstance(objective, RecordObjective)
    loader = RowLoader(
        dataset,
        global_batch=global_batch,
        seed=settings.data.seed,
        rank=rank,
        rows=Rows(numbers=numbers, transform=partial(_encode, objective, context)),
        options=options or _with_columns(settings.loader, objective),
    )
    return RecordFeed(loader, dataset, objective, context)


def _encode(objective: RecordObjective, context: Context, row: dict[str, Any], _random: Any) -> Any:
    return objective.encode(row, context)


def _with_columns(options: LoaderSettings, objective: RecordObjective, **changes: Any) -> LoaderSettings:

    return msgspec.structs.replace(options, columns=tuple(dict.fromkeys(objective.columns)), **changes)


def _check(objective: Objective, kind: str, split: Split) -> None:
    if objective.reads != kind:
        raise ConfigError(
            f"the objective learns from {objective.reads}, and the dataset holds {kind}",
            objective=type(objective).__name__,
            url=split.datasets[0].url,
            hint="Name another objective.use, or another dataset.",
        )


def saved(feed: AnyFeed) -> Any:
    """Return `feed` as an item of a checkpoint."""
    return ChangeableLoader(feed) if isinstance(feed, Loader) and isinstance(feed.dataset, Mixture) else feed


def held_out(
    split: Split, settings: Settings, objective: Objective, context: Context, *, count: int, rank: Rank
) -> list[ValidationSamples]:
    """Return `rank`'s part of `count` samples of each source that are never trained on, as the objective prepares them.

    Raises:
        ConfigError: there is none.
    """
    if split.rows is None:
        _check(objective, "tokens", split)
        found = split.samples(count, seq_len=settings.data.seq_len, rank=rank, options=settings.loader)
        return [one.prepared(objective, context) for one in found]
    _check(objective, "records", split)
    dataset, numbers = split.validation[""], split.rows.held_out
    count = min(count, len(numbers))
    if count < 1:
        raise ConfigError(
            "nothing to validate on",
            held_out_rows=0,
            hint="Raise data.holdout, name a dataset (data.validation, or `--data` to `evaluate`), or train with eval.every = 0.",
        )
    assert isinstance(objective, RecordObjective)
    shared = count >= rank.world
    options = _with_columns(LoaderSettings(deletions=settings.loader.deletions), objective)
    with _records(
        dataset,
        numbers,
        (settings, objective, context),
        rank=rank if shared else Rank(),
        global_batch=count,
        options=options,
    ) as feed:
        batch = next(feed)
    rows = batch.rows if shared or rank.rank == 0 else objective.blank(0, context)
    return [ValidationSamples.of(rows, count)]


def calibration_rows(
    split: Split, settings: Settings, objective: Objective, context: Context, *, count: int
) -> HostRows:
    """Return `count` rows of the training data, the same on every rank and after every resume.

    Raises:
        ConfigError: there are fewer.
    """
    if split.rows is not None:
        _require_rows(split.rows.kept, count)
        assert isinstance(objective, RecordObjective)
        with _records(
            split.datasets[0],
            np.arange(split.rows.kept),
            (settings, objective, context),
            rank=Rank(),
            global_batch=count,
            options=_with_columns(LoaderSettings(deletions=settings.loader.deletions), objective),
        ) as feed:
            return next(feed).rows
    options = msgspec.structs.replace(settings.loader, prefetch_batches=0)
    with Loader(
        split.training, seq_len=settings.data.seq_len, global_batch=count, seed=_CALIBRATION_SEED, options=options
    ) as loader:
        _require_rows(loader.samples_per_epoch, count)
        return objective.prepare(next(loader), context)


def _require_rows(there: int, count: int) -> None:
    if there < count:
        raise ConfigError(
            "the calibration set is shorter than asked",
            asked=count,
            there_are=there,
            hint="Lower the samples of the hook, or train on more data.",
        )
