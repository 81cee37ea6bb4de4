"""What changed between two versions, in counts and document by document."""

import uuid
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.diff import Changes, diff
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.delete import delete
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset, make_shard


@pytest.fixture
def storage() -> MemoryStorage:
    return MemoryStorage(uuid.uuid4().hex)


def ids(dataset: Dataset) -> Counter[str]:
    """Return how often each id is in `dataset`, found the long way."""
    found: Counter[str] = Counter()
    for index in range(len(dataset.segments)):
        found.update(dataset.live_documents(index)["id"].to_pylist())
    return found


def tokens(dataset: Dataset) -> int:
    tables = [dataset.live_documents(index) for index in range(len(dataset.segments))]
    return sum(sum(table["tokens"].to_pylist()) for table in tables)


def listed(before: Dataset, after: Dataset, sign: str) -> Counter[str]:
    return Counter(change.row["id"] for change in diff(before, after).documents() if change.sign == sign)


def test_an_append_added_what_it_appended(storage: MemoryStorage) -> None:
    old = make_dataset(storage, [[3, 4], [5]])
    new = make_dataset(storage, [[1, 1, 1]], name="more")
    found = diff(old, new)
    assert (found.added, found.removed) == (Changes(1, 3, 3), Changes(0, 0, 0))
    assert found.exact
    rows = [change.row for change in found.documents()]
    assert [row["tokens"] for row in rows] == [1, 1, 1]
    assert set(rows[0]) == {"id", "source", "offset", "length", "tokens"}
    back = diff(new, old)
    assert (back.added, back.removed) == (found.removed, found.added)


def test_a_version_does_not_differ_from_itself(storage: MemoryStorage) -> None:
    made = make_dataset(storage, [[3, 4], [5]])
    found = diff(made, f"{storage.url}@1")
    assert (found.added, found.removed, found.rewritten) == (Changes(0, 0, 0), Changes(0, 0, 0), 0)
    assert list(found.documents()) == []


def test_a_delete_removed_what_it_deleted_and_looking_back_it_is_added(storage: MemoryStorage) -> None:
    old = make_dataset(storage, [[3, 4, 5], [6]])
    gone = old.documents(0)["id"].to_pylist()[1]
    delete(storage, ids=[gone])
    new = open_dataset(storage)
    assert diff(old, new).removed == Changes(0, 1, 4)
    assert diff(new, old).added == Changes(0, 1, 4)
    assert listed(old, new, "-") == {gone: 1}
    assert listed(new, old, "+") == {gone: 1}


def test_only_segments_that_differ_are_read(storage: MemoryStorage) -> None:
    for number in range(40):
        make_dataset(storage, [[3]] * 5, name=f"many-{number}")
    old = open_dataset(storage)
    new = make_dataset(storage, [[1]], name="more")
    shared = {ref.digest for ref in old.commit.segments} & {ref.digest for ref in new.commit.segments}
    assert shared
    for digest in shared:
        storage.delete(f"_segments/{digest}.arrow")
    assert diff(old, new).added == Changes(1, 1, 1)


def test_a_document_in_another_shard_is_no_change(storage: MemoryStorage) -> None:
    old = make_dataset(storage, [[3, 4], [5]])
    fresh = make_shard(storage, old.segments.shard(0).uid, lengths=[3, 4])
    moved = make_shard(storage, uuid.uuid4().hex, lengths=[8])
    # The same documents under another uid, as compact writes them.
    copied = storage.get(fresh.docs_path)
    twin = msgspec.structs.replace(fresh, uid=uuid.uuid4().hex)
    storage.put(twin.docs_path, copied)
    commit_shards(storage, [twin, moved], operation="overwrite")
    new = open_dataset(storage)
    found = diff(old, new)
    assert (found.added, found.removed) == (Changes(2, 3, 15), Changes(2, 3, 12))
    assert not found.exact
    assert listed(old, new, "+") == ids(new) - ids(old)
    assert listed(old, new, "-") == ids(old) - ids(new)


def test_records_are_listed_themselves(storage: MemoryStorage) -> None:
    with record_writer(storage) as out:
        out.write([{"text": "a"}, {"text": "b"}])
    with record_writer(storage) as out:
        out.write([{"text": "c"}])
    found = diff(f"{storage.url}@1", storage)
    assert found.added == Changes(1, 1, 0)
    assert [(change.sign, change.row) for change in found.documents()] == [("+", {"text": "c"})]


@settings(max_examples=30)
@given(data=st.data())
def test_the_counts_and_the_list_are_what_comparing_every_document_gives(data: st.DataObject) -> None:
    storage = MemoryStorage(uuid.uuid4().hex)
    versions = [make_dataset(storage, [[3, 1, 2], [4, 4]])]
    for step in data.draw(st.lists(st.sampled_from(["append", "overwrite", "delete", "delete"]), max_size=6)):
        newest = versions[-1]
        if step == "delete":
            some = data.draw(st.lists(st.sampled_from(sorted(ids(newest)) or ["none"]), max_size=3))
            delete(storage, ids=some, allow_missing=True)
        else:
            lengths = data.draw(st.lists(st.integers(1, 5), max_size=3))
            shard = make_shard(storage, uuid.uuid4().hex, lengths=lengths)
            keep = list(newest.segments)[:1] if step == "overwrite" and data.draw(st.booleans()) else []
            commit_shards(storage, [*keep, shard], operation="overwrite" if step == "overwrite" else "append")
        versions.append(open_dataset(storage))
    old = data.draw(st.sampled_from(versions))
    new = data.draw(st.sampled_from(versions))
    found = diff(old, new)
    assert found.added.documents == (ids(new) - ids(old)).total()
    assert found.removed.documents == (ids(old) - ids(new)).total()
    assert found.added.tokens - found.removed.tokens == tokens(new) - tokens(old)
    assert listed(old, new, "+") == ids(new) - ids(old)
    assert listed(old, new, "-") == ids(old) - ids(new)
    listed_tokens = sum(change.row["tokens"] for change in found.documents() if change.sign == "+")
    assert listed_tokens == found.added.tokens
