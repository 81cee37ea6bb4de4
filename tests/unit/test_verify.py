"""What verify reports: each bad file and block by name, and nothing else."""

import uuid
from pathlib import Path

import msgspec
import pytest
from typing_extensions import Buffer, override

from datastore.document import seal
from datastore.errors import StorageError
from datastore.storage.base import Storage
from datastore.storage.local import LocalStorage
from datastore.storage.memory import MemoryStorage
from datastore.store.blocks import BadBlock, check_blocks
from datastore.store.dataset import Dataset, open_dataset
from datastore.store.manifest import INFO_KEY, commit_key, sum_refs
from datastore.store.segment import BLOCK_BYTES
from datastore.store.verify import verify
from datastore.testing.datasets import make_dataset


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "set") if request.param == "local" else MemoryStorage(uuid.uuid4().hex)


@pytest.fixture
def dataset(storage: Storage) -> Dataset:
    """One shard of three blocks, the last one short, and a small shard after it."""
    return make_dataset(storage, [[BLOCK_BYTES // 2, BLOCK_BYTES // 2 + 1000], [7]])


def bad(dataset: Dataset) -> list[tuple[str, int | None, str]]:
    return [(found.path, found.block, found.reason) for found in verify(dataset).bad]


def test_a_sound_dataset_is_reported_with_what_was_read(dataset: Dataset) -> None:
    calls: list[tuple[int, int]] = []
    report = verify(dataset, progress=lambda done, total: calls.append((done, total)))
    assert report.ok
    assert report.bytes == dataset.totals.size_bytes
    # datastore.json, one commit, one segment, two shards and their documents.
    assert report.files == 7
    assert calls[-1] == (dataset.totals.size_bytes, dataset.totals.size_bytes)
    assert calls == sorted(calls)


def test_each_flipped_block_is_named(dataset: Dataset) -> None:
    path = dataset.segments.shard(0).path
    raw = bytearray(dataset.storage.get(path))
    raw[0] ^= 1
    raw[2 * BLOCK_BYTES] ^= 128
    dataset.storage.put(path, raw)
    assert [(found.path, found.block) for found in verify(dataset).bad] == [(path, 0), (path, 2)]


def test_a_cut_shard_is_named_with_the_blocks_that_are_gone(dataset: Dataset) -> None:
    path = dataset.segments.shard(0).path
    raw = dataset.storage.get(path)
    dataset.storage.put(path, raw[: BLOCK_BYTES + 5])
    found = bad(dataset)
    assert found[0] == (path, None, f"the file has {BLOCK_BYTES + 5} bytes, not {len(raw)}")
    assert [(where, block) for where, block, _ in found[1:]] == [(path, 1), (path, 2)]


def test_bytes_after_the_end_are_named(dataset: Dataset) -> None:
    shard = dataset.segments.shard(1)
    for path, size in ((shard.path, shard.size_bytes), (shard.docs_path, shard.docs_bytes)):
        raw = dataset.storage.get(path)
        dataset.storage.put(path, raw, b"x")
        assert bad(dataset) == [(path, None, f"the file has {size + 1} bytes, not {size}")]
        dataset.storage.put(path, raw)


def test_missing_files_are_named_and_do_not_stop_the_reading(dataset: Dataset) -> None:
    first, second = dataset.segments
    dataset.storage.delete(first.path)
    dataset.storage.delete(second.docs_path)
    assert bad(dataset) == [
        (first.path, None, "the file is missing"),
        (second.docs_path, None, "the file is missing"),
    ]


def test_flipped_documents_are_named(dataset: Dataset) -> None:
    path = dataset.segments.shard(0).docs_path
    raw = bytearray(dataset.storage.get(path))
    raw[len(raw) // 2] ^= 1
    dataset.storage.put(path, raw)
    assert bad(dataset) == [(path, 0, "the bytes do not match their digest")]


def test_an_identity_that_changed_under_an_open_dataset_is_named(dataset: Dataset) -> None:
    other = msgspec.structs.replace(dataset.info, uuid="f" * 32)
    dataset.storage.put(INFO_KEY, seal(other))
    assert [(found.path, found.block) for found in verify(dataset).bad] == [(INFO_KEY, None)]


def test_shards_of_a_damaged_segment_cannot_be_looked_at_and_the_rest_is(storage: Storage) -> None:
    dataset = make_dataset(storage, [[1]] * 8, name="a")
    dataset = make_dataset(storage, [[1]], name="b")
    assert len(dataset.commit.segments) == 2
    key = f"_segments/{dataset.commit.segments[0].digest}.arrow"
    storage.put(key, b"damaged")
    report = verify(dataset)
    assert [found.path for found in report.bad] == [key]
    assert report.bytes == dataset.commit.segments[1].size_bytes


def test_a_sector_that_cannot_be_read_is_one_bad_block() -> None:
    class BadSector(MemoryStorage):
        @override
        def read_into(self, key: str, start: int, target: Buffer) -> None:
            if key.startswith("shards/") and start == BLOCK_BYTES:
                raise StorageError("input/output error", key=key)
            super().read_into(key, start, target)

    dataset = make_dataset(BadSector(uuid.uuid4().hex), [[2 * BLOCK_BYTES]])
    assert bad(dataset) == [(dataset.segments.shard(0).path, 1, "input/output error")]


def test_digests_that_cannot_belong_to_the_size_are_named() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    storage.put("file", b"ten bytes.")
    found = check_blocks(storage, "file", size_bytes=10, block_bytes=4, digests=bytes(32), buffer=bytearray(4))
    assert found == [BadBlock("file", None, "its digests do not match its size")]


def test_an_earlier_version_is_verified_without_the_later_one_s_shards(storage: Storage) -> None:
    make_dataset(storage, [[1]], name="a")
    later = make_dataset(storage, [[1]], name="b")
    storage.delete(later.segments.shard(1).path)
    assert verify(open_dataset(storage, version=1)).ok
    assert not verify(later).ok


@pytest.mark.parametrize("field", ["shards", "documents", "tokens", "size_bytes"])
def test_a_commit_that_contradicts_its_segment_is_found(dataset: Dataset, field: str) -> None:
    ref = dataset.commit.segments[0]
    refs = (msgspec.structs.replace(ref, **{field: getattr(ref, field) + 1}),)
    commit = msgspec.structs.replace(dataset.commit, segments=refs, totals=sum_refs(refs))
    dataset.storage.put(commit_key(1), seal(commit))
    found = verify(open_dataset(dataset.storage)).bad
    assert [bad.path for bad in found] == [f"_segments/{ref.digest}.arrow"]
