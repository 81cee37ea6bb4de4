"""Compacting: the same documents in the same order, in fewer shards, without what is deleted; a new generation."""

import subprocess
import sys
import tracemalloc
import uuid
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.durability.verify import verify
from datastore.dataset.log.keys import commit_key
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.compact import Candidate, compact, group_members
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.shards.files import read_token_table, shard_uid, write_token_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, ConflictError
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import documents_of, make_dataset, make_shard


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return LocalStorage(tmp_path / "set") if request.param == "local" else MemoryStorage(uuid.uuid4().hex)


def appended(storage: Storage, *shards: list[int], dtype: str = "uint16") -> Dataset:
    """Append each shard in a commit of its own."""
    for lengths in shards:
        made = make_dataset(storage, [lengths], name=uuid.uuid4().hex, dtype=dtype)
    return made


def live(dataset: Dataset) -> list[tuple[dict, list[int]]]:
    """All documents that are not deleted, each with its tokens."""
    found = []
    for index in range(len(dataset.segments)):
        values, offsets = dataset.token_shard(index)
        rows = dataset.documents(index).to_pylist()
        mask = dataset.live_rows(index)
        for row, (start, stop) in enumerate(pairwise(offsets)):
            if mask is None or mask[row]:
                found.append((rows[row], values[start:stop].tolist()))
    return found


def test_small_shards_become_one_and_every_document_is_what_it_was(storage: Storage) -> None:
    before = appended(storage, [3, 4], [5], [0, 6, 7])
    report = compact(storage)
    after = open_dataset(storage)
    assert (report.shards_before, report.shards_after, report.merged) == (3, 1, 3)
    assert (report.committed, report.version, after.commit.operation) == (True, 4, "compact")
    assert live(after) == live(before)
    assert (after.totals.documents, after.totals.tokens, after.totals.shards) == (6, 25, 1)
    assert {shard.uid for shard in after.segments}.isdisjoint(shard.uid for shard in before.segments)
    assert verify(after).ok
    assert live(open_dataset(storage, version=3)) == live(before)


def test_deleted_documents_are_dropped_and_no_longer_listed(storage: Storage) -> None:
    before = appended(storage, [3, 4], [5], [6, 7])
    delete(storage, where="tokens IN (4, 5)")
    deleted = open_dataset(storage)
    report = compact(storage)
    after = open_dataset(storage)
    assert (report.dropped_documents, report.dropped_tokens) == (2, 9)
    assert live(after) == live(deleted)
    assert (after.totals.documents, after.totals.deleted_documents, after.commit.deletions) == (3, 0, ())
    assert "deletions" not in after.commit.features
    assert live(open_dataset(storage, version=3)) == live(before)
    assert verify(after).ok


def test_with_nothing_to_gain_nothing_is_done(storage: Storage) -> None:
    appended(storage, [3, 4], [5])
    assert compact(storage).committed
    keys = [stat.key for stat in storage.list()]
    again = compact(storage)
    assert (again.committed, again.merged, again.version, again.written_bytes) == (False, 0, 3, 0)
    assert [stat.key for stat in storage.list()] == keys


def test_a_dry_run_says_what_it_would_do(storage: Storage) -> None:
    appended(storage, [3, 4], [5])
    report = compact(storage, dry_run=True)
    assert (report.committed, report.shards_after, report.merged, report.version) == (False, 1, 2, 2)
    assert open_dataset(storage).version == 2


def test_full_shards_stay_and_only_neighbours_are_put_together(storage: Storage) -> None:
    before = appended(storage, [4], [5], [4000], [6], [7])
    full = before.segments.shard(2)
    compact(storage, target_bytes=4096)
    after = open_dataset(storage)
    assert [shard.documents for shard in after.segments] == [2, 1, 2]
    assert after.segments.shard(1) == full
    assert live(after) == live(before)


def test_a_large_shard_of_which_something_is_deleted_is_written_again(storage: Storage) -> None:
    appended(storage, [4000, 9], [4000])
    delete(storage, where="tokens = 9")
    report = compact(storage, target_bytes=4096)
    assert (report.merged, report.shards_after, report.dropped_documents) == (1, 2, 1)
    assert verify(open_dataset(storage)).ok


def test_shards_of_which_everything_is_deleted_go(storage: Storage) -> None:
    appended(storage, [4], [4000], [5], [6])
    delete(storage, where="tokens < 10")
    report = compact(storage, target_bytes=4096)
    after = open_dataset(storage)
    assert (report.shards_after, after.totals.shards, after.totals.documents) == (1, 1, 1)
    delete(storage, where="true")
    assert compact(storage).shards_after == 0
    assert open_dataset(storage).totals.documents == 0
    assert verify(open_dataset(storage)).ok


def test_shards_of_other_token_types_are_not_put_together(storage: Storage) -> None:
    appended(storage, [4], [5])
    before = appended(storage, [6], [7], dtype="uint32")
    report = compact(storage)
    assert report.shards_after == 2
    assert live(open_dataset(storage)) == live(before)
    assert [shard.dtype for shard in open_dataset(storage).segments] == ["uint16", "uint32"]


def test_the_same_members_make_the_same_shard(storage: Storage) -> None:
    appended(storage, [3, 4], [5])
    delete(storage, where="tokens = 4")
    deleted = open_dataset(storage)
    compact(storage)
    once = list(open_dataset(storage).segments)
    other = MemoryStorage(uuid.uuid4().hex)
    for stat in storage.list():
        if not stat.key.startswith("_log/") or stat.key <= commit_key(deleted.version):
            other.put(stat.key, storage.get(stat.key))
    compact(Dataset(other, info=deleted.info, commit=deleted.commit))
    assert list(open_dataset(other).segments) == once


def test_columns_beside_the_tokens_go_with_them() -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    shards = list[ShardInfo]()
    for index, lengths in enumerate(([2, 3], [1, 4])):
        total = sum(lengths)
        values = np.arange(total, dtype=np.uint16)
        shards.append(
            write_token_shard(
                storage,
                uid=shard_uid("columns", index),
                values=values,
                offsets=np.cumsum([0, *lengths]),
                documents=documents_of(f"{index}" * 32, lengths),
                columns={
                    "loss_mask": (values % 2).astype(np.uint8),
                    "logits": np.stack([values, values * 2], axis=1).astype(np.float32),
                },
            )
        )
    commit_shards(storage, shards)
    delete(storage, where="tokens = 3")
    compact(storage)
    after = open_dataset(storage)
    table = read_token_table(storage, after.segments.shard(0))
    assert table.values.tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert table.columns["loss_mask"].tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert table.columns["logits"].tolist() == [[v, 2 * v] for v in table.values.tolist()]
    delete(storage, where="tokens = 4")
    purge(storage)
    blank = read_token_table(storage, open_dataset(storage).segments.shard(0))
    assert blank.values.tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert blank.columns["loss_mask"].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert blank.columns["logits"][3:].tolist() == [[0, 0]] * 4
    assert verify(open_dataset(storage)).ok


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_records_are_compacted_in_their_format(storage: Storage, form: str) -> None:
    for part in range(3):
        with record_writer(storage, format=form) as out:  # type: ignore[arg-type]
            out.write([{"id": f"{part}-{n}", "text": "x" * n} for n in range(3)])
    delete(storage, ids=["1-1"])
    rows = list(open_dataset(storage).iter_records())
    report = compact(storage)
    after = open_dataset(storage)
    assert (report.shards_after, report.dropped_documents) == (1, 1)
    assert list(after.iter_records()) == rows
    assert after.segments.shard(0).layout.format == form
    assert verify(after).ok


def test_records_of_other_formats_are_not_put_together(storage: Storage) -> None:
    for form in ("arrow", "parquet", "parquet"):
        with record_writer(storage, format=form) as out:  # type: ignore[arg-type]
            out.write({"text": form})
    compact(storage)
    dataset = open_dataset(storage)
    assert [(shard.layout.format, shard.documents) for shard in dataset.segments] == [("arrow", 1), ("parquet", 2)]


def test_an_append_that_comes_between_is_kept(storage: Storage) -> None:
    before = appended(storage, [3, 4], [5])
    appended(storage, [6])
    compact(before)
    after = open_dataset(storage)
    assert [shard.documents for shard in after.segments] == [3, 1]
    assert verify(after).ok


@pytest.mark.parametrize("between", ["delete", "purge", "compact", "overwrite"])
def test_another_change_of_the_same_shards_is_a_conflict(storage: Storage, between: str) -> None:
    before = appended(storage, [3, 4], [5])
    if between == "compact":
        compact(storage)
    elif between == "overwrite":
        commit_shards(storage, [], operation="overwrite")
    else:
        delete(storage, where="tokens = 5")
    if between == "purge":
        purge(storage)
    newest = open_dataset(storage).commit
    keys = [stat.key for stat in storage.list()]
    with pytest.raises(ConflictError, match="Give the same compact again"):
        compact(before)
    assert open_dataset(storage).commit == newest
    assert [stat.key for stat in storage.list()] == keys


def test_a_delete_of_another_shard_merges(storage: Storage) -> None:
    before = appended(storage, [3, 4], [5], [4000])
    delete(storage, where="tokens = 4000")
    compact(before, target_bytes=4096)
    after = open_dataset(storage)
    assert (after.totals.documents, after.totals.deleted_documents) == (4, 1)
    assert [size for row, _ in live(after) for size in [row["tokens"]]] == [3, 4, 5]


def test_many_segments_are_changed_each_in_its_place(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.dataset.shards.segment_changes.MAX_SEGMENT_SHARDS", 3)
    lengths = [[4], [5], [4000], [6], [7], [5000], [6000], [7000], [8000], [8], [9]]
    commit_shards(storage, [make_shard(storage, shard_uid("m", i), lengths=each) for i, each in enumerate(lengths)])
    before = open_dataset(storage)
    assert len(before.commit.segments) == 4
    compact(storage, target_bytes=4096)
    after = open_dataset(storage)
    assert [shard.documents for shard in after.segments] == [2, 1, 2, 1, 1, 1, 1, 2]
    assert before.commit.segments[2] in after.commit.segments
    assert max(ref.shards for ref in after.commit.segments) <= 3
    assert live(after) == live(before)
    assert verify(after).ok


@pytest.mark.parametrize("target_bytes", [0, -1, 2**30 + 1])
def test_a_size_out_of_range_is_refused(storage: Storage, target_bytes: int) -> None:
    appended(storage, [1])
    with pytest.raises(ConfigError, match="not a size for shards"):
        compact(storage, target_bytes=target_bytes)


members = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 100), st.booleans(), st.sampled_from(["a", "b"])), max_size=30
)


@given(members, st.integers(1, 200))
def test_groups_are_runs_of_neighbours_of_a_kind_within_the_target(drawn: list[tuple], target: int) -> None:
    given_members, index = [], 0
    for step, size, deleted, kind in drawn:
        index += step
        given_members.append(Candidate(index, size, deleted, kind))
    groups = list(group_members(given_members, target_bytes=target))
    assert [m for group in groups for m in group] == [m for m in given_members if any(m in g for g in groups)]
    for group in groups:
        assert [m.index for m in group] == list(range(group[0].index, group[0].index + len(group)))
        assert len({m.kind for m in group}) == 1
        assert len(group) == 1 or sum(m.live_bytes for m in group) <= target
        assert len(group) > 1 or group[0].deleted
    # Nothing with a deletion is left out, and no two that are left out would have gone together.
    rest = [m for m in given_members if not any(m in group for group in groups)]
    assert not any(m.deleted for m in rest)
    for one, other in pairwise(rest):
        neighbours = other.index == one.index + 1 and other.kind == one.kind
        assert not (neighbours and one.live_bytes + other.live_bytes <= target)


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=4), min_size=1, max_size=8), st.integers(300, 3000))
def test_compacting_what_was_compacted_gains_nothing(lengths: list[list[int]], target: int) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    before = make_dataset(storage, lengths)
    compact(storage, target_bytes=target)
    once = open_dataset(storage)
    assert live(once) == live(before)
    assert len(once.segments) <= len(before.segments)
    again = compact(storage, target_bytes=target)
    # What was estimated from its parts may turn out smaller, and fit together with a neighbour: once more at most.
    assert again.shards_after <= again.shards_before
    third = compact(storage, target_bytes=target)
    assert third.shards_after <= third.shards_before


def test_memory_is_that_of_one_new_shard_however_many_there_are(tmp_path: Path) -> None:
    target = 8 * 2**20
    storage = LocalStorage(tmp_path / "set")
    shards = [make_shard(storage, shard_uid("big", index), lengths=[2**19] * 2) for index in range(24)]
    commit_shards(storage, shards)
    tracemalloc.start()
    compact(storage, target_bytes=target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(open_dataset(storage).segments) == 8
    assert peak < 4 * target


def test_a_compact_that_gives_way_leaves_the_equal_file_of_an_older_version(storage: Storage) -> None:
    before = appended(storage, [3, 4], [5])
    compact(storage, target_bytes=10**6)
    made = open_dataset(storage)
    commit_shards(storage, [make_shard(storage, shard_uid("other", 0), lengths=[9])], operation="overwrite")
    with pytest.raises(ConflictError, match="changed meanwhile"):
        compact(before, target_bytes=10**6)
    assert live(open_dataset(storage, version=made.version)) == live(before)


LABEL = pa.dictionary(pa.int8(), pa.string())


def labelled(storage: Storage, *firsts: int, format: str = "arrow") -> list[str]:  # noqa: A002
    """Append a shard of a hundred labels for each of `firsts`; return all labels."""
    found = []
    for first in firsts:
        labels = [f"label {number}" for number in range(first, first + 100)]
        with record_writer(storage, schema=pa.schema([("label", LABEL)]), format=format) as out:  # type: ignore[arg-type]
            out.write(pa.table({"label": pa.array(labels).dictionary_encode().cast(LABEL)}))
        found += labels
    return found


@pytest.mark.parametrize("format", ["arrow", "parquet"])
def test_neighbours_whose_categories_one_index_cannot_number_stay_apart(storage: Storage, format: str) -> None:  # noqa: A002
    labels = labelled(storage, 0, 20, 100, 110, 300, format=format)
    report = compact(storage)
    after = open_dataset(storage)
    assert after.to_arrow().column("label").to_pylist() == labels
    assert (report.shards_after, len(after.segments)) == ((3, 3) if format == "arrow" else (1, 1))
    assert verify(after, deep=True).ok
    again = compact(storage)
    assert (again.committed, again.written_bytes) == (False, 0)


def test_neighbours_of_which_no_two_go_together_are_left_as_they_are_without_a_file(storage: Storage) -> None:
    labelled(storage, 0, 100, 200)
    before = sorted(stat.key for stat in storage.list())
    assert not compact(storage).committed
    assert sorted(stat.key for stat in storage.list()) == before


def test_parquet_that_is_small_in_a_file_is_not_decoded_as_a_whole(tmp_path: Path) -> None:
    url, rows = str(tmp_path / "set"), pa.table({"text": ["x" * 100_000] * 1000})
    for _ in range(6):
        with record_writer(url, schema=rows.schema, format="parquet") as out:
            out.write(rows)
    program = COMPACTED.format(url=url)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    shards, peak = map(int, done.stdout.split())
    assert shards == 1
    assert peak < 300 * 2**20, peak  # Decoded as a whole, they are 600 MB.


COMPACTED = """
import pyarrow as pa
import datastore as ds
ds.compact({url!r})
print(len(ds.open({url!r}).segments), pa.default_memory_pool().max_memory())
"""
