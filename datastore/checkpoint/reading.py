"""Saved bytes into tensors, in two passes: every chunk is verified before the first tensor is written.

First pass: each chunk that this rank needs is read into a small buffer that stays in the processor's cache, hashed, and
compared. Second pass, once all ranks have said yes: large pieces are read straight into the tensors, small ones
through a buffer, several at a time; and hashed again, because the disk is asked again. Local files are in the page cache by then, so
the price is one more copy that stays in cache. Remote objects are not fetched twice: the first pass keeps their bytes.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from datastore.checkpoint.chunks import Chunk, chunks_of
from datastore.checkpoint.manifest import Entry
from datastore.checkpoint.plan import Box, row_span
from datastore.checkpoint.safetensors import ITEM_BYTES
from datastore.checkpoint.tensors import DTYPES, Bytes, byte_view
from datastore.storage.base import Storage

__all__ = ["Reader", "Transfer"]

_BATCH_BYTES = 4 * 2**20
"""Small pieces that lie side by side are read together up to this size; it still fits the cache."""

_FETCH_BYTES = 16 * 2**20
"""The same for storage that is not on this machine, where each request costs some 50 ms."""

_FETCH_THREADS = 16

_PIECE_BYTES = 32 * 2**20
"""How much of one tensor passes through a buffer at once."""

_ALIGN_BYTES = 16
"""A batch starts at a multiple of this, so that each piece in it is aligned as it is in the file."""


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
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks of the piece that hold the box."""
        first, last = self.rows
        item_bytes = ITEM_BYTES[self.entry.dtype]
        begin, end = first * item_bytes // self.chunk_bytes, -(-last * item_bytes // self.chunk_bytes)
        return tuple(chunks_of(self.entry, self.chunk_bytes, first=begin, last=end))


@dataclass(frozen=True, slots=True)
class _Batch:
    """Bytes [start, stop) of a part that are read at once, and the chunks in them."""

    part: str
    start: int
    stop: int
    chunks: tuple[Chunk, ...]


class Reader:
    """Carries out transfers from one storage. `verify` first, then `deliver`; both use `threads` threads."""

    def __init__(self, storage: Storage, transfers: Iterable[Transfer], *, threads: int) -> None:
        self._storage = storage
        self._transfers = [transfer for transfer in transfers if transfer.box.elements]
        self._threads = threads
        self._scratch = threading.local()
        self._kept: dict[tuple[str, int], Bytes] = {}
        self._near: dict[str, bool] = {}

    def verify(self) -> int:
        """Check every chunk that is needed; return their bytes.

        Raises:
            CorruptError: bytes do not match; no target has been touched.
            StorageError: the storage failed.
        """
        needed = {(chunk.part, chunk.start): chunk for item in self._transfers for chunk in item.chunks}
        ordered = sorted(needed.values(), key=lambda chunk: (chunk.part, chunk.start))
        near = [batch for batch in _batches(ordered, _BATCH_BYTES) if self._is_near(batch.part)]
        far = [batch for batch in _batches(ordered, _FETCH_BYTES) if not self._is_near(batch.part)]
        self._each(self._verify_batch, near, threads=self._threads)
        self._each(self._verify_batch, far, threads=_FETCH_THREADS)
        return sum(chunk.stop - chunk.start for chunk in needed.values())

    def deliver(self) -> None:
        """Fill the targets; every chunk is checked once more.

        Raises:
            CorruptError: bytes changed since they were verified; targets are partly overwritten.
            StorageError: the storage failed; targets are partly overwritten.
        """
        direct: list[tuple[Chunk, Bytes]] = []
        other: list[Transfer] = []
        for transfer in self._transfers:
            view = byte_view(transfer.target) if transfer.box.shape == transfer.entry.shape else None
            if view is not None and len(view) >= _BATCH_BYTES:
                direct.extend((chunk, view[chunk.start - transfer.entry.start :]) for chunk in transfer.chunks)
            else:
                other.extend(_split(transfer))
        groups = list(_side_by_side(other))
        self._each(self._deliver_group, groups, threads=self._threads)
        self._each(self._deliver_chunk, direct, threads=self._threads)

    def _is_near(self, part: str) -> bool:
        if part not in self._near:
            self._near[part] = self._storage.local_path(part) is not None
        return self._near[part]

    def _each(self, work: Callable[[Any], None], items: Sequence[Any], *, threads: int) -> None:
        if threads == 1 or len(items) < 2:
            for item in items:
                work(item)
            return
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()

    def _verify_batch(self, batch: _Batch) -> None:
        size_bytes = batch.stop - batch.start
        if self._is_near(batch.part):
            data = self._buffer(size_bytes)
        else:
            data = np.empty(size_bytes, dtype=np.uint8)
            for chunk in batch.chunks:
                self._kept[batch.part, chunk.start] = data[chunk.start - batch.start : chunk.stop - batch.start]
        self._storage.read_into(batch.part, batch.start, data.data)
        for chunk in batch.chunks:
            chunk.check(data[chunk.start - batch.start : chunk.stop - batch.start].data)

    def _read(self, chunks: Sequence[Chunk], start: int, data: Bytes) -> None:
        """Fill `data` with the bytes of a part from `start` on, which `chunks` cover, and check them."""
        first = chunks[0]
        if (first.part, first.start) in self._kept:
            for chunk in chunks:
                data[chunk.start - start : chunk.stop - start] = self._kept[chunk.part, chunk.start]
            return
        self._storage.read_into(first.part, start, data.data)
        for chunk in chunks:
            chunk.check(data[chunk.start - start : chunk.stop - start].data)

    def _deliver_chunk(self, item: tuple[Chunk, Bytes]) -> None:
        chunk, view = item
        self._read([chunk], chunk.start, view[: chunk.stop - chunk.start])

    def _deliver_group(self, group: Sequence[Transfer]) -> None:
        chunks = [chunk for transfer in group for chunk in transfer.chunks]
        start = min(chunk.start for chunk in chunks) // _ALIGN_BYTES * _ALIGN_BYTES
        data = self._buffer(max(chunk.stop for chunk in chunks) - start)
        self._read(chunks, start, data)
        for transfer in group:
            _scatter(transfer, start, data)

    def _buffer(self, size_bytes: int) -> Bytes:
        """Return memory of this thread; the next call takes it back."""
        found: Bytes | None = getattr(self._scratch, "data", None)
        if found is None or len(found) < size_bytes:
            found = self._scratch.data = np.empty(max(size_bytes, _BATCH_BYTES), dtype=np.uint8)
        return found[:size_bytes]


def _batches(chunks: Sequence[Chunk], limit_bytes: int) -> Iterator[_Batch]:
    """Yield neighbouring chunks together, up to `limit_bytes`."""
    for part, group in groupby(chunks, key=lambda chunk: chunk.part):
        pending: list[Chunk] = []
        for chunk in group:
            if pending and (chunk.start != pending[-1].stop or chunk.stop - pending[0].start > limit_bytes):
                yield _Batch(part, pending[0].start, pending[-1].stop, tuple(pending))
                pending = []
            pending.append(chunk)
        yield _Batch(part, pending[0].start, pending[-1].stop, tuple(pending))


def _side_by_side(transfers: Iterable[Transfer]) -> Iterator[list[Transfer]]:
    """Yield transfers whose bytes are neighbours, or the same, together, up to the size of a batch."""
    ranges = ((item, item.chunks[0].start, item.chunks[-1].stop) for item in transfers)
    keyed = sorted(((item.entry.part, start, stop, item) for item, start, stop in ranges), key=lambda row: row[:3])
    pending: list[Transfer] = []
    begin = end = 0
    part = ""
    for key, start, stop, item in keyed:
        if pending and (key != part or start > end or max(stop, end) - begin > _BATCH_BYTES):
            yield pending
            pending = []
        if not pending:
            part, begin, end = key, start, stop
        pending.append(item)
        end = max(end, stop)
    if pending:
        yield pending


def _scatter(transfer: Transfer, start: int, data: Bytes) -> None:
    """Copy the box out of `data`, which holds the part's bytes from `start` on."""
    entry, (first, last) = transfer.entry, transfer.rows
    item_bytes = ITEM_BYTES[entry.dtype]
    begin = entry.start + first * item_bytes - start
    touched = torch.from_numpy(data[begin : begin + (last - first) * item_bytes]).view(DTYPES[entry.dtype])
    strides = torch.empty(entry.shape, device="meta").stride()
    transfer.target.copy_(touched.as_strided(transfer.box.shape, strides, 0))


def _split(transfer: Transfer) -> Iterator[Transfer]:
    """Yield the transfer in pieces of about `_PIECE_BYTES`, cut along the first dimension, to bound the memory in use."""
    rows = transfer.box.shape[0] if transfer.box.shape else 1
    size_bytes = transfer.box.elements * ITEM_BYTES[transfer.entry.dtype]
    step = max(rows * _PIECE_BYTES // max(size_bytes, 1), 1)
    if step >= rows:
        yield transfer
        return
    (begin, *rest), (_, *lengths) = transfer.box.starts, transfer.box.shape
    for at in range(0, rows, step):
        count = min(step, rows - at)
        box = Box((begin + at, *rest), (count, *lengths))
        yield Transfer(transfer.entry, box, transfer.target.narrow(0, at, count), transfer.chunk_bytes)
