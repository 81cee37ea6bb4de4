"""Saved bytes into tensors, in two passes: every chunk is verified before the first tensor is written.

First pass: each chunk that this rank needs is hashed and compared. Second pass, once all ranks have said yes: the
bytes are copied into the tensors, and what has been copied is hashed once more, because they come from the disk again.
Remote parts are kept in memory between the passes (see `sources.py`). Where what is overwritten is worth nothing, the second
pass alone is enough: it checks every chunk, too.

The layouts of what was saved and of what is here need not be related: whatever a saved box and a local box have in common
is one transfer. A tensor that was saved by eight ranks is read by one, or by three, in the same way.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch

from datastore.checkpoint.format.manifest import Chunk, Entry, PartInfo, chunks_of
from datastore.checkpoint.loading.sources import Sources
from datastore.checkpoint.tensors import DTYPES, Box, Bytes, byte_view, local_piece, overlap, row_span
from datastore.errors import CorruptError
from datastore.formats.safetensors import ITEM_BYTES
from datastore.storage.base import Storage
from datastore.threads import each

__all__ = ["Reader", "Transfer", "transfers_of"]

T = TypeVar("T")

_TASK_BYTES = 4 * 2**20
"""How much a thread does at a time, at most: small chunks and pieces are put together."""

_PIECE_BYTES = 32 * 2**20
"""How much of a tensor on another device, or with gaps, is copied at once."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A box of one saved piece that goes into `target`, a tensor of the same shape, anywhere, with any strides."""

    entry: Entry
    box: Box
    target: torch.Tensor
    chunk_bytes: int

    @property
    def rows(self) -> tuple[int, int]:
        """The range of elements of the piece that hold the box."""
        return row_span(self.box, self.entry.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the box."""
        return self.box.elements * ITEM_BYTES[self.entry.dtype]

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks of the piece that hold the box."""
        first, last = self.rows
        item_bytes = ITEM_BYTES[self.entry.dtype]
        begin, end = first * item_bytes // self.chunk_bytes, -(-last * item_bytes // self.chunk_bytes)
        return tuple(chunks_of(self.entry, self.chunk_bytes, first=begin, last=end))


class Reader:
    """Carries out transfers from one storage: `verify`, if nothing may be touched before, then `deliver`; with `threads` threads."""

    def __init__(self, storage: Storage, transfers: Iterable[Transfer], *, threads: int) -> None:
        self._transfers = [transfer for transfer in transfers if transfer.box.elements]
        self._sources = Sources(storage)
        self._threads = threads
        self._fetched = False

    @cached_property
    def _chunks(self) -> list[Chunk]:
        return sorted({chunk for transfer in self._transfers for chunk in transfer.chunks})

    @property
    def size_bytes(self) -> int:
        """Bytes of the chunks that are needed."""
        return sum(chunk.size_bytes for chunk in self._chunks)

    def fetch(self) -> None:
        """Bring what is remote into memory, not verified, unless it is there.

        Raises:
            CorruptError, MissingError: a part is too short or gone; no target has been touched.
            StorageError: the storage failed.
        """
        if not self._fetched:
            self._sources.fetch(self._chunks)
            self._fetched = True

    def verify(self) -> None:
        """Check every chunk that is needed.

        Raises:
            CorruptError: bytes do not match; no target has been touched.
            StorageError: the storage failed.
        """
        self.fetch()
        tasks = list(_tasks((chunk, chunk.size_bytes) for chunk in self._chunks))
        each(self._sources.check, tasks, threads=self._threads)

    def deliver(self) -> None:
        """Fill the targets; every chunk is checked as it arrives.

        Raises:
            CorruptError: bytes are not those that were written; targets are partly overwritten.
            StorageError: the storage failed; targets are partly overwritten.
        """
        self.fetch()
        whole: list[tuple[Chunk, Bytes]] = []
        other: list[Transfer] = []
        for transfer in self._transfers:
            view = byte_view(transfer.target) if transfer.box.shape == transfer.entry.shape else None
            if view is None:
                other.extend(_split(transfer))
            else:
                start = transfer.entry.start
                whole.extend((chunk, view[chunk.start - start : chunk.stop - start]) for chunk in transfer.chunks)
        each(self._scatter, other, threads=self._threads)
        each(self._copy, list(_tasks((item, item[0].size_bytes) for item in whole)), threads=self._threads)

    def _copy(self, moves: Sequence[tuple[Chunk, Bytes]]) -> None:
        for chunk, target in moves:
            self._sources.copy(chunk, target)

    def _scatter(self, transfer: Transfer) -> None:
        """Copy the box out of the rows that hold it."""
        entry, (first, last), chunks = transfer.entry, transfer.rows, transfer.chunks
        item_bytes = ITEM_BYTES[entry.dtype]
        data = self._sources.range_of(chunks)
        begin = entry.start + first * item_bytes - chunks[0].start
        rows = torch.from_numpy(data[begin : begin + (last - first) * item_bytes]).view(DTYPES[entry.dtype])
        strides = torch.empty(entry.shape, device="meta").stride()
        transfer.target.copy_(rows.as_strided(transfer.box.shape, strides, 0))
        for chunk in chunks:
            chunk.check(data[chunk.start - chunks[0].start : chunk.stop - chunks[0].start].data)


def _tasks(items: Iterable[tuple[T, int]]) -> Iterator[list[T]]:
    """Yield items in groups whose sizes add up to a task."""
    group: list[T] = []
    total = 0
    for item, size_bytes in items:
        if group and total + size_bytes > _TASK_BYTES:
            yield group
            group, total = [], 0
        group.append(item)
        total += size_bytes
    if group:
        yield group


def _split(transfer: Transfer) -> Iterator[Transfer]:
    """Yield the transfer in pieces of about `_PIECE_BYTES`, cut along the first dimension, to bound the memory in use."""
    rows = transfer.box.shape[0] if transfer.box.shape else 1
    step = max(rows * _PIECE_BYTES // max(transfer.size_bytes, 1), 1)
    if step >= rows:
        yield transfer
        return
    (begin, *rest), (_, *lengths) = transfer.box.starts, transfer.box.shape
    for at in range(0, rows, step):
        count = min(step, rows - at)
        box = Box((begin + at, *rest), (count, *lengths))
        yield Transfer(transfer.entry, box, transfer.target.narrow(0, at, count), transfer.chunk_bytes)


def transfers_of(destinations: Mapping[str, torch.Tensor], parts: Sequence[PartInfo]) -> list[Transfer]:
    """Return what fills the local piece of each destination.

    Raises:
        CorruptError: the parts do not hold all of it.
    """
    sources: dict[str, list[tuple[Entry, int]]] = {}
    for info in parts:
        for entry in info.entries:
            sources.setdefault(entry.tensor, []).append((entry, info.chunk_bytes))
    return [
        transfer
        for name, tensor in destinations.items()
        for transfer in _transfers_into(name, tensor, sources.get(name, []))
    ]


def _transfers_into(name: str, tensor: torch.Tensor, sources: list[tuple[Entry, int]]) -> Iterator[Transfer]:
    piece = local_piece(tensor, name)
    left = piece.box.elements
    for entry, chunk_bytes in sources:
        saved = Box(entry.offsets, entry.shape)
        shared = overlap(piece.box, saved) if saved != piece.box else saved if left else None
        if shared is not None:
            left -= shared.elements
            target = piece.tensor if shared == piece.box else _cut(piece.tensor, shared.within(piece.box.starts))
            yield Transfer(entry, shared.within(entry.offsets), target, chunk_bytes)
    if left:
        hint = "Use an earlier step."
        raise CorruptError("a tensor was not saved as a whole", tensor=name, elements_missing=left, hint=hint)


def _cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    for dimension, (start, length) in enumerate(zip(box.starts, box.shape, strict=True)):
        tensor = tensor.narrow(dimension, start, length)
    return tensor
