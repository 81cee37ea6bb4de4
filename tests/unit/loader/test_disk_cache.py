"""The disk under the memory: what is on it, and what happens when it is full, damaged, shared or gone."""

import errno
import logging
import os
import uuid
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typing_extensions import Buffer, override

import datastore as ds
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import digest_bytes
from datastore.loader.cache.disk import DiskTier, block_name
from datastore.loader.cache.folder import CacheFolder, clear_cached, list_cached
from datastore.loader.cache.warm import warm_cache
from datastore.loader.loader import Loader
from datastore.loader.lookup import SampleReader, blocks_of_steps
from datastore.loader.settings import LoaderSettings, Rank
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset

BLOCK = 4096
UUID = "0" * 32


class Counted(MemoryStorage):
    """Notes what is read of shards."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.reads: list[tuple[str, int, int]] = []

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        self.reads.append((key, start, memoryview(target).nbytes))
        super().read_into(key, start, target)


@pytest.fixture
def remote() -> tuple[Counted, Dataset]:
    storage = Counted(uuid.uuid4().hex)
    make_dataset(storage, [[9_000], [5_000, 6_000], [12_000]], block_bytes=BLOCK)
    return storage, open_dataset(storage)


def options(folder: Path, **more: int) -> LoaderSettings:
    values = {"lanes": 4, "window": 16, "epochs": 1, "threads": 2, "cache_bytes": 2**20} | more
    return LoaderSettings(cache_dir=str(folder), **values)  # type: ignore[arg-type]


def epoch(dataset: Dataset, settings: LoaderSettings, *, rank: Rank = Rank()) -> tuple[list[bytes], dict[str, float]]:  # noqa: B008
    with Loader(dataset, seq_len=32, global_batch=8, rank=rank, options=settings) as loader:
        return [batch.tokens.tobytes() for batch in loader], loader.stats()


def tier(folder: Path, *, budget_bytes: int = 10 * BLOCK, evicts: bool = True, name: str = UUID) -> DiskTier:
    return DiskTier(folder, budget_bytes=budget_bytes, uuid=name, url=f"memory://{name[:4]}", evicts=evicts)


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


def put(disk: DiskTier, number: int) -> bool:
    return disk.write(block_name(UUID, number), memoryview(block(number)))


def has(disk: DiskTier, number: int) -> bool:
    target = bytearray(BLOCK)
    found = disk.read(block_name(UUID, number), memoryview(target), digest=digest_bytes(block(number)))
    assert not found or target == block(number)
    return found


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*-[br]*"))


def test_what_one_run_has_fetched_the_next_one_reads_from_the_disk(
    remote: tuple[Counted, Dataset], tmp_path: Path
) -> None:
    storage, dataset = remote
    without, _ = epoch(dataset, LoaderSettings(lanes=4, window=16, epochs=1))
    storage.reads.clear()
    first, cold = epoch(dataset, options(tmp_path))
    assert storage.reads
    storage.reads.clear()
    second, warm = epoch(open_dataset(storage), options(tmp_path))
    assert first == second == without
    assert not [key for key, _, _ in storage.reads if key.startswith("shards/")]
    assert cold["disk_writes"] == warm["disk_hits"] == cold["fills"]
    assert cold["fetched_bytes"] == cold["filled_bytes"] == warm["filled_bytes"] == warm["disk_hit_bytes"]
    assert warm["fetched_bytes"] == warm["requests"] == 0


def test_ranks_share_what_any_of_them_has_fetched(remote: tuple[Counted, Dataset], tmp_path: Path) -> None:
    _, dataset = remote
    fetched = sum(epoch(dataset, options(tmp_path), rank=Rank(rank, 3))[1]["fetched_bytes"] for rank in range(3))
    assert fetched == int(dataset.segments.size_bytes.sum())


def test_a_damaged_file_is_removed_and_its_block_fetched_again(remote: tuple[Counted, Dataset], tmp_path: Path) -> None:
    _, dataset = remote
    right, _ = epoch(dataset, options(tmp_path))
    flipped, cut, longer = sorted(tmp_path.rglob("*-b*"))[:3]
    data = bytearray(flipped.read_bytes())
    data[100] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    longer.write_bytes(longer.read_bytes() + b"x")
    found, stats = epoch(dataset, options(tmp_path))
    assert found == right
    assert (stats["disk_corrupt"], stats["disk_writes"]) == (3, 3)
    again, stats = epoch(dataset, options(tmp_path))
    assert again == right
    assert (stats["disk_corrupt"], stats["fetched_bytes"]) == (0, 0)


def test_bytes_that_are_wrong_never_come_to_the_disk(remote: tuple[Counted, Dataset], tmp_path: Path) -> None:
    storage, dataset = remote
    path = dataset.segments.shard(0).path
    raw = bytearray(storage.get(path))
    raw[BLOCK + 5] ^= 1
    storage.put(path, bytes(raw))
    with pytest.raises(ds.CorruptError, match="a block does not match its digest"):
        epoch(dataset, options(tmp_path))
    assert f"{dataset.segments.shard(0).uid}-b1" not in files(tmp_path)


def test_no_more_than_the_budget_is_kept_and_the_least_recently_used_goes(tmp_path: Path) -> None:
    disk = tier(tmp_path, budget_bytes=3 * BLOCK)
    for number in range(3):
        assert put(disk, number)
        os.utime(tmp_path / UUID / block_name(UUID, number), ns=(number, number))
    assert has(disk, 0)
    assert put(disk, 3)
    assert [number for number in range(4) if has(disk, number)] == [0, 2, 3]
    assert disk.stats().disk_evictions == 1


def test_what_is_needed_last_goes_first_where_that_is_known(tmp_path: Path) -> None:
    disk = tier(tmp_path, budget_bytes=3 * BLOCK)
    needed = {block_name(UUID, 0): 5, block_name(UUID, 1): 90, block_name(UUID, 2): 7, block_name(UUID, 3): 6}
    disk.next_uses = lambda names: [needed[name] for name in names]
    for number in range(4):
        assert put(disk, number)
    assert [number for number in range(4) if has(disk, number)] == [0, 2, 3]


def test_an_idle_dataset_goes_first_and_a_busy_one_gives_its_part(tmp_path: Path) -> None:
    other = "1" * 32
    idle, busy = tier(tmp_path, budget_bytes=64 * BLOCK, name=other), tier(tmp_path, budget_bytes=64 * BLOCK)
    for number in range(32):
        assert idle.write(block_name(other, number), memoryview(block(number)))
        assert put(busy, number)
    for path in (tmp_path / other).glob("*-b*"):
        os.utime(path, (1, 1))
    assert put(busy, 32)
    assert len(list((tmp_path / other).glob("*-b*"))) == 32 - 4
    for path in (tmp_path / other).glob("*-b*"):
        os.utime(path)
    for number in range(33, 49):
        assert put(busy, number)
    left = {found.uuid: found.blocks for found in list_cached(tmp_path)}
    assert 12 < left[other] < 28
    assert left[UUID] > 32


def test_a_block_larger_than_the_budget_is_not_kept(tmp_path: Path) -> None:
    disk = tier(tmp_path, budget_bytes=BLOCK - 1)
    assert not put(disk, 0)
    assert files(tmp_path) == []


def test_eviction_under_a_reader_leaves_it_what_it_reads(tmp_path: Path) -> None:
    disk = tier(tmp_path, budget_bytes=BLOCK)
    assert put(disk, 0)
    with (tmp_path / UUID / block_name(UUID, 0)).open("rb") as reader:
        assert put(disk, 1)
        assert reader.read() == block(0)
    assert not has(disk, 0)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_cannot_be_written_steps_aside_and_says_so_once(
    number: int,
    remote: tuple[Counted, Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, dataset = remote
    right, _ = epoch(dataset, LoaderSettings(lanes=4, window=16, epochs=1))

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(os, "write", full)
        found, stats = epoch(dataset, options(tmp_path))
    assert found == right
    assert stats["disk_writes"] == 0
    assert files(tmp_path) == []
    assert len(caplog.messages) == 1
    assert os.strerror(number) in caplog.text
    assert ("is full" in caplog.text) == (number in {errno.ENOSPC, errno.EDQUOT})


def test_a_disk_that_has_room_again_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tier(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        assert not put(disk, 0)
    assert not put(disk, 0)
    assert disk.is_full
    monkeypatch.setattr("datastore.loader.cache.disk._PAUSE_S", 0.0)
    disk._paused_until = 0.0
    assert put(disk, 0)
    assert CacheFolder(tmp_path).count()[0].size_bytes == BLOCK


def test_a_folder_that_cannot_be_one_is_refused_when_the_first_batch_is_asked_for(
    remote: tuple[Counted, Dataset], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ds.ConfigError, match=r"the folder of the cache cannot be used .*cache_dir"):
        epoch(remote[1], options(tmp_path / "file"))


def test_a_folder_that_somebody_removes_is_made_again(tmp_path: Path) -> None:
    disk = tier(tmp_path / "cache")
    assert put(disk, 0)
    clear_cached(tmp_path / "cache")
    assert not has(disk, 0)
    assert put(disk, 0)
    for path in sorted((tmp_path / "cache").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (tmp_path / "cache").rmdir()
    assert put(disk, 0)
    assert has(disk, 0)


def test_a_lock_that_somebody_has_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.loader.cache.folder._LOCK_S", 0.0)
    disk = tier(tmp_path)
    with CacheFolder(tmp_path).locked() as ledger:
        assert ledger is not None
        with CacheFolder(tmp_path).locked(patience_s=0.0) as second:
            assert second is None
    assert put(disk, 1)


def test_what_is_half_written_is_removed_and_not_counted(tmp_path: Path) -> None:
    assert put(tier(tmp_path), 0)
    left = tmp_path / UUID / f"{block_name(UUID, 1)}.tmp"
    left.write_bytes(b"half")
    with CacheFolder(tmp_path).locked() as ledger:
        assert ledger is not None
        ledger.used_bytes = 5 * BLOCK
    assert put(tier(tmp_path), 2)
    assert not left.exists()
    with CacheFolder(tmp_path).locked() as ledger:
        assert ledger is not None
        assert ledger.used_bytes == 2 * BLOCK


def test_local_datasets_use_no_disk_cache(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", [[5_000]])
    epoch(dataset, options(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_warming_brings_everything_and_then_nothing(remote: tuple[Counted, Dataset], tmp_path: Path) -> None:
    storage, dataset = remote
    total = int(dataset.segments.size_bytes.sum())
    done: list[tuple[int, int]] = []
    report = warm_cache(dataset, options=options(tmp_path), progress=lambda *at: done.append(at))
    assert (report.size_bytes, report.written_bytes, report.left_out_bytes) == (total, total, 0)
    assert done[-1] == (total, total)
    assert [found.size_bytes for found in list_cached(tmp_path)] == [total]
    storage.reads.clear()
    assert warm_cache(dataset, options=options(tmp_path)).there_bytes == total
    epoch(dataset, options(tmp_path))
    assert not storage.reads


def test_warming_stops_where_there_is_no_room_and_evicts_nothing(
    remote: tuple[Counted, Dataset], tmp_path: Path
) -> None:
    other = tier(tmp_path)
    assert put(other, 0)
    report = warm_cache(remote[1], options=options(tmp_path, cache_bytes=5 * BLOCK))
    assert 0 < report.written_bytes <= 4 * BLOCK
    assert report.written_bytes + report.left_out_bytes == report.size_bytes
    assert has(other, 0)


def test_warming_for_some_steps_brings_what_they_read(remote: tuple[Counted, Dataset], tmp_path: Path) -> None:
    storage, dataset = remote
    settings = options(tmp_path)
    blocks = blocks_of_steps(SampleReader(dataset, seq_len=32, options=settings), steps=3, global_batch=8)
    report = warm_cache(dataset, options=settings, blocks=blocks)
    assert 0 < report.size_bytes < int(dataset.segments.size_bytes.sum())
    storage.reads.clear()
    with Loader(dataset, seq_len=32, global_batch=8, options=options(tmp_path, prefetch_batches=0)) as loader:
        for _ in range(3):
            next(loader)
    assert not storage.reads


def test_rows_are_read_from_the_disk_too(tmp_path: Path) -> None:
    storage = Counted(uuid.uuid4().hex)
    rows = pa.table({"id": [str(number) for number in range(3000)], "value": np.arange(3000)})
    with ds.record_writer(storage, schema=rows.schema) as writer:
        writer.write(rows)
    dataset = open_dataset(storage)
    settings = LoaderSettings(epochs=1, cache_dir=str(tmp_path), threads=2)

    def values() -> list[int]:
        with ds.RowLoader(open_dataset(storage), global_batch=100, options=settings) as loader:
            return [value for batch in loader for value in batch.data.column("value").to_pylist()]

    assert sorted(first := values()) == list(range(3000))
    assert files(tmp_path) == [
        f"{shard.uid}-r{batch}" for shard in dataset.segments for batch, _ in enumerate(shard.layout.batches)
    ]
    storage.reads.clear()
    assert values() == first
    assert not storage.reads
    for path in tmp_path.rglob("*-r*"):
        path.write_bytes(bytes(path.stat().st_size))
    assert values() == first
    assert storage.reads
    assert warm_cache(dataset, options=settings).left_out_bytes == 0
    with pytest.raises(ds.ConfigError, match="only a dataset of tokens"):
        warm_cache(dataset, options=settings, blocks=[0])


def test_the_sources_of_a_mixture_that_lie_elsewhere_are_kept_each_under_its_dataset(
    remote: tuple[Counted, Dataset], tmp_path: Path
) -> None:
    storage, dataset = remote
    local = make_dataset(tmp_path / "local", [[8_000]], block_bytes=BLOCK)
    other = make_dataset(f"memory://{uuid.uuid4().hex}", [[7_000]], block_bytes=BLOCK, name="other")
    mixture = ds.Mixture({"a": dataset, "b": local, "c": other}, weights={"a": 2, "b": 1, "c": 1})

    def batches(folder: str) -> list[bytes]:
        settings = LoaderSettings(lanes=4, window=16, cache_dir=folder)
        with Loader(mixture, seq_len=32, global_batch=8, options=settings) as loader:
            return [next(loader).tokens.tobytes() for _ in range(60)]

    right = batches("")
    assert batches(str(tmp_path / "cache")) == right
    assert {found.uuid for found in list_cached(tmp_path / "cache")} == {dataset.uuid, other.uuid}
    storage.reads.clear()
    assert batches(str(tmp_path / "cache")) == right
    assert not storage.reads


def test_packed_rows_are_read_from_the_disk_too(remote: tuple[Counted, Dataset], tmp_path: Path) -> None:
    storage, dataset = remote
    settings = LoaderSettings(packing="best_fit", epochs=1, cache_dir=str(tmp_path))
    first = [batch.tokens.tobytes() for batch in Loader(dataset, seq_len=16_383, global_batch=1, options=settings)]
    storage.reads.clear()
    again = [batch.tokens.tobytes() for batch in Loader(dataset, seq_len=16_383, global_batch=1, options=settings)]
    assert again == first
    assert len(first) > 1
    assert not storage.reads


def test_samples_by_position_are_read_from_the_disk_too(remote: tuple[Counted, Dataset], tmp_path: Path) -> None:
    storage, dataset = remote
    first = SampleReader(dataset, seq_len=32, options=options(tmp_path)).read(range(100)).tokens
    storage.reads.clear()
    assert np.array_equal(SampleReader(dataset, seq_len=32, options=options(tmp_path)).read(range(100)).tokens, first)
    assert not storage.reads
