"""Local shards: mapped without file descriptors, checked at the first touch, and named when they are damaged."""

import os
from pathlib import Path

import numpy as np
import pytest

from datastore.dataset.snapshot import Dataset
from datastore.errors import CorruptError, DatastoreError, MissingError
from datastore.loader.cache.mapped import MappedBlocks
from datastore.loader.cache.memory import BlockCache
from datastore.loader.loader import open_blocks
from datastore.testing.examples import make_dataset

BLOCK = 4096


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data", [[7_000], [9_000], [3_000]], block_bytes=BLOCK)


def shard_file(dataset: Dataset, shard: int) -> Path:
    path = dataset.storage.local_path(dataset.segments.shard(shard).path)
    assert path is not None
    return path


def touch(blocks: MappedBlocks, shard: int) -> None:
    with blocks.hold(np.array(blocks.layout.of_shard(shard))):
        pass


def test_local_datasets_are_mapped_and_others_kept_in_memory(dataset: Dataset) -> None:
    assert isinstance(open_blocks(dataset, budget_bytes=2**20), MappedBlocks)
    elsewhere = make_dataset("memory://mapped-or-not", [[10]])
    assert isinstance(open_blocks(elsewhere, budget_bytes=2**20), BlockCache)


def test_held_tokens_are_those_of_the_shard(dataset: Dataset) -> None:
    blocks = MappedBlocks(dataset.storage, dataset.segments)
    for shard in range(3):
        touch(blocks, shard)
        assert np.array_equal(np.frombuffer(blocks.tokens(shard), np.uint16), dataset.token_shard(shard)[0])


def test_each_block_is_checked_once(dataset: Dataset) -> None:
    blocks = MappedBlocks(dataset.storage, dataset.segments)
    touch(blocks, 1)
    touch(blocks, 1)
    count = len(blocks.layout.of_shard(1))
    assert (blocks.stats().fills, blocks.stats().hits) == (count, count)


def test_a_flipped_bit_is_found_when_its_block_is_touched_and_not_before(dataset: Dataset) -> None:
    path = shard_file(dataset, 1)
    data = bytearray(path.read_bytes())
    data[2 * BLOCK + 17] ^= 4
    path.write_bytes(data)
    blocks = MappedBlocks(dataset.storage, dataset.segments)
    first = blocks.layout.of_shard(1).start
    with blocks.hold(np.array([first, first + 1, first + 3])):
        pass
    with pytest.raises(CorruptError, match=rf"digest \(shard='shards/.*{path.name}', block=2, bytes='8192-12288'\)"):
        blocks.hold(np.array([first + 2])).__enter__()


@pytest.mark.parametrize("left", [0, 1, BLOCK + 100])
def test_a_shard_cut_short_is_named_with_the_first_block_that_is_gone(dataset: Dataset, left: int) -> None:
    path = shard_file(dataset, 1)
    os.truncate(path, left)
    blocks = MappedBlocks(dataset.storage, dataset.segments)
    with pytest.raises(CorruptError, match=rf"cut short \(shard='shards/.*{path.name}', block={left // BLOCK}, "):
        touch(blocks, 1)


def test_a_shard_that_is_gone_is_named(dataset: Dataset) -> None:
    path = shard_file(dataset, 2)
    path.unlink()
    with pytest.raises(MissingError, match=path.name):
        touch(MappedBlocks(dataset.storage, dataset.segments), 2)


def test_maps_hold_no_file_descriptors(dataset: Dataset) -> None:
    assert len(dataset.segments) == 3  # They are mapped, too, and there are few of them: each holds one.
    before = len(list(Path("/proc/self/fd").iterdir()))
    blocks = MappedBlocks(dataset.storage, dataset.segments)
    for shard in range(3):
        touch(blocks, shard)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_the_number_of_maps_is_bounded_and_a_dropped_map_is_checked_again(dataset: Dataset) -> None:
    blocks = MappedBlocks(dataset.storage, dataset.segments, max_maps=2)
    touch(blocks, 0)
    view = blocks.tokens(0)
    touch(blocks, 1)
    touch(blocks, 2)
    assert blocks.stats().evictions == 1
    assert np.array_equal(np.frombuffer(view, np.uint16), dataset.token_shard(0)[0])
    fills = blocks.stats().fills
    touch(blocks, 0)
    assert blocks.stats().fills == fills + len(blocks.layout.of_shard(0))


def test_a_remote_shard_cut_short_is_named(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", [[7_000]], block_bytes=BLOCK)
    os.truncate(shard_file(dataset, 0), BLOCK + 1)
    cache = BlockCache(dataset.storage, dataset.segments, budget_bytes=2**20)
    with pytest.raises(CorruptError, match=r"cut short \(shard='shards/.*', block=1, "):
        cache.hold(np.array([0, 1])).__enter__()


def test_a_prefetch_of_a_damaged_block_is_silent_and_its_use_is_not(dataset: Dataset) -> None:
    os.truncate(shard_file(dataset, 0), 0)
    blocks = MappedBlocks(dataset.storage, dataset.segments)
    with pytest.raises(DatastoreError):
        blocks.fetch(0)
    assert blocks.absent(np.array([0])).size == 1
