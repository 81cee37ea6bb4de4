"""Datasets on several disks, as users meet them: reading past damage, losing disks, commands and their answers."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call
from datastore.dataset.durability.health import health
from datastore.dataset.durability.parity import protect
from datastore.dataset.durability.repair import repair
from datastore.dataset.durability.verify import verify
from datastore.dataset.log.identity import create_dataset
from datastore.dataset.log.keys import INFO_KEY, commit_key
from datastore.dataset.roots import create_at, open_roots, place_dataset
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, ConflictError, CorruptError, FormatError, StorageError
from datastore.loader.cache.blocks import TokenBlocks
from datastore.loader.cache.files import FileBlocks
from datastore.loader.cache.memory import BlockCache
from datastore.loader.settings import LoaderSettings
from datastore.loader.stream import open_stream
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.placed import PlacedStorage
from datastore.testing.examples import make_dataset, make_shard

BLOCK = 4096


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    return [tmp_path / f"disk{number}" / "data" for number in range(3)]


def on(disks: list[Path], *, copies: int, name: str = "made") -> Dataset:
    """Return a dataset of four shards of some blocks on `disks`."""
    place_dataset(disks[0], roots=[str(disk) for disk in disks[1:]], copies=copies)
    return make_dataset(open_roots(disks[0])[0], [[3 * BLOCK, 100]] * 4, name=name, block_bytes=BLOCK)


def copies_of(disks: list[Path], key: str) -> list[Path]:
    return [disk / key for disk in disks if (disk / key).exists()]


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def placed(dataset: Dataset) -> PlacedStorage:
    assert isinstance(dataset.storage, PlacedStorage)
    return dataset.storage


def settled(dataset: Dataset) -> list[str]:
    """Return what was healed, once nothing is being healed."""
    storage = placed(dataset)
    while storage._healing:
        pass
    return [key for key, _ in storage.healed]


def test_any_root_opens_the_dataset(disks: list[Path]) -> None:
    dataset = on(disks, copies=2)
    for disk in disks:
        opened = open_dataset(disk)
        assert opened.url == str(disk)
        assert opened.commit == dataset.commit
        assert verify(opened).ok


def test_a_dataset_that_was_there_is_copied_by_repair(disks: list[Path]) -> None:
    make_dataset(disks[0], [[10]] * 4)
    place_dataset(disks[0], roots=[str(disks[1])], copies=2)
    assert health(disks[0]).degraded == 8
    assert repair(str(disks[0])).ok
    shutil.rmtree(disks[0])
    assert verify(open_dataset(disks[1])).files
    assert open_dataset(disks[1]).totals.shards == 4


def test_placing_twice_changes_nothing_and_further_roots_are_added(disks: list[Path]) -> None:
    first = place_dataset(disks[0], roots=[str(disks[1])], copies=2)
    assert place_dataset(disks[0], roots=[str(disks[1])], copies=2) == first
    more = place_dataset(disks[0], roots=[str(disks[2])], copies=2)
    assert more.placement is not None
    assert first.placement is not None
    assert more.placement.roots[:2] == first.placement.roots
    assert more.placement.generation == 2
    assert open_roots(disks[1])[1] == more


@pytest.mark.parametrize(
    ("roots", "copies"), [(["disk1", "disk1"], 2), (["disk1/inside", "disk1"], 2), (["disk1"], 3), (["memory://m"], 2)]
)
def test_places_that_cannot_be_are_refused(tmp_path: Path, roots: list[str], copies: int) -> None:
    places = [root if "://" in root else str(tmp_path / root) for root in roots]
    with pytest.raises(ConfigError):
        place_dataset(tmp_path / "disk0", roots=places, copies=copies)
    assert not (tmp_path / "disk0").exists()


def test_a_root_that_holds_something_else_is_refused(disks: list[Path]) -> None:
    make_dataset(disks[1], [[1]])
    with pytest.raises(ConflictError):
        place_dataset(disks[0], roots=[str(disks[1])], copies=2)
    disks[2].mkdir(parents=True)
    (disks[2] / "photo.jpg").write_bytes(b"x")
    with pytest.raises(FormatError):
        place_dataset(disks[0], roots=[str(disks[2])], copies=2)


def test_a_root_elsewhere_is_told_from_a_copy(disks: list[Path], tmp_path: Path) -> None:
    on(disks, copies=3)
    shutil.copytree(disks[1], tmp_path / "copy")
    with pytest.raises(ConfigError, match="none of those that the dataset names"):
        open_dataset(tmp_path / "copy")


def test_one_root_must_not_be_written_to_alone(disks: list[Path]) -> None:
    on(disks, copies=2)
    with pytest.raises(ConfigError, match="must not be written to alone"):
        create_dataset(LocalStorage(disks[1]))


def test_a_damaged_shard_is_read_from_its_other_copy_and_written_anew(disks: list[Path]) -> None:
    dataset = on(disks, copies=2)
    shard = dataset.segments.shard(0)
    truth = dataset.token_shard(0)[0].tobytes()
    for at, path in enumerate((shard.path, shard.docs_path)):
        first = placed(dataset).homes(path)[0].storage
        flip(Path(first.url) / path, 500)
        assert dataset.token_shard(0)[0].tobytes() == truth
        assert dataset.documents(0).num_rows == 2
        assert len(settled(dataset)) == at + 1
    assert verify(dataset).ok


def test_verify_names_the_copy_that_is_bad(disks: list[Path]) -> None:
    dataset = on(disks, copies=2)
    path = dataset.segments.shard(0).path
    last = copies_of(disks, path)[-1]
    flip(last, 10)
    assert [(bad.path, bad.block) for bad in verify(dataset).bad] == [(path, 0)]
    assert str(last).removesuffix(f"/{path}") in verify(dataset).bad[0].reason


def tokens_of(blocks: TokenBlocks, shard: ShardInfo) -> npt.NDArray[np.uint16]:
    """Return the tokens of shard 0, whose blocks are held."""
    return np.frombuffer(blocks.read(*np.array([[0], [shard.values_start], [2 * shard.tokens]])), np.uint16)


def test_blocks_of_files_go_on_with_another_copy(disks: list[Path]) -> None:
    dataset = on(disks, copies=2)
    whole = dataset.token_shard(0)[0].copy()
    shard = dataset.segments.shard(0)
    first = placed(dataset).homes(shard.path)[0].storage
    flip(Path(first.url) / shard.path, 2 * BLOCK + 7)
    blocks = open_stream(dataset, seq_len=1, seed=0, options=LoaderSettings()).open_blocks()
    assert isinstance(blocks, FileBlocks)
    with blocks.hold(np.arange(len(blocks.layout.of_shard(0)))):
        assert np.array_equal(tokens_of(blocks, shard), whole)
    assert settled(dataset) == [shard.path]
    assert verify(dataset).ok


def test_blocks_of_files_give_up_if_no_copy_is_whole(disks: list[Path]) -> None:
    dataset = on(disks, copies=2)
    shard = dataset.segments.shard(0)
    for block, path in enumerate(copies_of(disks, shard.path), 1):
        flip(path, block * BLOCK + 7)
    blocks = FileBlocks(dataset.storage, dataset.segments)
    with pytest.raises(CorruptError, match="no copy of the shard is whole"), blocks.hold(np.arange(4)):
        pass
    assert repair(str(disks[0])).ok
    with FileBlocks(dataset.storage, dataset.segments).hold(np.arange(4)):
        pass


def test_blocks_in_memory_are_fetched_from_another_copy() -> None:
    urls = [f"memory://repair-blocks-{number}" for number in range(2)]
    place_dataset(urls[0], roots=urls[1:], copies=2)
    dataset = make_dataset(create_at(urls[0])[0], [[3 * BLOCK]], block_bytes=BLOCK)
    shard = dataset.segments.shard(0)
    first = placed(dataset).homes(shard.path)[0].storage
    raw = bytearray(first.get(shard.path))
    raw[BLOCK + 7] ^= 1
    first.put(shard.path, raw)
    cache = BlockCache(dataset.storage, dataset.segments, budget_bytes=2**20)
    with cache.hold(np.arange(len(cache.layout.of_shard(0)))):
        assert np.array_equal(tokens_of(cache, shard), dataset.token_shard(0)[0])
    assert settled(dataset) == [shard.path]


def test_a_damaged_commit_is_read_from_a_mirror(disks: list[Path]) -> None:
    dataset = on(disks, copies=2)
    flip(disks[0] / commit_key(1), 300)
    assert open_dataset(disks[0]).commit == dataset.commit
    assert not [bad for bad in verify(open_dataset(disks[1])).bad if "_log" in bad.path]


def test_without_the_first_disk_all_is_read_nothing_written_and_promoting_goes_on(disks: list[Path]) -> None:
    on(disks, copies=2)
    shutil.rmtree(disks[0])
    dataset = open_dataset(disks[1])
    for index in range(4):
        dataset.token_shard(index)
    with pytest.raises(StorageError, match="--promote"):
        make_dataset(dataset.storage, [[1]], name="more")
    repair(str(disks[1]), promote=True)
    assert make_dataset(open_roots(disks[2])[0], [[1]], name="more").totals.shards == 5
    assert not disks[0].exists()


def test_the_first_disk_that_comes_back_after_another_was_promoted_learns_what_it_missed(
    disks: list[Path], tmp_path: Path
) -> None:
    on(disks, copies=2)
    disks[0].rename(tmp_path / "away")
    repair(str(disks[1]), promote=True)
    make_dataset(open_roots(disks[1])[0], [[1]], name="meanwhile")
    (tmp_path / "away").rename(disks[0])
    assert open_dataset(disks[0]).version == 2
    make_dataset(open_roots(disks[0])[0], [[1]], name="later")
    assert repair(str(disks[0])).ok
    assert {disk: (disk / commit_key(3)).exists() for disk in disks} == dict.fromkeys(disks, True)
    assert open_roots(disks[0])[1] == open_roots(disks[1])[1]
    assert not list((disks[1] / "_behind").glob("*"))
    assert verify(open_dataset(disks[0])).ok


def test_a_mirror_that_was_away_is_brought_up_to_date(disks: list[Path], tmp_path: Path) -> None:
    on(disks, copies=3)
    disks[2].rename(tmp_path / "away")
    make_dataset(open_roots(disks[0])[0], [[1]], name="meanwhile")
    (tmp_path / "away").rename(disks[2])
    found = health(disks[0])
    assert [loss.behind for loss in found.roots] == [False, False, True]
    assert found.degraded == 2
    report = repair(str(disks[2]))
    assert report.ok
    assert report.repaired >= 4  # A shard, its documents, a commit, a segment.
    assert not any(loss.behind for loss in health(disks[0]).roots)
    assert health(disks[0]).degraded == 0


def test_what_a_full_disk_sent_elsewhere_is_brought_home(disks: list[Path]) -> None:
    dataset = on(disks, copies=1)
    shard = dataset.segments.shard(0)
    home = copies_of(disks, shard.path)[0]
    stray = next(disk for disk in disks if disk not in home.parents) / shard.path
    stray.parent.mkdir(parents=True, exist_ok=True)
    home.rename(stray)
    assert dataset.token_shard(0)[1].size == 3
    assert repair(str(disks[0])).ok
    assert home.exists()
    assert not stray.exists()


def test_what_a_lost_disk_would_cost_is_counted(disks: list[Path]) -> None:
    dataset = on(disks, copies=1)
    found = health(disks[0])
    assert found.unprotected == found.files == 8
    for loss, disk in zip(found.roots, disks, strict=True):
        lost = {
            shard.uid
            for shard in dataset.segments
            if any((disk / path).exists() for path in (shard.path, shard.docs_path))
        }
        assert (loss.shards, loss.documents, loss.rebuilt) == (len(lost), 2 * len(lost), 0)
        assert loss.versions == bool(lost)
    protect(str(disks[0]), width=2)
    safe = health(disks[0])
    assert [loss.documents for loss in safe.roots] == [0, 0, 0]
    assert sum(loss.rebuilt for loss in safe.roots) == 8 + safe.groups
    assert safe.unprotected == 0


def test_one_disk_holds_all_there_is_to_lose(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [[5, 6]] * 2)
    worst = health(tmp_path / "set").worst
    assert (worst.documents, worst.tokens, worst.versions) == (4, 22, 1)


def test_a_small_file_of_one_disk_that_is_damaged_is_named(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "set", [[5]])
    key = f"_segments/{dataset.commit.segments[0].digest}.arrow"
    flip(tmp_path / "set" / key, 50)
    report = repair(str(tmp_path / "set"))
    assert [(found.path, found.reason) for found in report.findings] == [(key, "there is no good copy of it")]
    (tmp_path / "set" / key).unlink()
    assert [found.fault for found in repair(str(tmp_path / "set")).findings] == ["it is missing"]


def test_roots_of_one_place_cannot_be_changed(tmp_path: Path, disks: list[Path]) -> None:
    make_dataset(tmp_path / "set", [[5]])
    with pytest.raises(ConfigError, match="one place"):
        repair(str(tmp_path / "set"), promote=True)
    on(disks, copies=2)
    with pytest.raises(ConfigError, match="none of those"):
        repair(str(disks[0]), roots={"/no/such": "/other"})


def test_writers_go_on_while_a_disk_is_filled(disks: list[Path]) -> None:
    dataset = on(disks, copies=3)
    shutil.rmtree(disks[2])
    writer = open_roots(disks[0])[0]
    assert repair(str(disks[0]), roots={str(disks[2]): str(disks[2])}).ok
    info = make_shard(writer, "f" * 32, lengths=[3])  # Opened when the disk was away.
    assert (disks[2] / info.path).exists()
    assert dataset.info == open_dataset(disks[2]).info
    assert (disks[2] / INFO_KEY).exists()


def run(line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = call(cli, line.split(), CliSession())
    return status, capsys.readouterr().out


def test_commands_tell_what_they_found(disks: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = disks
    assert "(a stripe)" in run(f"place {a} --root {b} --root {c} --copies 1", capsys)[1]
    dataset = make_dataset(open_roots(a)[0], [[30]] * 6)
    assert "6 of" not in run(f"protect {a} --parity 2", capsys)[1]
    assert "nothing new" in run(f"protect {b} --parity 2", capsys)[1]
    path = copies_of(disks, dataset.segments.shard(0).path)[0]
    path.unlink()
    status, out = run(f"repair {c} --dry-run", capsys)
    assert status == 0
    assert "could be repaired" in out
    assert not path.exists()
    status, out = run(f"repair {c} --json", capsys)
    assert (status, json.loads(out)["findings"][0]["repair"]) == (0, "made again from parity")
    assert "every copy is as it was written" in run(f"repair {c}", capsys)[1]
    shutil.rmtree(b)
    status, out = run(f"repair {c}", capsys)
    assert status == 1
    assert f"not there: {b}" in out
    assert "not there" in run(f"doctor {a}", capsys)[1]
    status, out = run(f"repair {c} --root {b}", capsys)
    assert status == 0
    assert json.loads(run(f"doctor {a} --json", capsys)[1])["roots"][1]["there"]


def test_memory_roots_are_roots_like_any_other() -> None:
    place_dataset("memory://root-a", roots=["memory://root-b"], copies=2)
    make_dataset(open_roots("memory://root-b")[0], [[1]])
    assert {stat.key for stat in MemoryStorage("root-a").list()} == {
        stat.key for stat in MemoryStorage("root-b").list()
    }
