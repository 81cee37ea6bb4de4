"""Local shards: read without file descriptors, checked at the first touch, and named when they are damaged or cut."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typing_extensions import Buffer

from datastore.dataset.roots import create_at, place_dataset
from datastore.dataset.snapshot import Dataset
from datastore.errors import CorruptError, DatastoreError, MissingError
from datastore.loader.cache.blocks import TokenBlocks
from datastore.loader.cache.files import FileBlocks
from datastore.loader.cache.memory import BlockCache
from datastore.loader.loader import Loader
from datastore.loader.settings import LoaderSettings
from datastore.loader.stream import SampleStream, open_stream
from datastore.storage.backends.local import LocalStorage
from datastore.storage.errors import explain
from datastore.testing.examples import make_dataset

BLOCK = 4096


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data", [[7_000], [9_000], [3_000]], block_bytes=BLOCK)


def shard_file(dataset: Dataset, shard: int) -> Path:
    path = dataset.storage.local_path(dataset.segments.shard(shard).path)
    assert path is not None
    return path


def touch(blocks: FileBlocks, shard: int) -> None:
    with blocks.hold(np.array(blocks.layout.of_shard(shard))):
        pass


def tokens_of(blocks: TokenBlocks, shard: int) -> npt.NDArray[np.uint16]:
    """Return the tokens of a shard whose blocks are held."""
    track, tokens = blocks.layout.tokens, int(blocks._segments.tokens[shard])
    return np.frombuffer(blocks.read(*np.array([[shard], [int(track.start[shard])], [2 * tokens]])), np.uint16)


def samples_of(dataset: Dataset) -> SampleStream:
    return open_stream(dataset, seq_len=1, seed=0, options=LoaderSettings())


def test_local_datasets_are_read_where_they_lie_and_others_kept_in_memory(dataset: Dataset) -> None:
    assert isinstance(samples_of(dataset).open_blocks(), FileBlocks)
    elsewhere = make_dataset("memory://local-or-not", [[10]])
    assert isinstance(samples_of(elsewhere).open_blocks(), BlockCache)


def test_held_tokens_are_those_of_the_shard(dataset: Dataset) -> None:
    blocks = FileBlocks(dataset.storage, dataset.segments)
    for shard in range(3):
        touch(blocks, shard)
        assert np.array_equal(tokens_of(blocks, shard), dataset.token_shard(shard)[0])


def test_each_block_is_checked_once(dataset: Dataset) -> None:
    blocks = FileBlocks(dataset.storage, dataset.segments)
    touch(blocks, 1)
    touch(blocks, 1)
    count = len(blocks.layout.of_shard(1))
    assert (blocks.stats().fills, blocks.stats().hits) == (count, count)


def test_a_flipped_bit_is_found_when_its_block_is_touched_and_not_before(dataset: Dataset) -> None:
    path = shard_file(dataset, 1)
    data = bytearray(path.read_bytes())
    data[2 * BLOCK + 17] ^= 4
    path.write_bytes(data)
    blocks = FileBlocks(dataset.storage, dataset.segments)
    first = blocks.layout.of_shard(1).start
    with blocks.hold(np.array([first, first + 1, first + 3])):
        pass
    with pytest.raises(CorruptError, match=rf"digest \(shard='shards/.*{path.name}', block=2, bytes='8192-12288'\)"):
        blocks.hold(np.array([first + 2])).__enter__()


@pytest.mark.parametrize("left", [0, 1, BLOCK + 100])
def test_a_shard_cut_short_is_named_with_the_first_block_that_is_gone(dataset: Dataset, left: int) -> None:
    path = shard_file(dataset, 1)
    os.truncate(path, left)
    blocks = FileBlocks(dataset.storage, dataset.segments)
    with pytest.raises(CorruptError, match=rf"cut short \(shard='shards/.*{path.name}', block={left // BLOCK}, "):
        touch(blocks, 1)


def test_a_shard_that_is_gone_is_named(dataset: Dataset) -> None:
    path = shard_file(dataset, 2)
    path.unlink()
    with pytest.raises(MissingError, match=path.name):
        touch(FileBlocks(dataset.storage, dataset.segments), 2)


def test_shards_hold_no_file_descriptors(dataset: Dataset) -> None:
    assert len(dataset.segments) == 3  # They are mapped, too, and there are few of them: each holds one.
    before = len(list(Path("/proc/self/fd").iterdir()))
    blocks = FileBlocks(dataset.storage, dataset.segments)
    for shard in range(3):
        touch(blocks, shard)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_number_of_maps_is_bounded_and_a_dropped_map_is_checked_again(dataset: Dataset) -> None:
    blocks = FileBlocks(dataset.storage, dataset.segments, max_shards=2)
    for shard in range(3):
        touch(blocks, shard)
    assert blocks.stats().evictions == 1
    fills = blocks.stats().fills
    touch(blocks, 0)
    assert blocks.stats().fills == fills + len(blocks.layout.of_shard(0))
    assert np.array_equal(tokens_of(blocks, 0), dataset.token_shard(0)[0])


def test_a_remote_shard_cut_short_is_named(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", [[7_000]], block_bytes=BLOCK)
    os.truncate(shard_file(dataset, 0), BLOCK + 1)
    cache = BlockCache(dataset.storage, dataset.segments, budget_bytes=2**20)
    with pytest.raises(CorruptError, match=r"cut short \(shard='shards/.*', block=1, "):
        cache.hold(np.array([0, 1])).__enter__()


def test_a_prefetch_of_a_damaged_block_is_silent_and_its_use_is_not(dataset: Dataset) -> None:
    os.truncate(shard_file(dataset, 0), 0)
    blocks = FileBlocks(dataset.storage, dataset.segments)
    with pytest.raises(DatastoreError):
        blocks.fetch(0)
    assert blocks.absent(np.array([0])).size == 1


def everything(dataset: Dataset) -> Loader:
    return Loader(dataset, seq_len=64, global_batch=16, options=LoaderSettings(epochs=2, threads=2))


def test_a_shard_cut_while_a_loader_is_in_it_is_damage(dataset: Dataset) -> None:
    with everything(dataset) as loader:
        for _ in range(loader.batches_per_epoch):
            next(loader)  # Now every block is checked and mapped.
        path = shard_file(dataset, 1)
        os.truncate(path, 2 * BLOCK + 100)
        with pytest.raises(CorruptError, match=rf"cut short \(shard='shards/.*{path.name}', block="):
            for _ in loader:
                pass
        cursor = loader.cursor
        with pytest.raises(CorruptError, match="cut short"):
            next(loader)
        assert loader.cursor == cursor


def test_after_the_cut_shard_is_restored_the_loader_goes_on_with_the_next_batch(dataset: Dataset) -> None:
    with everything(dataset) as other:
        right = [batch.tokens.tolist() for batch in other]
    path = shard_file(dataset, 1)
    whole = path.read_bytes()
    found = []
    with everything(dataset) as loader:
        for turn in range(len(right)):
            if turn % 7 == 5:
                os.truncate(path, BLOCK)
            try:
                found.append(next(loader).tokens.tolist())
            except CorruptError:
                path.write_bytes(whole)
                found.append(next(loader).tokens.tolist())
    assert found == right


def fails_at(shard: str) -> Any:
    """Return a `read_into` whose disk cannot read a shard beyond its first block."""
    good = LocalStorage.read_into

    def read_into(self: LocalStorage, key: str, start: int, target: Buffer) -> None:
        if key.endswith(shard) and start >= BLOCK:
            raise explain(OSError(errno.EIO, os.strerror(errno.EIO)), key=key, url=self.url)
        good(self, key, start, target)

    return read_into


@pytest.mark.parametrize("kind", [FileBlocks, BlockCache])
def test_a_block_that_the_disk_cannot_read_is_damage(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, kind: type[FileBlocks | BlockCache]
) -> None:
    name = shard_file(dataset, 1).name
    monkeypatch.setattr(LocalStorage, "read_into", fails_at(name))
    options = {"budget_bytes": 2**20} if kind is BlockCache else {}
    blocks = kind(dataset.storage, dataset.segments, **options)
    first = blocks.layout.of_shard(1).start
    with blocks.hold(np.array([first])):
        pass
    with pytest.raises(CorruptError, match=rf"cannot be read \(shard='shards/.*{name}', block=1, .*reason="):
        blocks.hold(np.array([first, first + 1])).__enter__()


def test_rows_that_the_kernel_cannot_copy_are_read_and_checked_one_by_one(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with everything(dataset) as other:
        right = [batch.tokens.tolist() for batch in other]
    monkeypatch.delattr(os, "memfd_create")
    with everything(dataset) as loader:
        assert [batch.tokens.tolist() for batch in loader] == right


@pytest.mark.parametrize("harm", ["cut", "gone", "rotten"])
def test_a_shard_that_fails_under_a_loader_is_read_from_the_other_disk(tmp_path: Path, harm: str) -> None:
    place_dataset(tmp_path / "one", roots=[str(tmp_path / "two")], copies=2)
    lengths = [[7_000], [9_000], [3_000]]
    dataset = make_dataset(create_at(str(tmp_path / "one"))[0], lengths, block_bytes=BLOCK)
    with everything(dataset) as other:
        right = [batch.tokens.tolist() for batch in other]
    found = []
    with everything(dataset) as loader:
        for turn in range(len(right)):
            if turn == 3:
                path = shard_file(dataset, 1)
                data = bytearray(path.read_bytes())
                if harm == "cut":
                    os.truncate(path, 100)
                elif harm == "gone":
                    path.unlink()
                else:
                    data[50] ^= 1
                    path.write_bytes(data)
            found.append(next(loader).tokens.tolist())
    assert found == right


READER = """
import os, sys, threading
from datastore.dataset.snapshot import open_dataset
from datastore.errors import CorruptError
from datastore.loader.loader import Loader
dataset = open_dataset(sys.argv[1])
paths = [dataset.storage.local_path(shard.path) for shard in dataset.segments]
def cut():
    for path in paths:
        os.truncate(path, 0)
loader = Loader(dataset, seq_len=64, global_batch=64)
for _ in range(20):
    next(loader)
threading.Timer(0.05, cut).start()
try:
    for _ in loader:
        pass
except CorruptError as error:
    print(error)
"""


def test_a_process_outlives_shards_that_are_cut_at_any_moment(tmp_path: Path) -> None:
    for attempt in range(3):
        make_dataset(tmp_path / str(attempt), [[70_000]] * 4)
        done = subprocess.run(
            [sys.executable, "-c", READER, str(tmp_path / str(attempt))], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "cut short" in done.stdout
