"""One batch of a shard: a range read of its own bytes, checked, in either format."""

import uuid
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from typing_extensions import Buffer, override

from datastore.dataset.durability.verify import verify
from datastore.dataset.operations.delete import delete
from datastore.dataset.shards.info import BatchRange, ShardLayout, frame_ranges
from datastore.dataset.shards.segment_file import segment_of
from datastore.dataset.shards.segments import Segments
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, CorruptError
from datastore.formats.records import BATCH_BYTES
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.memory import MemoryStorage

KINDS = pytest.mark.parametrize("kind", ["arrow", "parquet"])
ROWS = 4_000


class CountingStorage(MemoryStorage):
    """Remembers which bytes of shards were asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.asked: list[int] = []

    @override
    def get(self, key: str) -> bytes:
        if key.startswith("shards/"):
            self.asked.append(self.stat(key).size_bytes)
        return super().get(key)

    @override
    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes]:  # type: ignore[override]
        self.asked.append(sum(stop - start for start, stop in ranges))
        return super().get_ranges(key, ranges)

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        if key.startswith("shards/"):
            self.asked.append(memoryview(target).nbytes)
        super().read_into(key, start, target)


def table() -> pa.Table:
    """Return some 8 MiB that do not compress."""
    noise = np.random.default_rng(1).integers(0, 256, (ROWS, 2048), dtype=np.uint8)
    return pa.table({"n": range(ROWS), "image": pa.array([row.tobytes() for row in noise], pa.binary())})


def written(kind: str, *, shards: int = 1) -> tuple[CountingStorage, Dataset]:
    storage = CountingStorage(uuid.uuid4().hex)
    for _ in range(shards):
        with record_writer(storage, format=kind) as out:  # type: ignore[arg-type]
            out.write(table())
    storage.asked.clear()
    return storage, open_dataset(storage)


@KINDS
def test_a_batch_is_one_read_of_its_own_bytes_after_one_of_the_frame(kind: str) -> None:
    storage, dataset = written(kind)
    shard = dataset.segments.shard(0)
    batches = shard.layout.batches
    assert shard.path.endswith(f".{kind}")
    assert len(batches) >= 4
    assert all(0.9 * BATCH_BYTES <= batch.stop - batch.start < 1.1 * BATCH_BYTES for batch in batches[:-1])
    first = sum(batch.rows for batch in batches[:2])
    assert dataset.read_batch(0, 2)["n"].to_pylist() == list(range(first, first + batches[2].rows))
    frame, *rest = storage.asked
    assert frame < 8_192
    assert rest == [batches[2].stop - batches[2].start]
    dataset.read_batch(0, 3)
    assert storage.asked[2:] == [batches[3].stop - batches[3].start]


@KINDS
def test_only_the_columns_that_are_asked_for_are_handed_out(kind: str) -> None:
    _, dataset = written(kind)
    assert dataset.read_batch(0, 1, columns=["n"]).schema.names == ["n"]
    assert [row for batch in dataset.iter_batches(columns=["n"]) for row in batch["n"].to_pylist()] == [*range(ROWS)]
    with pytest.raises(ConfigError, match=r"no such column \(columns=\['x'\]\)"):
        dataset.read_batch(0, 0, columns=["x"])
    with pytest.raises(ConfigError, match="no such column"):
        next(dataset.iter_batches(columns=["x"]))


@KINDS
def test_reading_all_rows_reads_each_byte_once_and_holds_batches_not_shards(kind: str) -> None:
    storage, dataset = written(kind, shards=3)
    batches = list(dataset.iter_batches())
    assert sum(storage.asked) == sum(shard.size_bytes for shard in dataset.segments)
    assert max(batch.num_rows for batch in batches) < ROWS / 3
    storage.asked.clear()
    rows = dataset.iter_records()
    next(rows)
    rows.close()
    # Read ahead, but not the whole dataset.
    assert sum(storage.asked) < 0.8 * sum(shard.size_bytes for shard in dataset.segments)


@KINDS
@pytest.mark.parametrize("place", ["frame", "batch"])
def test_a_flipped_bit_is_found_by_whoever_reads_that_batch_and_by_nobody_else(kind: str, place: str) -> None:
    storage, dataset = written(kind)
    shard = dataset.segments.shard(0)
    raw = bytearray(storage.get(shard.path))
    at = shard.layout.batches[1].start + 5 if place == "batch" else frame_ranges(shard.layout.batches, len(raw))[-1][0]
    raw[at] ^= 1
    storage.put(shard.path, bytes(raw))
    with pytest.raises(CorruptError, match="do not match their digest") as caught:
        dataset.read_batch(0, 1)
    assert place in str(caught.value.values["where"])
    if place == "batch":
        assert dataset.read_batch(0, 0).num_rows
    with pytest.raises(CorruptError):
        list(dataset.iter_records())
    assert not verify(dataset).ok


@KINDS
def test_deleted_rows_are_not_handed_out(kind: str) -> None:
    storage, dataset = written(kind, shards=2)
    delete(dataset, where="n in (0, 1, 1500, 3999)")
    dataset = open_dataset(storage)
    left = [n for n in range(ROWS) if n not in {0, 1, 1500, ROWS - 1}] * 2
    assert [row["n"] for row in dataset.iter_records(columns=["n"])] == left
    assert dataset.to_arrow()["n"].to_pylist() == left
    assert sum(dataset.live_records(index).num_rows for index in range(2)) == len(left)
    assert dataset.read_batch(0, 0)["n"][0].as_py() == 0


def test_no_such_batch_is_an_index_error() -> None:
    _, dataset = written("arrow")
    for shard, batch in ((0, 99), (0, -1), (1, 0), (-1, 0)):
        with pytest.raises(IndexError):
            dataset.read_batch(shard, batch)


@pytest.mark.parametrize(
    "batches",
    [[(0, 5), (4, 8)], [(5, 4)], [(0, 11)], [(4, 8), (0, 4)]],
    ids=["overlap", "ends before it starts", "beyond the file", "out of order"],
)
def test_ranges_that_do_not_fit_into_the_file_are_refused(batches: list[tuple[int, int]]) -> None:
    with pytest.raises(CorruptError, match="do not fit into its file"):
        frame_ranges([BatchRange(start, stop, 1, b"") for start, stop in batches], 10)


def test_the_frame_is_what_no_batch_has() -> None:
    batches = [BatchRange(2, 4, 1, b""), BatchRange(4, 6, 1, b""), BatchRange(7, 9, 1, b"")]
    assert frame_ranges(batches, 10) == [(0, 2), (6, 7), (9, 10)]
    assert frame_ranges([BatchRange(0, 10, 1, b"")], 10) == []
    assert frame_ranges([], 10) == [(0, 10)]


def test_a_shard_from_before_batches_had_ranges_is_read_whole(tmp_path: Path) -> None:
    with record_writer(tmp_path / "set") as out:
        out.write(table())
    dataset = open_dataset(tmp_path / "set")
    shards = [msgspec.structs.replace(shard, layout=ShardLayout()) for shard in dataset.segments]
    dataset.__dict__["segments"] = Segments([segment_of(shards)])
    assert list(dataset.iter_records()) == table().to_pylist()
    assert dataset.read_batch(0, 1)["n"][0].as_py() > 0
    assert dataset.read_batch(0, 1, columns=["n"]).num_columns == 1
