"""Batches as tensors: narrow token ids in reusable host buffers, widened where the model is.

Decision: no worker processes. Handing a batch from one process to another takes 40 us a sample, gathering it 1 us; the
loader's own threads fetch ahead. On CUDA the copy to the device runs from pinned memory beside the computation, at
two bytes a token, and a buffer is not filled again before its copy has ended. Loss masks, and other columns that the
loader reads, go the same way. Where tokens stay on the CPU they are widened straight from what the loader gathered: a buffer
in between would cost a tenth more (1.12 [1.04, 1.21], 2026-11-28).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import override

from datastore.errors import ConfigError
from datastore.loader.batch import Batch
from datastore.loader.gathering.gather import AnyArray, TokenArray
from datastore.loader.loader import Loader
from datastore.loader.settings import LOSS_MASK, Rank

__all__ = ["BUFFERS", "MODEL_DIMENSIONS", "TensorBatch", "TensorStream", "rank_of", "stream"]

BUFFERS = 3
"""Host buffers of a stream to CUDA: one being filled, one being copied, one that the caller may still look at."""

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
    """Where it comes from. On CUDA its arrays lie in a reusable buffer: right until two more batches have been taken."""

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
    def document_starts(self) -> Tensor:
        """[D, 2] int64 on the device: the row and the place in it where each document of packed rows starts (`Batch.document_starts`)."""
        return torch.from_numpy(self.host.document_starts).to(self.tokens.device)

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
        self._buffers = [_Buffer(loader) for _ in range(BUFFERS)] if device.type == "cuda" else []
        self._taken = 0

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the loader and the device: another process has buffers of its own."""
        return TensorStream, (self.loader, self._device)

    @override
    def __next__(self) -> TensorBatch:
        before = self.loader.cursor
        try:
            return self._next_by_buffer() if self._buffers else self._next()
        except BaseException:
            # The loader may have delivered what did not get to the device: it is the next batch still.
            if self.loader.cursor != before:
                self.loader.load_state_dict(self.loader.state_dict() | {"cursor": before})
            raise

    def _next_by_buffer(self) -> TensorBatch:
        buffer = self._buffers[self._taken % BUFFERS]
        buffer.wait()
        batch = self.loader.next_into(buffer.array, columns=buffer.columns)
        self._taken += 1
        narrow, columns = buffer.copy_to(self._device)
        valid = torch.from_numpy(batch.valid).to(self._device, non_blocking=True)
        return TensorBatch(narrow.to(torch.int64), valid, columns, batch)

    def _next(self) -> TensorBatch:
        batch = next(self.loader)
        # NumPy widens a batch in 20 us; torch's conversion from uint16 wakes all its threads for it.
        tokens = torch.from_numpy(batch.tokens.astype(np.int64)).to(self._device)
        columns = {name: torch.from_numpy(values.copy()).to(self._device) for name, values in batch.columns.items()}
        return TensorBatch(tokens, torch.from_numpy(batch.valid).to(self._device), columns, batch)

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


class _Buffer:
    """Pinned memory for the narrow tokens of one batch and what goes with them, and the copy that reads from it."""

    def __init__(self, loader: Loader) -> None:
        self._tensor = _pinned((loader.rows, loader.seq_len + 1), loader.dtype)
        self._columns = {
            name: _pinned(column.shape(loader.rows, loader.seq_len + 1), column.dtype)
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


def _pinned(shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Tensor:
    """Return memory of torch for an array of NumPy's `dtype`."""
    return torch.empty(shape, dtype=getattr(torch, dtype.name), pin_memory=True)
