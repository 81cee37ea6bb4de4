"""Memory under checkpoints: staging buffers are used again, files are mapped without danger, far bytes fetched once."""

import errno
import os
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.format.manifest import Chunk
from datastore.checkpoint.loading import reader as reading
from datastore.checkpoint.loading.sources import Sources
from datastore.checkpoint.saving.snapshot import BufferPool
from datastore.digest import digest_hex
from datastore.errors import CorruptError, MissingError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage


def test_a_buffer_that_was_given_back_is_handed_out_again_if_it_is_large_enough() -> None:
    pool = BufferPool()
    first = pool.take(1000)
    assert first.numel() >= 1000
    second = pool.take(1000)
    assert second.data_ptr() != first.data_ptr()
    pool.give(first)
    pool.give(second)
    again = pool.take(10)
    assert again.data_ptr() in {first.data_ptr(), second.data_ptr()}
    pool.give(again)
    assert pool.take(2 * again.numel()).numel() >= 2 * again.numel()


def test_a_cleared_pool_keeps_nothing() -> None:
    pool = BufferPool()
    pool.give(pool.take(1000))
    pool.clear()
    assert pool._free is None


def test_an_older_kernel_gets_its_pages_touched_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.checkpoint.saving.snapshot._POPULATE_WRITE", 9999)
    assert BufferPool().take(5000)[:5000].eq(0).all()


def test_every_save_in_the_background_stages_into_the_same_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    take = BufferPool.take

    def record(self: BufferPool, size_bytes: int) -> torch.Tensor:
        buffer = take(self, size_bytes)
        taken.append(buffer.data_ptr())
        return buffer

    monkeypatch.setattr(BufferPool, "take", record)
    weights = torch.zeros(10_000)
    with Checkpointer(tmp_path) as ck:
        for step in range(4):
            with ck.guard():
                weights += 1
            ck.save(step, {"state": {"w": weights}})
    assert len(taken) == 4
    assert len(set(taken)) == 1


def chunk_of(data: bytes, start: int, stop: int) -> Chunk:
    return Chunk("parts/p", start, stop, digest_hex(data[start:stop]), "w")


@pytest.fixture
def data() -> bytes:
    return np.random.default_rng(0).bytes(100_000)


def test_a_file_that_ends_too_early_or_is_not_there_is_an_error(tmp_path: Path, data: bytes) -> None:
    storage = LocalStorage(tmp_path)
    chunk = chunk_of(data, 90_000, 100_000)
    storage.put("parts/p", data)
    assert Sources(storage).range_of([chunk]).tobytes() == data[90_000:]
    for rest in (data[:95_000], b""):
        storage.put("parts/p", rest)
        with pytest.raises(CorruptError, match="cannot be read: the object ends too early"):
            Sources(storage).check([chunk])
    storage.delete("parts/p")
    with pytest.raises(MissingError):
        Sources(storage).fetch([chunk])


def test_a_file_cut_short_after_it_was_opened_is_an_error_and_no_crash(tmp_path: Path, data: bytes) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("parts/p", data)
    sources = Sources(storage)
    sources.check([chunk_of(data, 0, 10)])
    seen = sources.range_of([chunk_of(data, 0, 90_000)])
    os.truncate(tmp_path / "parts/p", 4096)
    assert seen.tobytes() == data[:90_000]  # A mapping would end the process here.
    late = chunk_of(data, 50_000, 60_000)
    with pytest.raises(CorruptError, match="cannot be read"):
        sources.check([late])
    with pytest.raises(CorruptError, match="the object ends too early"):
        sources.copy(late, np.zeros(10_000, dtype=np.uint8))


def test_what_is_copied_is_what_was_written_and_is_checked_where_it_arrived(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.checkpoint.loading.sources._STEP_BYTES", 999)
    near, far = LocalStorage(tmp_path), MemoryStorage(uuid.uuid4().hex)
    chunk = chunk_of(data, 5_000, 15_000)
    for storage in (near, far):
        storage.put("parts/p", data)
        sources = Sources(storage)
        sources.fetch([chunk])
        target = np.zeros(10_000, dtype=np.uint8)
        sources.copy(chunk, target)
        assert target.tobytes() == data[5_000:15_000]
        with pytest.raises(CorruptError, match="does not match"):
            sources.copy(replace(chunk, digest="0" * 32), target)


def test_a_bad_sector_is_an_error_when_it_is_checked_or_copied(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    storage = LocalStorage(tmp_path)
    storage.put("parts/p", data)
    monkeypatch.setattr(os, "preadv", fail)
    chunk = chunk_of(data, 0, 10)
    for work in (lambda: Sources(storage).check([chunk]), lambda: Sources(storage).copy(chunk, np.zeros(10, np.uint8))):
        with pytest.raises(CorruptError, match="cannot be read: the disk reported an error"):
            work()


def test_small_chunks_that_lie_side_by_side_are_read_together(tmp_path: Path, data: bytes) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("parts/p", data)
    chunks = [chunk_of(data, start, start + 100) for start in range(0, 50_000, 100)]
    Sources(storage).check(chunks)
    assert storage.statistics()["read_into"].requests == 1
    with pytest.raises(CorruptError, match="start=300"):
        Sources(storage).check([*chunks[:3], replace(chunks[3], digest="0" * 32), *chunks[4:]])


class Counting(MemoryStorage):
    """Counts what is asked for, and says that it is far away."""

    url = "far://away"

    def __init__(self) -> None:
        super().__init__(uuid.uuid4().hex)
        self.reads: list[tuple[str, int, int]] = []

    def read_into(self, key: str, start: int, target: Any) -> None:
        self.reads.append((key, start, memoryview(target).nbytes))
        super().read_into(key, start, target)


def test_neighbouring_chunks_that_are_far_away_are_fetched_together_and_once(data: bytes) -> None:
    storage = Counting()
    storage.put("parts/p", data)
    chunks = [chunk_of(data, start, start + 1000) for start in (0, 1000, 2000, 50_000, 51_000)]
    sources = Sources(storage)
    sources.fetch(chunks)
    for _ in range(2):
        sources.check(chunks)
    assert sources.range_of(chunks[:3]).tobytes() == data[:3000]
    assert sorted(storage.reads) == [("parts/p", 0, 3000), ("parts/p", 50_000, 2000)]


def test_a_request_has_a_largest_size(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.checkpoint.loading.sources._FETCH_BYTES", 2500)
    storage = Counting()
    storage.put("parts/p", data)
    chunks = [chunk_of(data, start, start + 1000) for start in range(0, 5000, 1000)]
    Sources(storage).fetch(chunks)
    assert sorted(storage.reads) == [("parts/p", 0, 2000), ("parts/p", 2000, 2000), ("parts/p", 4000, 1000)]


@pytest.mark.parametrize("shape", [(50, 7), (3,), (1, 350), (50, 7, 2)])
def test_tensors_with_gaps_are_filled_in_pieces_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Sequence[int]
) -> None:
    monkeypatch.setattr(reading, "_PIECE_BYTES", 64)
    scattered: list[int] = []
    scatter = reading.Reader._scatter

    def record(self: reading.Reader, transfer: reading.Transfer) -> None:
        scattered.append(transfer.size_bytes)
        scatter(self, transfer)

    monkeypatch.setattr(reading.Reader, "_scatter", record)
    saved = torch.randn(*shape)
    target = torch.zeros(*shape[:-1], 2 * shape[-1])[..., ::2]
    with Checkpointer(tmp_path) as ck:
        ck.save(1, {"state": {"w": saved}}, blocking=True)
        ck.restore({"state": {"w": target}})
    assert torch.equal(target, saved)
    row_bytes = saved[0].numel() * 4
    assert max(scattered) <= max(64, row_bytes)
    assert sum(scattered) == saved.nbytes
