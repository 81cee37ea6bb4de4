"""Datasets for torch's DataLoader, and for the frameworks that are built around it.

`TokenDataset` hands out whole batches, which the loader has divided among processes; `SampleDataset` has the same samples in the same
order by number, for whoever makes batches itself. Both go on exactly where they were.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import override

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.loader.loader import Loader
from datastore.loader.lookup import SampleReader
from datastore.loader.settings import LOSS_MASK, LoaderSettings
from datastore.torch.batches import TensorBatch, TensorStream, stream

__all__ = ["IGNORED", "SampleDataset", "TokenDataset"]

IGNORED = -100
"""The label of a token that is not to be learned: what `torch.nn.functional.cross_entropy` ignores if it is told nothing else."""

_NO_WORKERS = "Set num_workers=0: the loader fetches ahead with threads of its own."


class TokenDataset(IterableDataset[TensorBatch]):
    """A loader as a dataset for `torch.utils.data.DataLoader(dataset, batch_size=None)`.

    Its items are whole batches, as `stream` gives them, on the CPU. An iteration ends where the loader does; that of an
    endless one after a pass, each of `Loader.batches_per_epoch` batches, and the next goes on from there. A state loaded
    in the middle of a pass leaves the rest of it. Its length is that of a whole iteration: a framework that does not know it
    takes a batch ahead to see whether there is one, and then what is saved is a batch ahead of the training.

    Raises:
        ConfigError: when sent to a worker process or iterated in one. There is nothing to gain from one, and each would
            read all.
    """

    def __init__(self, loader: Loader) -> None:
        super().__init__()
        self.loader = loader

    def __len__(self) -> int:
        return self.loader.batches_per_epoch if self.loader.batches is None else self.loader.batches

    @override
    def __reduce__(self) -> NoReturn:
        raise ConfigError("a loader cannot be sent to another process", hint=_NO_WORKERS)

    @override
    def __iter__(self) -> Iterator[TensorBatch]:
        worker = get_worker_info()
        if worker is not None:
            raise ConfigError(
                "a loader cannot be iterated in worker processes",
                num_workers=worker.num_workers,
                hint=_NO_WORKERS,
            )
        batches = stream(self.loader)
        if self.loader.batches is not None:
            return batches
        taken = self.loader.cursor // self.loader.global_batch % len(self)
        return _Pass(batches, len(self) - taken)

    def state_dict(self, *_counted: object) -> dict[str, Any]:
        """Return `Loader.state_dict`: without workers a `DataLoader` takes a batch only to hand it out.

        Composer passes how many samples of the epoch its loop has counted, and that they count from the epoch's start; the loader
        knows better.
        """
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ResumeError: as `Loader.load_state_dict`.
        """
        self.loader.load_state_dict(state)


class _Pass(Iterator[TensorBatch]):
    """The next `left` batches of `batches`: what a call raises, it may raise again, and nothing is left out."""

    def __init__(self, batches: TensorStream, left: int) -> None:
        self._batches = batches
        self._left = left

    @override
    def __next__(self) -> TensorBatch:
        if not self._left:
            raise StopIteration
        batch = next(self._batches)
        self._left -= 1
        return batch


class SampleDataset(MapDataset[dict[str, Tensor]]):
    """The samples of a dataset by number, in the order of a loader, for what brings its own sampler, batches and workers.

    Number i is the sample at position i of the order, which is shuffled already: take them one after the other
    (`shuffle=False`), with any batch size, number of processes and workers, and every step sees the samples that the steps of a
    `Loader` of that global batch see. To resume is to go on with the next number, which costs nothing.

    An item is {"input_ids": [seq_len + 1] int64, "labels": the same, and -100 where nothing is to be learned}, as causal language
    models of Hugging Face take them (they compare each token with the label that follows), and `LoaderSettings.columns`
    by their names. `len` is that of `LoaderSettings.epochs`, or of one. Where it is one, `set_epoch(e)` makes it epoch e;
    frameworks call it, and it reaches workers that are running.

    Raises:
        ConfigError: as `Loader`.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seq_len: int,
        seed: int = 0,
        options: LoaderSettings = LoaderSettings(),  # noqa: B008 - a frozen value
    ) -> None:
        self._reader = SampleReader(dataset, seq_len=seq_len, seed=seed, options=options)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return self._reader.samples_per_epoch * (self._reader.options.epochs or 1)

    @override
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several items at once, as torch's DataLoader asks for a batch: one read, in one piece of memory.

        Raises:
            IndexError: an index is not in the dataset.
            CorruptError, StorageError: as `SampleReader.read`.
        """
        size = len(self)
        for index in indices:
            if not -size <= index < size:
                raise IndexError(f"index {index} of a dataset of {size} samples")
        first = int(self._epoch) * self._reader.samples_per_epoch
        batch = self._reader.read([first + index % size for index in indices])
        tokens = torch.from_numpy(batch.tokens.astype(np.int64))
        mask = batch.loss_mask
        labels = tokens if mask is None else torch.where(torch.from_numpy(mask), tokens, IGNORED)
        named = {"input_ids": tokens, "labels": labels}
        named |= {name: torch.from_numpy(values) for name, values in batch.columns.items() if name != LOSS_MASK}
        return [{name: values[row] for name, values in named.items()} for row in range(len(indices))]

    def set_epoch(self, epoch: int) -> None:
        """Make this epoch `epoch` of the order, here and in worker processes; nothing, if its length is several epochs.

        Raises:
            ConfigError: `epoch` is negative.
        """
        if epoch < 0:
            raise ConfigError("an epoch is negative", epoch=epoch, hint="Epochs count from 0.")
        if self._reader.options.epochs is None:
            self._epoch.fill_(epoch)
