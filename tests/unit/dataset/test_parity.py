"""Parity groups: who is in which, what is in their files, and when they are made."""

import contextlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.dataset.durability.parity import (
    choose_groups,
    members_of,
    mix,
    protect,
    shares_roots,
    unprotected,
    write_group,
    xor_files,
)
from datastore.dataset.durability.verify import verify
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.roots import open_roots, place_dataset
from datastore.dataset.shards.files import put_tokenizer
from datastore.dataset.shards.parity_groups import (
    Group,
    Member,
    decode_groups,
    drop_parity,
    encode_groups,
    load_groups,
    parity_keys,
)
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import digest_bytes
from datastore.errors import ConfigError, ConflictError, CorruptError
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.testing.examples import make_dataset, make_shard


def member(name: str, size_bytes: int = 1) -> Member:
    return Member(f"shards/{name}", size_bytes, bytes(16))


def groups_of(dataset: Dataset) -> list[Group]:
    return [group for ref in dataset.commit.parity for group in load_groups(dataset.storage, ref)]


files = st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from("abcdef")), max_size=60)


@given(files, st.integers(1, 8), st.integers(1, 6))
def test_each_file_is_in_one_group_and_no_group_is_too_large(
    drawn: list[tuple[int, str]], width: int, roots: int
) -> None:
    placed = [
        (member(str(index), size), "abcdef"["abcdef".index(root) % roots]) for index, (size, root) in enumerate(drawn)
    ]
    groups = choose_groups(placed, width=width, roots=roots)
    assert sorted(m.path for group in groups for m in group) == sorted(m.path for m, _ in placed)
    assert all(1 <= len(group) <= width for group in groups)
    where = {m.path: root for m, root in placed}
    if width < roots:
        assert all(len({where[m.path] for m in group}) == len(group) for group in groups)
    else:
        assert len(groups) == -(-len(placed) // width)


@given(st.lists(st.binary(max_size=100), min_size=1, max_size=6), st.data())
def test_any_file_is_the_xor_of_all_the_others(contents: list[bytes], data: st.DataObject) -> None:
    storage = MemoryStorage("parity-xor")
    members = []
    for index, raw in enumerate(contents):
        storage.put(f"shards/{index}", raw)
        members.append(Member(f"shards/{index}", len(raw), digest_bytes(raw)))
    longest = max(map(len, contents))
    parity = Member("parity/x", longest, b"")
    raw = xor_files(storage, members, size_bytes=longest)
    storage.put(parity.path, raw.data)
    parity = Member("parity/x", longest, digest_bytes(raw.data))
    lost = data.draw(st.integers(0, len(contents) - 1))
    others = [m for index, m in enumerate(members) if index != lost]
    assert xor_files(storage, [*others, parity], size_bytes=longest)[: len(contents[lost])].tobytes() == contents[lost]


def test_what_is_made_from_damaged_bytes_is_refused() -> None:
    storage = MemoryStorage("parity-damaged")
    storage.put("shards/a", b"abc")
    with pytest.raises(CorruptError):
        write_group(storage, (Member("shards/a", 3, digest_bytes(b"abd")),))
    assert [stat.key for stat in storage.list("parity")] == []


def test_a_table_comes_back_as_it_was() -> None:
    groups = [
        Group(
            "parity/a", 3, b"d" * 16, b"e" * 16, (Member("shards/a", 3, b"a" * 16), Member("shards/b", 1, b"b" * 16))
        ),
        Group("parity/b", 1, b"f" * 16, b"g" * 16, (Member("docs/a", 1, b"c" * 16),)),
    ]
    assert decode_groups(pa.py_buffer(encode_groups(groups)), where="") == groups
    assert decode_groups(pa.py_buffer(encode_groups([])), where="") == []


@given(st.data())
def test_a_damaged_table_is_corrupt_and_nothing_worse(data: st.DataObject) -> None:
    raw = bytearray(encode_groups([Group("parity/a", 3, b"d" * 16, b"e" * 16, (Member("shards/a", 3, b"a" * 16),))]))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(CorruptError):
        decode_groups(pa.py_buffer(bytes(raw)), where="")


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> Storage:
    return MemoryStorage(f"parity-{request.node.name}")


def test_protect_covers_every_file_once_and_a_second_time_does_nothing(storage: Storage) -> None:
    made = make_dataset(storage, [[30, 5]] * 5)
    report = protect(storage, width=4)
    dataset = open_dataset(storage)
    assert report.committed
    assert dataset.commit.operation == "protect"
    assert dataset.commit.segments == made.commit.segments
    assert sorted(m.path for group in groups_of(dataset) for m in group.members) == sorted(
        m.path for m in members_of(dataset)
    )
    assert (report.groups, report.files, report.new_groups) == (4, 10, 4)
    assert unprotected(dataset, groups_of(dataset)) == []
    again = protect(storage, width=4)
    assert not again.committed
    assert (again.version, again.read_bytes, again.groups) == (dataset.version, 0, 4)


def test_what_is_appended_is_unprotected_until_the_next_protect_which_leaves_full_groups_alone(
    storage: Storage,
) -> None:
    make_dataset(storage, [[30, 5]] * 5, name="a")
    protect(storage, width=2)
    full = {group.path for group in groups_of(open_dataset(storage)) if len(group.members) == 2}
    make_dataset(storage, [[30, 5]], name="b")
    dataset = open_dataset(storage)
    assert len(unprotected(dataset, groups_of(dataset))) == 2
    report = protect(storage, width=2)
    dataset = open_dataset(storage)
    assert full <= {group.path for group in groups_of(dataset)}
    assert all(len(group.members) == 2 for group in groups_of(dataset))
    assert report.new_groups == 2
    assert unprotected(dataset, groups_of(dataset)) == []


def test_groups_of_what_left_the_version_go(storage: Storage) -> None:

    make_dataset(storage, [[30, 5]] * 4, name="a")
    protect(storage, width=2)
    dataset = open_dataset(storage)
    commit_shards(storage, list(dataset.segments)[:2], operation="overwrite")
    assert open_dataset(storage).commit.parity == ()
    protect(storage, width=2)
    assert sum(ref.files for ref in open_dataset(storage).commit.parity) == 4


def test_a_lost_table_is_made_again(storage: Storage, caplog: pytest.LogCaptureFixture) -> None:
    make_dataset(storage, [[30, 5]] * 4)
    protect(storage, width=2)
    key = next(iter(parity_keys(storage, open_dataset(storage).commit)))
    storage.put(key, b"damaged")
    assert protect(storage, width=2).committed
    assert "protected anew" in caplog.text
    assert verify(open_dataset(storage)).ok


def test_verify_reads_tables_and_parity_files(storage: Storage) -> None:
    make_dataset(storage, [[30, 5]] * 4)
    protect(storage, width=2)
    dataset = open_dataset(storage)
    for key in parity_keys(storage, dataset.commit):
        raw = storage.get(key)
        storage.put(key, raw[:-1] + bytes([raw[-1] ^ 1]))
        assert {bad.path for bad in verify(dataset).bad} == {key}
        storage.put(key, raw)
    assert verify(dataset).ok


def test_a_commit_between_keeps_the_groups_and_another_protect_is_a_conflict(storage: Storage) -> None:
    before = make_dataset(storage, [[30, 5]] * 2, name="a")
    make_dataset(storage, [[30, 5]] * 2, name="b")
    assert protect(before, width=2).version == 3
    assert open_dataset(storage).totals.shards == 4
    with pytest.raises(ConflictError, match="changed meanwhile"):
        protect(before, width=2)
    assert verify(open_dataset(storage)).ok


def test_purged_bytes_do_not_come_back_from_parity(storage: Storage) -> None:

    tokenizer = put_tokenizer(storage, b"{}", vocab_size=70_000, end_of_text=0)
    commit_shards(storage, [make_shard(storage, f"{n}" * 32, lengths=[30, 5]) for n in range(4)], tokenizer=tokenizer)
    protect(storage, width=2)
    dataset = open_dataset(storage)
    purged = dataset.segments.shard(0).path
    doomed = [group.path for group in groups_of(dataset) if any(m.path == purged for m in group.members)]
    purge(storage, ids=[str(dataset.documents(0)["id"][0])])
    there = {stat.key for stat in storage.list()}
    assert not there & {purged, *doomed}
    after = open_dataset(storage)
    assert verify(after).ok
    assert {m.path for m in unprotected(after, groups_of(after))} >= {after.segments.shard(0).path}
    protect(storage, width=2)
    assert unprotected(open_dataset(storage), groups_of(open_dataset(storage))) == []


def test_a_purge_during_a_protect_leaves_no_parity_of_purged_bytes(storage: Storage) -> None:
    dataset = make_dataset(storage, [[30, 5]] * 2)

    commit_shards(storage, list(dataset.segments)[:1], operation="overwrite")
    with pytest.raises(ConflictError):
        protect(dataset, width=2)
    assert [stat.key for stat in storage.list("parity")] == []


def test_dropping_looks_at_the_tables_of_all_versions(storage: Storage) -> None:
    make_dataset(storage, [[30, 5]] * 3, name="a")
    protect(storage, width=2)
    old = groups_of(open_dataset(storage))
    make_dataset(storage, [[30, 5]], name="b")
    protect(storage, width=2)
    dataset = open_dataset(storage)
    path = next(group for group in old if len(group.members) == 1).members[0].path
    refs, keys = drop_parity(storage, dataset.commit, [path])
    assert len(keys) == 2  # The short group of before, and the full one of now.
    kept = [group for ref in refs for group in load_groups(storage, ref)]
    assert {group.path for group in kept} == {group.path for group in groups_of(dataset)} - set(keys)
    assert drop_parity(storage, dataset.commit, ["shards/none"]) == (dataset.commit.parity, [])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_no_two_files_of_a_group_lie_on_one_disk_if_there_are_disks_enough(tmp_path: Path, width: int) -> None:
    place_dataset(tmp_path / "0", roots=[str(tmp_path / str(n)) for n in range(1, 4)], copies=1)
    storage, _ = open_roots(tmp_path / "0")
    make_dataset(storage, [[10]] * 12)
    report = protect(str(tmp_path / "2"), width=width)
    assert report.shared_roots == 0
    assert not any(shares_roots(storage, group) for group in groups_of(open_dataset(storage)))


def test_too_few_disks_are_told(tmp_path: Path) -> None:
    place_dataset(tmp_path / "0", roots=[str(tmp_path / "1")], copies=1)
    make_dataset(open_roots(tmp_path / "0")[0], [[10]] * 8)
    assert protect(str(tmp_path / "1"), width=4).shared_roots > 0


def test_a_group_of_nothing_is_refused(storage: Storage) -> None:
    make_dataset(storage, [[1]])
    with pytest.raises(ConfigError):
        protect(storage, width=0)


def test_odd_lengths_are_mixed_to_the_last_byte() -> None:

    for length in range(20):
        target, source = np.full(length, 5, np.uint8), np.full(length + 3, 3, np.uint8)
        mix(target, source)
        assert target.tolist() == [6] * length
