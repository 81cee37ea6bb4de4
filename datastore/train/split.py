"""What is trained on and what is held back for validation.

By default the last `holdout` of the token stream, which is what was ingested last, is never trained on. Both parts are
datasets of their own: the same shards, some counted as shorter than they are. The cut is a number of tokens, so it may go
through a shard, and no sample straddles it. The price: the end of the stream is no random choice. Who wants another one
ingests it as a dataset of its own and names that as `data.validation`.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from datastore.errors import ConfigError
from datastore.loader.loader import Loader
from datastore.loader.place import Place
from datastore.store.dataset import Dataset
from datastore.store.segment import SEGMENT_SCHEMA, Segments

__all__ = ["Split", "Stretch", "make_split"]

_VALIDATION_SEED = 0


class Stretch(Dataset):
    """The tokens [start, stop) of a dataset, to read samples from. Only where `start` is 0 do its documents fit its shards."""

    def __init__(self, dataset: Dataset, *, start: int, stop: int) -> None:
        super().__init__(dataset.storage, info=dataset.info, commit=dataset.commit)
        self._whole = dataset
        self._start, self._stop = start, stop

    @cached_property
    @override
    def segments(self) -> Segments:
        return _cut(self._whole.segments, self._start, self._stop)


@dataclass(frozen=True, slots=True)
class Split:
    """What is trained on, and what never is."""

    training: Dataset
    validation: Dataset

    def samples(self, count: int, *, seq_len: int, place: Place) -> tuple[npt.NDArray[Any], int]:
        """Return this rank's part of `count` validation samples [E, seq_len + 1], and how many all ranks have together.

        They are spread over all of it, and the same each time for any number of ranks; a rank may have none.

        Raises:
            ConfigError: not even one sample fits.
        """
        held_out = int(self.validation.segments.tokens.sum())
        count = min(count, max(0, held_out - 1) // seq_len)
        if count < 1:
            raise ConfigError(
                "nothing to validate on",
                held_out_tokens=held_out,
                seq_len=seq_len,
                hint="Raise data.holdout, name a data.validation dataset, or set eval.every = 0.",
            )
        shared = count >= place.world
        loader = Loader(
            self.validation,
            seq_len=seq_len,
            global_batch=count,
            seed=_VALIDATION_SEED,
            place=place if shared else Place(),
        )
        try:
            tokens = next(loader).tokens.copy()
        finally:
            loader.close()
        return (tokens if shared or place.rank == 0 else tokens[:0]), count


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
        tokens = batch.column("tokens").to_numpy()
        starts = begin + np.cumsum(tokens) - tokens
        begin += int(tokens.sum())
        low, high = np.clip(start - starts, 0, tokens), np.clip(stop - starts, 0, tokens)
        inside = high > low
        if inside.any():
            batches.append(_shortened(batch, low, high - low).filter(pa.array(inside)))
    return Segments(batches)


def _shortened(batch: pa.RecordBatch, skipped: npt.NDArray[np.int64], kept: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """Return shards that begin `skipped` tokens later and have `kept` tokens."""
    itemsize = Segments([batch]).itemsize
    moved = {
        "tokens": kept,
        "values_start": batch.column("values_start").to_numpy() + skipped * itemsize,
    }
    columns = [
        pa.array(moved[field.name], field.type) if field.name in moved else batch.column(field.name)
        for field in SEGMENT_SCHEMA
    ]
    return pa.record_batch(columns, schema=SEGMENT_SCHEMA)
