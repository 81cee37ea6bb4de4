"""Whatever happens to the bytes of a dataset is found or is harmless: bits flipped, files cut, grown, swapped, gone.

Every kind of file is damaged. `found` means that opening or verifying some version raises or reports it by name;
harmless files are those that no reader depends on, and reading everything proves it. Nothing ever crashes or hangs,
and no reader is handed wrong data.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.durability.parity import protect
from datastore.dataset.durability.verify import verify
from datastore.dataset.log.keys import HINT_KEY, commit_key
from datastore.dataset.log.tags import read_tag, set_tag
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.evolve import evolve
from datastore.dataset.shards.files import put_tokenizer, read_token_table, write_token_shard
from datastore.dataset.shards.segment_file import BLOCK_BYTES
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.document import seal
from datastore.errors import CorruptError, FormatError, MissingError
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import documents_of, make_shard

HARMLESS = {"README.md", HINT_KEY}
REFUSALS = (CorruptError, MissingError, FormatError)


@dataclass(frozen=True)
class Sample:
    """A dataset and what it holds: digest of all that can be read, per version and tag."""

    storage: MemoryStorage
    versions: int
    tags: tuple[str, ...]
    truth: dict[object, str]

    def files(self) -> list[str]:
        return [stat.key for stat in self.storage.list()]


def content(dataset: Dataset) -> str:
    """Return the digest of everything that a reader of `dataset` can be handed."""
    state = hashlib.sha256(dataset.tokenizer() or b"none")
    state.update(dataset.uuid.encode())
    for index in range(len(dataset.segments)):
        if dataset.kind == "records":
            state.update(repr(dataset.record_shard(index).to_pylist()).encode())
            state.update(repr(dataset.read_batch(index, 0).to_pylist()).encode())
            continue
        table = read_token_table(dataset.storage, dataset.segments.shard(index))
        state.update(b"".join(each.tobytes() for each in (table.values, table.offsets, *table.columns.values())))
        state.update(repr(dataset.documents(index).to_pylist()).encode())
        state.update(dataset.deletions.rows(dataset.segments.shard(index).uid).tobytes())
    return state.hexdigest()


def sample_of(storage: MemoryStorage, versions: int, tags: tuple[str, ...]) -> Sample:
    truth: dict[object, str] = {
        version: content(open_dataset(storage, version=version)) for version in range(1, versions + 1)
    }
    truth |= {tag: content(open_dataset(storage, tag=tag)) for tag in tags}
    return Sample(storage, versions, tags, truth)


@cache
def tokens() -> Sample:
    storage = MemoryStorage("damage-tokens")
    tokenizer = put_tokenizer(storage, b'{"model": "tiny"}', vocab_size=300, end_of_text=0)
    for number, operation in enumerate(("append", "append", "overwrite", "append")):
        shards = [make_shard(storage, f"{number}{index}" * 16, lengths=[3, 0, 40]) for index in range(2)]
        commit_shards(storage, shards, tokenizer=tokenizer, operation=operation)  # type: ignore[arg-type]
    set_tag(storage, "first", open_dataset(storage, version=1).commit)
    set_tag(storage, "last", open_dataset(storage).commit)
    return sample_of(storage, 4, ("first", "last"))


@cache
def changed() -> Sample:
    """Shards with a column of their own, of which documents are deleted, and parity."""
    storage = MemoryStorage("damage-changed")
    tokenizer = put_tokenizer(storage, b'{"model": "tiny"}', vocab_size=2**16, end_of_text=0)
    for number in range(2):
        uid, lengths = f"{number}" * 32, [3, 0, 40]
        values = np.arange(sum(lengths), dtype=np.uint16)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        columns: dict[str, npt.NDArray[Any]] = {
            "loss_mask": np.ones(values.size, np.uint8),
            "logits": np.ones((values.size, 2), np.float16),
        }
        documents = documents_of(uid, lengths)
        shard = write_token_shard(
            storage, uid=uid, values=values, offsets=offsets, documents=documents, columns=columns
        )
        commit_shards(storage, [shard], tokenizer=tokenizer)
    delete(storage, ids=[f"{'0' * 8}-2"])
    delete(storage, ids=[f"{'1' * 8}-0"])
    protect(storage, width=2)
    return sample_of(storage, 5, ())


@cache
def records() -> Sample:
    storage = MemoryStorage("damage-records")
    for kind in ("arrow", "parquet"):
        with record_writer(storage, schema=pa.schema({"text": pa.string(), "n": pa.int64()}), format=kind) as out:  # type: ignore[arg-type]
            out.write({"text": f"row {kind} {index}", "n": index} for index in range(100))
    evolve(storage, rename={"n": "number"}, add={"new": "int8"}, defaults={"new": 1})
    set_tag(storage, "first", open_dataset(storage, version=1).commit)
    return sample_of(storage, 3, ("first",))


def complaints(sample: Sample) -> list[str]:
    """Return what opening, reading and verifying every version and tag complains about; check what is handed out."""
    found = []
    for reference in (*range(1, sample.versions + 1), *sample.tags, None):
        try:
            if isinstance(reference, str):
                dataset = open_dataset(sample.storage, tag=reference)
            else:
                dataset = open_dataset(sample.storage, version=reference)
        except REFUSALS as error:
            found.append(str(error))
            continue
        try:
            assert content(dataset) == sample.truth[reference or sample.versions]
        except REFUSALS as error:
            found.append(str(error))
        found += [f"{bad.path} {bad.reason}" for bad in verify(dataset).bad]
    return found


def check(sample: Sample, key: str, damaged: bytes | None) -> None:
    """Put `damaged` in place of `key` (None: remove it), and check that it is found, or harmless."""
    original = sample.storage.get(key)
    if damaged == original:
        return
    try:
        if damaged is None:
            sample.storage.delete(key)
        else:
            sample.storage.put(key, damaged)
        found = complaints(sample)
    finally:
        sample.storage.put(key, original)
    if key in HARMLESS:
        assert found == []
    else:
        # A tag is known by its name.
        name = key.removeprefix("refs/tags/").removesuffix(".json")
        assert any(key in complaint or f"tag={name!r}" in complaint for complaint in found), (key, found)


# The first example makes the sample; a deadline would take that for slowness.
thorough = settings(deadline=None, max_examples=100)
SAMPLES = [tokens, changed, records]
samples = st.sampled_from(SAMPLES)


@thorough
@given(samples, st.data())
def test_a_flipped_bit_is_found_or_harmless(make: Callable[[], Sample], data: st.DataObject) -> None:
    sample = make()
    key = data.draw(st.sampled_from(sample.files()), label="file")
    raw = bytearray(sample.storage.get(key))
    bit = data.draw(st.integers(0, 8 * len(raw) - 1), label="bit")
    raw[bit // 8] ^= 1 << bit % 8
    check(sample, key, bytes(raw))


@thorough
@given(samples, st.data())
def test_a_cut_file_is_found_or_harmless(make: Callable[[], Sample], data: st.DataObject) -> None:
    sample = make()
    key = data.draw(st.sampled_from(sample.files()), label="file")
    raw = sample.storage.get(key)
    check(sample, key, raw[: data.draw(st.integers(0, len(raw) - 1), label="bytes kept")])


@thorough
@given(samples, st.data())
def test_a_file_with_bytes_added_is_found_or_harmless(make: Callable[[], Sample], data: st.DataObject) -> None:
    sample = make()
    key = data.draw(st.sampled_from(sample.files()), label="file")
    raw = sample.storage.get(key)
    more = data.draw(st.binary(min_size=1, max_size=100), label="added")
    check(sample, key, raw + more if data.draw(st.booleans()) else more + raw)


@thorough
@given(samples, st.data())
def test_a_file_in_another_s_place_is_found_or_harmless(make: Callable[[], Sample], data: st.DataObject) -> None:
    sample = make()
    key, other = (data.draw(st.sampled_from(sample.files()), label=label) for label in ("file", "its new content"))
    check(sample, key, sample.storage.get(other))


@pytest.mark.parametrize("make", SAMPLES)
def test_every_file_that_is_gone_is_found_or_harmless(make: Callable[[], Sample]) -> None:
    sample = make()
    for key in sample.files():
        check(sample, key, None)


@pytest.mark.parametrize("make", SAMPLES)
def test_an_undamaged_dataset_gets_no_complaint(make: Callable[[], Sample]) -> None:
    assert complaints(make()) == []


def test_the_bad_block_of_a_large_shard_is_named() -> None:
    storage = MemoryStorage("damage-blocks")
    commit_shards(storage, [make_shard(storage, "a" * 32, lengths=[5 * BLOCK_BYTES // 4] * 2)])
    dataset = open_dataset(storage)
    shard = dataset.segments.shard(0)
    raw = bytearray(storage.get(shard.path))
    raw[BLOCK_BYTES + 5] ^= 1
    raw[-1] ^= 1
    storage.put(shard.path, bytes(raw))
    bad = verify(dataset).bad
    assert [(found.path, found.block) for found in bad] == [(shard.path, 1), (shard.path, len(raw) // BLOCK_BYTES)]


def test_a_tag_that_names_a_replaced_version_is_found() -> None:
    sample = tokens()
    tag = sample.storage.get("refs/tags/first.json")
    stale = msgspec.structs.replace(read_tag(sample.storage, "first"), commit_sha256="0" * 64)
    sample.storage.put("refs/tags/first.json", seal(stale))
    try:
        bad = verify(open_dataset(sample.storage)).bad
    finally:
        sample.storage.put("refs/tags/first.json", tag)
    assert [(found.path, found.reason) for found in bad] == [
        ("refs/tags/first.json", "the version is not the one that was tagged")
    ]


def test_a_gap_in_the_log_is_found_from_any_version_before_it() -> None:
    sample = tokens()
    raw = sample.storage.get(commit_key(3))
    sample.storage.delete(commit_key(3))
    try:
        bad = verify(open_dataset(sample.storage, version=1)).bad
    finally:
        sample.storage.put(commit_key(3), raw)
    assert [found.path for found in bad] == [commit_key(3)]


def test_sums_that_do_not_add_up_are_found() -> None:
    sample = tokens()
    commit = open_dataset(sample.storage).commit
    forged = msgspec.structs.replace(commit, totals=msgspec.structs.replace(commit.totals, tokens=1))
    dataset = Dataset(sample.storage, info=open_dataset(sample.storage).info, commit=forged)
    assert any("totals" in found.reason for found in verify(dataset).bad)
