"""The contract, kept by several roots that are seen as one: mirrors, a stripe, and two copies on three roots."""

import uuid
from pathlib import Path

import pytest

from datastore.dataset.roots import placement_rules
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Root, Storage
from datastore.storage.placed import PlacedStorage
from datastore.storage.wrappers import Subfolder
from datastore.testing.storage import StorageContract


def on_disks(folder: Path, *, roots: int, copies: int) -> PlacedStorage:
    return PlacedStorage(
        [Root(str(number), LocalStorage(folder / f"disk{number}")) for number in range(roots)],
        placement_rules(copies, guard=""),
    )


class TestLog(StorageContract):
    """What is not data lies on all roots."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return on_disks(tmp_path, roots=2, copies=2)


class TestMirrors(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return Subfolder(on_disks(tmp_path, roots=2, copies=2), "shards")


class TestStripe(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return Subfolder(on_disks(tmp_path, roots=3, copies=1), "shards")


class TestTwoCopiesOnThreeRoots(StorageContract):
    @pytest.fixture
    def storage(self) -> Storage:
        roots = [Root(str(number), MemoryStorage(uuid.uuid4().hex)) for number in range(3)]
        return Subfolder(PlacedStorage(roots, placement_rules(2, guard="")), "docs")


class TestOneRootOfTwoIsGone(StorageContract):
    """A mirror that is not there is written about, and changes nothing else."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        first = LocalStorage(tmp_path / "there")
        first.put("guard", b"x")
        roots = [Root("0", first), Root("1", LocalStorage(tmp_path / "not mounted"))]
        return Subfolder(PlacedStorage(roots, placement_rules(2, guard="guard")), "log")
