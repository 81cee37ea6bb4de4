"""Whatever is lost within what was promised comes back byte by byte; beyond it, nothing is made worse, and it is said.

The promises: all but one copy of any file; one file of each parity group, wherever its bytes are damaged; one disk of a
stripe with parity. Each example is a dataset in memory, damaged at random.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.durability.parity import protect
from datastore.dataset.durability.repair import RepairReport, repair
from datastore.dataset.durability.verify import verify
from datastore.dataset.log.keys import CARD_KEY, INFO_KEY, commit_key, is_data
from datastore.dataset.log.tags import set_tag
from datastore.dataset.roots import create_at, open_roots, place_dataset
from datastore.dataset.shards.parity_groups import Group, load_groups
from datastore.dataset.snapshot import open_dataset
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset

BLOCK = 256
laws = settings(max_examples=20, deadline=None)


@dataclass(frozen=True)
class Disks:
    """A dataset on disks in memory, and what they held."""

    places: Sequence[MemoryStorage]
    truth: Sequence[dict[str, bytes]]
    groups: Sequence[Group]

    @property
    def urls(self) -> list[str]:
        return [place.url for place in self.places]

    def now(self) -> list[dict[str, bytes]]:
        return [content(place) for place in self.places]

    def open_by(self) -> str:
        """A place by which the dataset can still be opened."""
        return next(place.url for place in self.places if content(place).get(INFO_KEY) == self.truth[0][INFO_KEY])

    def repair(self, **options: object) -> RepairReport:
        return repair(self.open_by(), **options)  # type: ignore[arg-type]


def content(place: MemoryStorage) -> dict[str, bytes]:
    return {stat.key: place.get(stat.key) for stat in place.list() if stat.key != CARD_KEY}


def made(disks: int, *, copies: int = 1, width: int = 0) -> Disks:
    places = [MemoryStorage(uuid.uuid4().hex) for _ in range(disks)]
    if disks > 1:
        place_dataset(places[0].url, roots=[place.url for place in places[1:]], copies=copies)
    storage, _ = create_at(places[0].url)
    make_dataset(storage, [[100, 20 * number] for number in range(5)], name="a", block_bytes=BLOCK)
    set_tag(storage, "first", open_dataset(storage).commit)
    make_dataset(storage, [[50], [300]], name="b", block_bytes=BLOCK)
    if width:
        protect(places[0].url, width=width)
    dataset = open_dataset(storage)
    groups = [group for ref in dataset.commit.parity for group in load_groups(storage, ref)]
    return Disks(places, [content(place) for place in places], groups)


def damage(place: MemoryStorage, key: str, data: st.DataObject) -> None:
    """Flip some bits of a file, cut it, let it grow, empty it, or remove it."""
    raw = bytearray(place.get(key))
    how = data.draw(st.sampled_from(["gone", "flipped", "cut", "grown", "empty"]), label=key)
    if how == "gone":
        place.delete(key)
        return
    if how == "flipped":
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif how == "grown":
        raw += b"more"
    else:
        raw.clear()
    place.put(key, bytes(raw))


def assert_whole(disks: Disks, report: RepairReport) -> None:
    assert report.ok, [found for found in report.findings if not found.repair]
    assert disks.now() == disks.truth
    assert verify(open_dataset(disks.urls[0])).ok
    assert verify(open_dataset(disks.urls[-1], tag="first")).ok
    assert not disks.repair().findings


@laws
@given(st.data())
def test_one_file_of_each_group_comes_back(data: st.DataObject) -> None:
    disks = made(1, width=data.draw(st.integers(1, 4), label="files per parity file"))
    for group in disks.groups:
        files = [group.path, *(member.path for member in group.members)]
        damage(disks.places[0], data.draw(st.sampled_from(files)), data)
    before = disks.now()
    planned = disks.repair(dry_run=True)
    assert planned.ok
    assert disks.now() == before
    done = disks.repair()
    assert done.findings == planned.findings
    assert_whole(disks, done)


@laws
@given(st.data())
def test_of_all_but_one_copy_whatever_was_damaged_comes_back(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 3), label="disks")
    copies = data.draw(st.integers(2, count), label="copies")
    disks = made(count, copies=copies)
    for key in sorted({key for truth in disks.truth for key in truth}):
        holders = [place for place in disks.places if key in content(place)]
        if key == INFO_KEY and len({content(place).get(commit_key(1)) for place in disks.places}) > 1:
            continue  # A disk without `datastore.json` is known again by its first commit.
        hit = (
            data.draw(st.lists(st.sampled_from(holders), max_size=len(holders) - 1, unique_by=id))
            if data.draw(st.booleans())
            else []
        )
        for place in hit if key != INFO_KEY else hit[:1]:
            damage(place, key, data)
    assert_whole(disks, disks.repair())


@laws
@given(st.data())
def test_disks_that_are_lost_are_filled_again(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 4), label="disks")
    copies = data.draw(st.integers(1, count), label="copies")
    width = data.draw(st.integers(1, count - 1), label="files per parity file") if copies == 1 else 0
    disks = made(count, copies=copies, width=width)
    bearable = max(1, copies - 1)
    lost = data.draw(st.lists(st.sampled_from(disks.places), min_size=1, max_size=bearable, unique_by=id), label="lost")
    for place in lost:
        place._values.clear()
    untouched = disks.repair()
    assert sorted(untouched.lost_roots) == sorted(place.url for place in lost)
    assert not untouched.ok
    assert all(not place._values for place in lost), "an empty folder may be a disk that is not mounted"
    assert_whole(disks, disks.repair(roots={place.url: place.url for place in lost}))


@laws
@given(st.data())
def test_a_lost_disk_s_place_may_be_taken_by_one_elsewhere_and_the_first_by_the_next(data: st.DataObject) -> None:
    disks = made(3, copies=2)
    lost = data.draw(st.integers(0, 2), label="lost")
    disks.places[lost]._values.clear()
    if data.draw(st.booleans(), label="promote"):
        disks.repair(promote=True)
    new = MemoryStorage(uuid.uuid4().hex)
    left = disks.urls[(lost + 1) % 3]
    report = repair(left, roots={disks.urls[lost]: new.url})
    assert report.ok
    assert {key for key in content(new) if is_data(key)} == {key for key in disks.truth[lost] if is_data(key)}
    for url in (left, new.url):
        assert verify(open_dataset(url)).ok
    make_dataset(open_roots(new.url)[0], [[7]], name="c")
    assert open_dataset(left).totals.shards == 8


@laws
@given(st.data())
def test_beyond_what_was_promised_the_damage_is_named_and_nothing_else_is_touched(data: st.DataObject) -> None:
    disks = made(1, width=3)
    place = disks.places[0]
    group = data.draw(st.sampled_from([group for group in disks.groups if len(group.members) > 1]))
    doomed = data.draw(st.lists(st.sampled_from(group.members), min_size=2, max_size=2, unique=True))
    for member in doomed:
        place.put(member.path, b"\xff" * member.size_bytes)
    other = data.draw(st.sampled_from([other for other in disks.groups if other is not group]))
    damage(place, other.members[0].path, data)
    report = disks.repair()
    assert not report.ok
    assert {found.path for found in report.findings if not found.repair} == {member.path for member in doomed}
    assert all("damaged at the same place" in found.reason for found in report.findings if not found.repair)
    expected = disks.truth[0] | {member.path: b"\xff" * member.size_bytes for member in doomed}
    assert disks.now() == [expected]


@laws
@given(st.data())
def test_two_files_of_a_group_come_back_if_they_are_not_damaged_at_the_same_place(data: st.DataObject) -> None:
    disks = made(1, width=4)
    place = disks.places[0]
    group = next(
        group for group in disks.groups if group.members[0].path.startswith("shards") and len(group.members) > 1
    )
    shards = [m for m in group.members if m.size_bytes > 2 * BLOCK]
    first, second = data.draw(st.permutations(shards), label="shards")[:2]
    blocks = data.draw(st.permutations(range(min(first.size_bytes, second.size_bytes) // BLOCK)), label="blocks")
    for member, block in ((first, blocks[0]), (second, blocks[1])):
        raw = bytearray(place.get(member.path))
        raw[block * BLOCK + data.draw(st.integers(0, BLOCK - 1))] ^= 1
        place.put(member.path, bytes(raw))
    assert_whole(disks, disks.repair())
