"""Tables of deleted rows: what is deleted, and damage to what says so."""

import uuid

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.dataset.durability.verify import verify
from datastore.dataset.operations.append import with_shards
from datastore.dataset.operations.transaction import draft_commit, publish
from datastore.dataset.shards.deletions import (
    DELETIONS_SCHEMA,
    Deletions,
    decode_deletions,
    encode_deletions,
    load_deletions,
    store_deletions,
)
from datastore.dataset.snapshot import open_dataset
from datastore.errors import CorruptError
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import make_dataset

UIDS = [f"{number:032x}" for number in (3, 500, 2**127)]
tables = st.lists(st.dictionaries(st.sampled_from(UIDS), st.sets(st.integers(0, 50), min_size=1)), max_size=4)


def rows_of(table: dict[str, set[int]]) -> dict[str, "np.typing.NDArray[np.int32]"]:
    return {uid: np.array(sorted(rows), np.int32) for uid, rows in table.items()}


LENGTHS = np.array([0 if row % 5 == 3 else row % 3 + 1 for row in range(51)])
"""Tokens of the rows of each shard; some rows are empty."""


def encoded(table: dict[str, set[int]]) -> bytes:
    return encode_deletions(rows_of(table), lengths=dict.fromkeys(table, LENGTHS))


@given(tables)
def test_what_is_deleted_is_the_union_of_all_tables(given_tables: list[dict[str, set[int]]]) -> None:
    deletions = Deletions([decode_deletions(encoded(table), where="here") for table in given_tables])
    for uid in UIDS:
        expected = set().union(*(table.get(uid, set()) for table in given_tables))
        assert deletions.rows(uid).tolist() == sorted(expected)
        assert (uid in deletions.uids) == bool(expected)
    assert deletions.tokens == sum(
        LENGTHS[list(rows)].sum() for table in given_tables for rows in table.values() if rows
    )
    assert bool(deletions) == any(given_tables)


@given(tables)
def test_stretches_of_tokens_are_those_of_the_deleted_rows_and_never_touch(
    given_tables: list[dict[str, set[int]]],
) -> None:
    deletions = Deletions([decode_deletions(encoded(table), where="here") for table in given_tables])
    row_of_token = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
    for uid in UIDS:
        spans = deletions.spans(uid)
        inside = np.zeros(len(row_of_token), np.bool_)
        for start, stop in spans.tolist():
            assert start < stop
            inside[start:stop] = True
        assert (spans[1:, 0] > spans[:-1, 1]).all()
        assert np.array_equal(inside, np.isin(row_of_token, deletions.rows(uid)))


@pytest.mark.parametrize(("spans", "tokens"), [([0], 0), ([3, 1], -2), ([0, 2, 2, 3], 3), ([0, 2], 3)], ids=str)
def test_stretches_that_do_not_ascend_or_add_up_are_damage(spans: list[int], tokens: int) -> None:
    batch = pa.record_batch([[bytes(16)] * 2, [[7], [8]], [1, tokens], [[5, 6], spans]], schema=DELETIONS_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, DELETIONS_SCHEMA) as file:
        file.write_batch(batch)
    with pytest.raises(CorruptError, match="stretches of tokens do not ascend or add up"):
        decode_deletions(sink.getvalue(), where="here")


@pytest.mark.parametrize("rows", [[3, 2], [2, 2], [-1], [0, None]], ids=str)
def test_row_numbers_that_do_not_ascend_are_damage(rows: list[int | None]) -> None:
    schema = pa.schema([pa.field(f.name, f.type) for f in DELETIONS_SCHEMA]) if None in rows else DELETIONS_SCHEMA
    batch = pa.record_batch([[bytes(16)] * 2, [[7], rows], [0, 0], [[], []]], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as file:
        file.write_batch(batch)
    with pytest.raises(CorruptError, match="not a table of deletions"):
        decode_deletions(sink.getvalue(), where="here")


@pytest.fixture
def storage() -> Storage:
    return MemoryStorage(uuid.uuid4().hex)


def delete(storage: Storage, shard: int, rows: list[int]) -> None:
    """Delete by hand, as `datastore.dataset.operations.delete` does it."""
    dataset = open_dataset(storage)
    uid = dataset.segments.shard(shard).uid
    lengths = {uid: dataset.documents(shard).column("tokens").to_numpy()} if dataset.kind == "tokens" else {}
    ref = store_deletions(storage, {uid: np.array(rows, np.int32)}, lengths=lengths)
    publish(
        storage,
        dataset.info,
        lambda newest: with_shards(
            storage,
            msgspec.structs.replace(
                draft_commit("delete", parent=newest), deletions=(*newest.deletions, ref), features=("deletions",)
            ),
            kept=newest.segments,
            shards=(),
        ),
    )


def test_deleted_documents_are_no_longer_live_but_still_in_the_old_version(storage: Storage) -> None:
    before = make_dataset(storage, [[3, 4, 5], [6]])
    delete(storage, 0, [1])
    after = open_dataset(storage)
    assert after.live_documents(0).column("tokens").to_pylist() == [3, 5]
    assert after.live_documents(1).equals(before.documents(1))
    assert after.documents(0).equals(before.documents(0))
    assert not open_dataset(storage, version=1).deletions
    assert (after.totals.deleted_documents, after.totals.deleted_tokens) == (1, 4)
    assert verify(after).ok


def test_an_append_keeps_what_is_deleted_and_an_overwrite_does_not(storage: Storage) -> None:
    make_dataset(storage, [[3, 4, 5], [6]])
    delete(storage, 1, [0])
    assert make_dataset(storage, [[8]], name="more").totals.deleted_tokens == 6


def test_deleted_records_are_not_read(storage: Storage) -> None:
    with record_writer(storage) as out:
        out.write([{"x": number} for number in range(4)])
    delete(storage, 0, [0, 2])
    assert [row["x"] for row in open_dataset(storage).iter_records()] == [1, 3]
    assert open_dataset(storage).to_arrow().column("x").to_pylist() == [1, 3]
    with record_writer(storage, operation="overwrite") as out:
        out.write([{"x": 7}])
    assert not open_dataset(storage).deletions


def test_a_table_that_is_not_what_the_commit_says_is_damage(storage: Storage) -> None:
    make_dataset(storage, [[3, 4, 5]])
    delete(storage, 0, [1])
    commit = open_dataset(storage).commit
    wrong = msgspec.structs.replace(commit.deletions[0], documents=2)
    with pytest.raises(CorruptError, match="another number of rows"):
        load_deletions(storage, msgspec.structs.replace(commit, deletions=(wrong,)))
