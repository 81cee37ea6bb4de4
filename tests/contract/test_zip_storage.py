"""The contract of what can only be read, kept by archives: stored and compressed, on a disk and in memory, whole and a folder of one."""

import zipfile
from pathlib import Path

import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError, FormatError
from datastore.loader.loader import Loader
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_dataset
from datastore.testing.read_only import CONTENT, ReadOnlyContract


def pack(path: Path, *, compression: int, folder: str = "") -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.comment = b"a comment"
        for key, value in CONTENT.items():
            archive.writestr(f"{folder}{key}", value)
        archive.writestr("../up", b"outside")
        archive.mkdir(f"{folder}a/folder")
    return path


class TestStoredZip(ReadOnlyContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return open_storage(f"zip://{pack(tmp_path / 'x.zip', compression=zipfile.ZIP_STORED)}")


class TestCompressedFolderOfAZip(ReadOnlyContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        path = pack(tmp_path / "x.zip", compression=zipfile.ZIP_DEFLATED, folder="in/it/")
        return open_storage(f"zip://{path}/in/it")

    def test_what_is_read_is_counted(self, storage: Storage) -> None:
        storage.get("a/k")
        assert storage.statistics()


class TestZipElsewhere(ReadOnlyContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        path = pack(tmp_path / "x.zip", compression=zipfile.ZIP_STORED, folder="in/")
        MemoryStorage("archives").put("some/x.zip", path.read_bytes())
        return open_storage("zip://in::memory://archives/some/x.zip")


def test_a_dataset_opens_from_an_archive_and_its_loader_streams(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [[500, 300], [800]])
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in (tmp_path / "set").rglob("*"):
            archive.write(path, path.relative_to(tmp_path))
    there, here = open_dataset(f"zip://{tmp_path}/set.zip/set"), open_dataset(tmp_path / "set")
    assert there.totals == here.totals
    assert verify(there).ok
    with (
        Loader(there, seq_len=16, global_batch=4, seed=1) as far,
        Loader(here, seq_len=16, global_batch=4, seed=1) as near,
    ):
        for _ in range(20):
            assert next(far).fingerprint() == next(near).fingerprint()
    assert open_dataset(f"{there.url}@1").version == 1


def test_what_is_no_archive_says_so(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"not a zip")
    with pytest.raises(FormatError, match="not a zip archive"):
        open_storage(f"zip://{tmp_path}/x.zip").get("k")
    for url in ("zip://", "zip:///data/books", "zip://in::"):
        with pytest.raises(ConfigError, match="names no archive"):
            open_storage(url)
