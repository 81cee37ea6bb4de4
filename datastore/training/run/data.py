"""The data of a run: which version of which dataset, what is trained on and what is held back for validation.

By default the last `holdout` of the token stream, which is what was ingested last, is never trained on. Both parts are
datasets of their own: the same shards, some counted as shorter than they are. The cut is a number of tokens, so it may go
through a shard, and no sample straddles it. The price: the end of the stream is no random choice. Who wants another one
ingests it as a dataset of its own and names that as `data.validation`.

Documents may be deleted while a run goes on. It is bound to the shards it began with. When it goes on, it reads the newest version that still begins with them, and
what has been deleted in it is masked: every sample stays at its step, so nothing else changes. Each session records what it
read, so that what it consumed can be computed again. If `data.url` names a version, that one is read: what a resume names is
honoured if it has the run's shards, and refused if not. A run stays with the version it began with if deleted documents are
left out (`loader.deletions = "compact"`), which moves every sample after them.

The price: two runs of the same settings differ if documents were deleted in between, and one that was interrupted then
differs from one that was not. That is what a delete asks for.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from datastore.dataset.shards.info import ShardLayout
from datastore.dataset.shards.segment_file import SEGMENT_SCHEMA
from datastore.dataset.shards.segments import Segments
from datastore.dataset.snapshot import Dataset, open_dataset, split_reference
from datastore.document import Document
from datastore.errors import ConfigError, MissingError, ResumeError
from datastore.formats.arrow import array_of, numbers_of
from datastore.loader.loader import Loader
from datastore.loader.settings import DeletionMode, LoaderSettings, Rank
from datastore.loader.state import shards_fingerprint

__all__ = [
    "DatasetRef",
    "Split",
    "Stretch",
    "ValidationSamples",
    "Versions",
    "make_split",
    "open_at",
    "ref_of",
    "version_to_read",
]

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


@dataclass(frozen=True, slots=True)
class Split:
    """What is trained on, and what never is."""

    training: Dataset
    validation: Dataset

    def samples(
        self, count: int, *, seq_len: int, rank: Rank, options: LoaderSettings = _DEFAULTS
    ) -> ValidationSamples:
        """Return this rank's part of `count` validation samples.

        They are spread over all of it, and the same each time for any number of ranks; a rank may have none. Deleted
        documents are what `options` say.

        Raises:
            ConfigError: not even one sample fits.
        """
        held_out = int(self.validation.segments.tokens.sum())
        if options.deletions == "compact":
            held_out -= int(np.diff(self.validation.deleted_spans).sum())
        count = min(count, max(0, held_out - 1) // seq_len)
        if count < 1:
            raise ConfigError(
                "nothing to validate on",
                held_out_tokens=held_out,
                seq_len=seq_len,
                hint="Raise data.holdout, name a data.validation dataset, or set eval.every = 0.",
            )
        shared = count >= rank.world
        loader = Loader(
            self.validation,
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
        return ValidationSamples(batch.tokens[:rows], count, mask if mask is None else mask[:rows])


def make_split(dataset: Dataset, *, holdout: float, validation: Dataset | None) -> Split:
    """Return how `dataset` is used for training, and what for validation: the end of it, or another dataset.

    Raises:
        ConfigError: the datasets are the same, or made with different tokenizers.
    """
    if validation is None:
        total = int(dataset.segments.tokens.sum())
        kept = total - int(total * holdout)
        return Split(Stretch(dataset, start=0, stop=kept), Stretch(dataset, start=kept, stop=total))
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
    return Split(dataset, validation)


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


class DatasetRef(Document, frozen=True, kw_only=True):
    """A dataset at one version."""

    uuid: str
    version: int
    shards: int = 0
    """How many it has; 0 if that was not noted yet."""

    fingerprint: str = ""
    """Names them."""


class Versions(Document, frozen=True, kw_only=True):
    """What a session reads."""

    training: int
    validation: int = 0
    """0: there is no other dataset for it."""


def ref_of(dataset: Dataset) -> DatasetRef:
    """Return what binds a run to `dataset`."""
    shards = len(dataset.segments)
    fingerprint = shards_fingerprint(dataset.segments, shards=shards)
    return DatasetRef(uuid=dataset.uuid, version=dataset.version, shards=shards, fingerprint=fingerprint)


def version_to_read(url: str, ref: DatasetRef, *, deletions: DeletionMode) -> int:
    """Return the version that `url` names; if it names none, the newest that differs from `ref` by no more than deletions.

    That one may have later shards too; if there is none, it is `ref`'s own.

    Raises:
        MissingError: there is no dataset, or no such version or tag, any more.
        ResumeError: the named version cannot be that of the run.
    """
    base, name = split_reference(url)
    if name:
        return _named(url, ref, deletions=deletions)
    newest = open_dataset(base)
    if deletions == "compact" or not ref.shards or newest.uuid != ref.uuid:
        return ref.version
    own = _readable(base, ref.version)
    found, beyond = own or newest, newest.version
    if _begins_with(newest, ref):
        found = newest
    else:
        # The versions that begin with the run's shards follow each other: the last one before the shards were replaced.
        low = ref.version
        while beyond - low > 1:
            middle = (low + beyond) // 2
            one = _readable(base, middle)
            if one is not None and not _begins_with(one, ref):
                beyond = middle
            else:
                low, found = middle, one or found
        if not _begins_with(found, ref):
            return ref.version
    unchanged = own is not None and own.commit.deletions == found.commit.deletions
    return ref.version if unchanged else found.version


def _named(url: str, ref: DatasetRef, *, deletions: DeletionMode) -> int:
    dataset = open_dataset(url)
    other = dataset.uuid == ref.uuid and dataset.version != ref.version
    if other and (deletions == "compact" or not ref.shards):
        raise ResumeError(
            "the run cannot change to another version of its dataset",
            url=dataset.url,
            version=dataset.version,
            deletions=deletions,
            hint=f"Use version {ref.version}, or start a new run.",
        )
    return dataset.version  # `open_at` looks whether it has the shards of the run.


def open_at(url: str, ref: DatasetRef, *, version: int) -> Dataset:
    """Return the shards of `ref` as they are in `version`.

    Raises:
        MissingError: that version is not there any more.
        ResumeError: another dataset lies at the URL, or that version has other shards.
    """
    dataset = open_dataset(split_reference(url)[0], version=version)
    if dataset.uuid != ref.uuid:
        raise ResumeError(
            "another dataset lies at this URL",
            url=dataset.url,
            expected_uuid=ref.uuid,
            found_uuid=dataset.uuid,
            hint="Put the dataset of the run back, or set data.url to where it lies now.",
        )
    if not ref.shards or version == ref.version:
        return dataset
    if not _begins_with(dataset, ref):
        raise ResumeError(
            "the version does not have the shards of the run",
            url=dataset.url,
            version=version,
            hint=f"Use version {ref.version}, or start a new run.",
        )
    if len(dataset.segments) == ref.shards:
        return dataset
    return Stretch(dataset, start=0, stop=int(dataset.segments.tokens[: ref.shards].sum()))


def _begins_with(dataset: Dataset, ref: DatasetRef) -> bool:
    segments = dataset.segments
    return len(segments) >= ref.shards and shards_fingerprint(segments, shards=ref.shards) == ref.fingerprint


def _readable(url: str, version: int) -> Dataset | None:
    try:
        return open_dataset(url, version=version)
    except MissingError:
        return None
