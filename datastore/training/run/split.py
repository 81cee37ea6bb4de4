"""The split of a run's data: what is trained on, and what is held back for validation.

By default the last `holdout` of the token stream, which is what was ingested last, is never trained on. Both parts are
datasets of their own: the same shards, some counted as shorter than they are. The cut is a number of tokens, so it may go
through a shard, and no sample straddles it. The price: the end of the stream is no random choice. Who wants another one
ingests it as a dataset of its own and names that as `data.validation`.

Of several sources each is cut by itself, and each has a validation loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from datastore.dataset.shards.info import ShardLayout
from datastore.dataset.shards.segment_file import SEGMENT_SCHEMA
from datastore.dataset.shards.segments import Segments
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.formats.arrow import array_of, numbers_of
from datastore.loader.loader import Loader
from datastore.loader.mixture.request import Data, Mixture, Stage
from datastore.loader.settings import LoaderSettings, Rank
from datastore.training.settings import DataSettings

if TYPE_CHECKING:
    from datastore.training.objectives.base import Context, HostRows, Objective

__all__ = ["RowCut", "Split", "Stretch", "ValidationSamples", "make_split", "mix_split"]

_VALIDATION_SEED = 0

_DEFAULTS = LoaderSettings()


class Stretch(Dataset):
    """The tokens [start, stop) of a dataset, to read samples from. Only where `start` is 0 do its documents fit its shards."""

    def __init__(self, dataset: Dataset, *, start: int, stop: int) -> None:
        super().__init__(dataset.storage, info=dataset.info, commit=dataset.commit)
        self._whole = dataset
        self._start, self._stop = start, stop

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the dataset and the stretch of it; what a dataset says of itself would be all of it."""
        return _stretch, (self._whole, self._start, self._stop)

    @cached_property
    @override
    def segments(self) -> Segments:
        return _cut(self._whole.segments, self._start, self._stop)

    @cached_property
    @override
    def deleted_spans(self) -> npt.NDArray[np.int64]:
        inside = np.clip(self._whole.deleted_spans, self._start, self._stop) - self._start
        return inside[inside[:, 1] > inside[:, 0]]


def _stretch(dataset: Dataset, start: int, stop: int) -> Stretch:
    return Stretch(dataset, start=start, stop=stop)


@dataclass(frozen=True, slots=True)
class ValidationSamples:
    """What is validated on, and this rank's part of it."""

    mine: npt.NDArray[Any]
    """[E, seq_len + 1]; a rank may have none."""

    count: int
    """Samples of all ranks."""

    loss_mask: npt.NDArray[np.bool_] | None = None
    """[E, seq_len + 1] which of the tokens count; None: all do."""

    source: str = ""
    """The source that they are of; empty, where there is one dataset for all."""

    prepared_rows: "HostRows | None" = None
    """What the objective makes of them, if that is something else."""

    positions: npt.NDArray[np.int64] | None = None
    """[E] the place of each among all."""

    @property
    def rows(self) -> "HostRows":
        """What a model sees."""
        from datastore.training.objectives.base import HostRows  # noqa: PLC0415 - it loads torch

        return self.prepared_rows or HostRows(self.mine, self.loss_mask)

    def prepared(self, objective: "Objective", context: "Context") -> "ValidationSamples":
        """Return these samples as `objective` learns from them."""
        share = _Share(
            self.mine, self.loss_mask, np.arange(len(self.mine)) if self.positions is None else self.positions
        )
        return replace(self, prepared_rows=objective.prepare(share, context))

    @staticmethod
    def of(rows: "HostRows", count: int) -> "ValidationSamples":
        """Return `rows` that an objective has prepared already."""
        return ValidationSamples(rows.tokens, count, rows.loss_mask, prepared_rows=rows)


@dataclass(frozen=True, slots=True)
class _Share:
    tokens: npt.NDArray[Any]
    loss_mask: npt.NDArray[np.bool_] | None
    positions: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowCut:
    """Which rows of a dataset of records are trained on: the first `kept`."""

    kept: int
    held_out: npt.NDArray[np.int64]
    """Numbers of the rows to validate on, in the dataset that is for that."""


@dataclass(frozen=True, slots=True)
class Split:
    """What is trained on, and what never is."""

    training: Data
    validation: Mapping[str, Dataset]
    """By the source that it is held back from; empty, where there is one dataset for all."""

    rows: RowCut | None = None
    """Where the dataset holds records; None: it holds tokens."""

    @property
    def datasets(self) -> Sequence[Dataset]:
        """What is trained on, one dataset after the other."""
        sources = [self.training] if isinstance(self.training, Dataset) else self.training.sources.values()
        return [source for source in sources if isinstance(source, Dataset)]

    def samples(
        self, count: int, *, seq_len: int, rank: Rank, options: LoaderSettings = _DEFAULTS
    ) -> list[ValidationSamples]:
        """Return this rank's part of `count` validation samples of each source.

        They are spread over all of it, and the same each time for any number of ranks; a rank may have none. Deleted
        documents are what `options` say.

        Raises:
            ConfigError: not even one sample of a source fits.
        """
        return [
            _samples_of(name, dataset, count, seq_len=seq_len, rank=rank, options=options)
            for name, dataset in self.validation.items()
        ]


def _samples_of(
    name: str, dataset: Dataset, count: int, *, seq_len: int, rank: Rank, options: LoaderSettings
) -> ValidationSamples:
    held_out = int(dataset.segments.tokens.sum())
    if options.deletions == "compact":
        held_out -= int(np.diff(dataset.deleted_spans).sum())
    count = min(count, max(0, held_out - 1) // seq_len)
    if count < 1:
        raise ConfigError(
            "nothing to validate on",
            **({"source": name} if name else {}),
            held_out_tokens=held_out,
            seq_len=seq_len,
            hint="Raise data.holdout, name a dataset (data.validation, or `--data` to `evaluate`), or train with eval.every = 0.",
        )
    shared = count >= rank.world
    loader = Loader(
        dataset,
        seq_len=seq_len,
        global_batch=count,
        seed=_VALIDATION_SEED,
        rank=rank if shared else Rank(),
        options=LoaderSettings(
            deletions=options.deletions,
            end_of_text=options.end_of_text,
            cache_dir=options.cache_dir,
            cache_bytes=options.cache_bytes,
            timeout_s=options.timeout_s,
        ),
    )
    with loader:
        batch = next(loader)
    rows = len(batch.tokens) if shared or rank.rank == 0 else 0
    mask = batch.loss_mask
    mine, positions = batch.tokens[:rows], batch.positions[:rows]
    return ValidationSamples(mine, count, mask if mask is None else mask[:rows], name, positions=positions)


def make_split(dataset: Dataset, *, holdout: float, validation: Dataset | None) -> Split:
    """Return how `dataset` is used for training, and what for validation: the end of it, or another dataset.

    Raises:
        ConfigError: the datasets are the same, or made with different tokenizers.
    """
    if dataset.kind == "records":
        return _cut_rows(dataset, holdout=holdout, validation=validation)
    if validation is None:
        kept, held_back = _parts(dataset, holdout=holdout)
        return Split(kept, {"": held_back})
    _check_other(validation, dataset)
    return Split(dataset, {"": validation})


def _cut_rows(dataset: Dataset, *, holdout: float, validation: Dataset | None) -> Split:
    total = int(dataset.segments.documents.sum())
    if validation is not None:
        _check_other(validation, dataset)
        held_out = np.arange(int(validation.segments.documents.sum()))
        return Split(dataset, {"": validation}, RowCut(total, held_out))
    kept = total - int(total * holdout)
    return Split(dataset, {"": dataset}, RowCut(kept, np.arange(kept, total)))


def mix_split(datasets: Mapping[str, Dataset], *, data: DataSettings, validation: Dataset | None) -> Split:
    """Return the same for several datasets, which are mixed as `data` says: of each its end, or another dataset for all.

    Raises:
        ConfigError: as `make_split`, and as `Mixture`.
    """
    records = sorted(name for name, dataset in datasets.items() if dataset.kind == "records")
    if records:
        raise ConfigError(
            "a mixture of records cannot be trained on",
            sources=records,
            hint="Name one dataset of records as data.url.",
        )
    training, held_back = dict(datasets), {} if validation is None else {"": validation}
    for name, dataset in datasets.items():
        if validation is None:
            training[name], held_back[name] = _parts(dataset, holdout=data.holdout)
        else:
            _check_other(validation, dataset)
    if datasets.keys() != data.sources.keys():  # Of an earlier session: the weights of that time are in its state.
        return Split(Mixture(training), held_back)
    mixture = Mixture(
        training,
        {name: one.weight for name, one in data.sources.items() if one.weight is not None} or None,
        temperature=data.temperature,
        epochs={name: one.epochs for name, one in data.sources.items() if one.epochs is not None},
        stages=[Stage(stage.start, stage.weights) for stage in data.stages],
    )
    return Split(mixture, held_back)


def _parts(dataset: Dataset, *, holdout: float) -> tuple[Stretch, Stretch]:
    total = int(dataset.segments.tokens.sum())
    kept = total - int(total * holdout)
    return Stretch(dataset, start=0, stop=kept), Stretch(dataset, start=kept, stop=total)


def _check_other(validation: Dataset, dataset: Dataset) -> None:
    if validation.uuid == dataset.uuid:
        raise ConfigError(
            "the validation dataset is the training dataset",
            url=dataset.url,
            hint="Name another one, or use data.holdout.",
        )
    if validation.commit.tokenizer != dataset.commit.tokenizer:
        raise ConfigError(
            "the validation dataset was made with another tokenizer",
            url=validation.url,
            hint="Ingest it with the tokenizer of the training dataset.",
        )


def _cut(segments: Segments, start: int, stop: int) -> Segments:
    """Return the shards that hold tokens [start, stop), first and last counted as shorter than they are."""
    batches, begin = [], 0
    for batch in segments.batches:
        tokens = numbers_of(batch.column("tokens"))
        starts = begin + np.cumsum(tokens) - tokens
        begin += int(tokens.sum())
        low, high = np.clip(start - starts, 0, tokens), np.clip(stop - starts, 0, tokens)
        inside = high > low
        if inside.any():
            batches.append(_shortened(batch, low, high - low).filter(array_of(inside)))
    return Segments(batches)


def _shortened(batch: pa.RecordBatch, skipped: npt.NDArray[np.int64], kept: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """Return shards that begin `skipped` tokens later and have `kept` tokens."""
    itemsize = Segments([batch]).itemsize
    moved = {
        "tokens": array_of(kept),
        "values_start": array_of(numbers_of(batch.column("values_start")) + skipped * itemsize),
        "layout": _moved_layouts(batch, skipped),
    }
    columns = [moved.get(field.name, batch.column(field.name)) for field in SEGMENT_SCHEMA]
    return pa.record_batch(columns, schema=SEGMENT_SCHEMA)


def _moved_layouts(batch: pa.RecordBatch, skipped: npt.NDArray[np.int64]) -> "pa.Array[Any]":
    """Return the layouts of shards that begin `skipped` tokens later: so do the columns beside their tokens."""
    layouts: list[Any] = batch.column("layout").to_pylist()
    for shard in np.flatnonzero(skipped).tolist():
        if layouts[shard]:
            layout = msgspec.json.decode(layouts[shard], type=ShardLayout)
            moved = tuple(
                msgspec.structs.replace(
                    column,
                    values_start=column.values_start
                    + int(skipped[shard]) * column.width * np.dtype(column.dtype).itemsize,
                )
                for column in layout.columns
            )
            layouts[shard] = msgspec.json.encode(msgspec.structs.replace(layout, columns=moved))
    found: pa.Array[Any] = array_of(layouts, SEGMENT_SCHEMA.field("layout").type)
    return found
