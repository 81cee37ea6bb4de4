"""Batches as tensors: narrow token ids in reusable host buffers, widened where the model is.

`stream` is the way for a loop of one's own; `TokenDataset` lets a `DataLoader` do the iterating. Both hand out tensors
with memory of their own, both count only what they have delivered, and both save and load as the loader does.
`SampleDataset` has the same samples in the same order by number, for frameworks that make batches themselves.

Decision: no worker processes. Handing a batch from one process to another takes 40 us a sample, gathering it 1 us; the
loader's own threads fetch ahead. On CUDA the copy to the device runs from pinned memory beside the computation, at
two bytes a token, and a buffer is not filled again before its copy has ended. Loss masks, and other columns that the
loader reads, go the same way.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import IterableDataset, get_worker_info
from typing_extensions import override

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.loader.batch import Batch
from datastore.loader.gather import AnyArray, TokenArray
from datastore.loader.loader import Loader
from datastore.loader.lookup import SampleReader
from datastore.loader.settings import LOSS_MASK, LoaderSettings, Rank

__all__ = [
    "IGNORED",
    "MODEL_DIMENSIONS",
    "SampleDataset",
    "TensorBatch",
    "TensorStream",
    "TokenDataset",
    "rank_of",
    "stream",
]

BUFFERS = 3
"""Host buffers per stream: one being filled, one being copied, one that the caller may still look at."""

_NO_WORKERS = "Set num_workers=0: the loader fetches ahead with threads of its own."

IGNORED = -100
"""The label of a token that is not to be learned: what `torch.nn.functional.cross_entropy` ignores if it is told nothing else."""

MODEL_DIMENSIONS = frozenset({"tp", "pp", "cp", "sp"})
"""Mesh dimensions whose ranks read the same data; every other dimension divides it."""


@dataclass(frozen=True, slots=True, eq=False)
class TensorBatch:
    """A `Batch` whose tokens are on a device."""

    tokens: Tensor
    """[B, seq_len + 1] int64 on the device, in memory of its own."""

    valid: Tensor
    """[B] bool on the device: whether a row holds a sample; all do, except at the end of a finite pass."""

    columns: Mapping[str, Tensor]
    """What the loader reads beside the tokens, [B, seq_len + 1] or [B, seq_len + 1, width] each, on the device."""

    host: Batch
    """Where it comes from. Its arrays lie in a reusable buffer: right until two more batches have been taken."""

    def to(self, device: str | torch.device, *, non_blocking: bool = False) -> "TensorBatch":
        """Return this batch with its tensors on `device`: frameworks move a batch that has this method by calling it."""
        moved = {name: values.to(device, non_blocking=non_blocking) for name, values in self.columns.items()}
        tokens, valid = (one.to(device, non_blocking=non_blocking) for one in (self.tokens, self.valid))
        return TensorBatch(tokens, valid, moved, self.host)

    @property
    def loss_mask(self) -> Tensor | None:
        """[B, seq_len + 1] bool: whether each token is to be learned; None: all are. `[:, 1:]` is that of the targets."""
        found = self.columns.get(LOSS_MASK)
        return None if found is None else found.bool()

    @property
    def inputs(self) -> Tensor:
        """[B, seq_len] what the model sees."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        """[B, seq_len] what it should say, one token further."""
        return self.tokens[:, 1:]


def stream(
    loader: Loader, device: str | torch.device | None = None, *, mesh: DeviceMesh | None = None
) -> "TensorStream":
    """Return the batches of `loader` on `device` (None: the CPU).

    Raises:
        ConfigError: `mesh` is given, and the loader was made for another rank than this process has in it.
    """
    if mesh is not None and rank_of(mesh) != loader.rank:
        raise ConfigError(
            "the loader was made for another rank than this process has in the mesh",
            loader=f"rank {loader.rank.rank} of {loader.rank.world}",
            mesh=f"rank {rank_of(mesh).rank} of {rank_of(mesh).world}",
            hint="Make it with rank=rank_of(mesh).",
        )
    return TensorStream(loader, torch.device(device or "cpu"))


def rank_of(mesh: DeviceMesh) -> Rank:
    """Return which part of the data this process reads: ranks that differ only in `MODEL_DIMENSIONS` share one.

    Raises:
        ConfigError: a mesh of several dimensions has no names.
    """
    names = mesh.mesh_dim_names or (("dp",) if mesh.ndim == 1 else ())
    if len(names) != mesh.ndim:
        raise ConfigError(
            "the dimensions of the mesh have no names", shape=tuple(mesh.shape), hint="Pass mesh_dim_names to it."
        )
    rank, world = 0, 1
    for dimension, name in enumerate(names):
        if name not in MODEL_DIMENSIONS:
            rank = rank * mesh.size(dimension) + mesh.get_local_rank(dimension)
            world *= mesh.size(dimension)
    return Rank(rank, world)


class TensorStream(Iterator[TensorBatch]):
    """An iterator of `TensorBatch`. Not thread-safe; it owns the loader's position as long as it is used."""

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self.loader = loader
        self._device = device
        self._buffers = [_Buffer(loader, pinned=device.type == "cuda") for _ in range(BUFFERS)]
        self._taken = 0

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the loader and the device: another process has buffers of its own."""
        return TensorStream, (self.loader, self._device)

    @override
    def __next__(self) -> TensorBatch:
        before = self.loader.state_dict()
        try:
            return self._next()
        except BaseException:
            # The loader may have delivered what did not get to the device: it is the next batch still.
            if self.loader.state_dict() != before:
                self.loader.load_state_dict(before)
            raise

    def _next(self) -> TensorBatch:
        buffer = self._buffers[self._taken % BUFFERS]
        buffer.wait()
        batch = self.loader.next_into(buffer.array, columns=buffer.columns)
        self._taken += 1
        if self._device.type == "cuda":
            narrow, columns = buffer.copy_to(self._device)
            tokens = narrow.to(torch.int64)
        else:
            # NumPy widens a batch in 20 us; torch's conversion from uint16 wakes all its threads for it.
            tokens = torch.from_numpy(batch.tokens.astype(np.int64)).to(self._device)
            columns = {name: torch.from_numpy(values.copy()).to(self._device) for name, values in batch.columns.items()}
        valid = torch.from_numpy(batch.valid).to(self._device, non_blocking=True)
        return TensorBatch(tokens, valid, columns, batch)

    def state_dict(self) -> dict[str, Any]:
        """Return `Loader.state_dict`: it counts the batches that this iterator has returned."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ResumeError: as `Loader.load_state_dict`.
        """
        self.loader.load_state_dict(state)

    def close(self) -> None:
        """Close the loader."""
        self.loader.close()


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
        loader = self.loader
        if loader.options.epochs is None:
            return loader.batches_per_epoch
        return 1 + (loader.options.epochs * loader.samples_per_epoch - 1) // loader.global_batch

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
        if self.loader.options.epochs is not None:
            return batches
        taken = self.loader.cursor // self.loader.global_batch % len(self)
        return _Pass(batches, len(self) - taken)

    def state_dict(self) -> dict[str, Any]:
        """Return `Loader.state_dict`: without workers a `DataLoader` takes a batch only to hand it out."""
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


class _Buffer:
    """Host memory for the narrow tokens of one batch and what goes with them, and the copy that reads from it."""

    def __init__(self, loader: Loader, *, pinned: bool) -> None:
        self._tensor = _empty((loader.rows, loader.seq_len + 1), loader.dtype, pinned=pinned)
        self._columns = {
            name: _empty(column.shape(loader.rows, loader.seq_len + 1), column.dtype, pinned=pinned)
            for name, column in loader.columns.items()
        }
        self._copied: torch.cuda.Event | None = None
        self.array: TokenArray = self._tensor.numpy()
        self.columns: dict[str, AnyArray] = {name: tensor.numpy() for name, tensor in self._columns.items()}

    def copy_to(self, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
        """Start a copy of the tokens and of all columns to `device`, on its current CUDA stream."""
        copy = self._tensor.to(device, non_blocking=True)
        columns = {name: tensor.to(device, non_blocking=True) for name, tensor in self._columns.items()}
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(device))
        return copy, columns

    def wait(self) -> None:
        """Wait until the buffer may be written again."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


def _empty(shape: tuple[int, ...], dtype: "np.dtype[Any]", *, pinned: bool) -> Tensor:
    """Return memory of torch for an array of NumPy's `dtype`."""
    return torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=pinned)
