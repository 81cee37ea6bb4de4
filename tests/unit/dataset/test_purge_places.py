"""Purging a dataset that lies in several places: what is gone is gone from all of them, or the purge is not done."""

import shutil
from pathlib import Path

import pytest

from datastore.dataset.durability.parity import protect
from datastore.dataset.durability.verify import verify
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.purge.plan import list_certificates
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.roots import open_roots, place_dataset
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import StorageError
from datastore.testing.examples import make_dataset


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    return [tmp_path / name / "set" for name in ("a", "b", "c")]


@pytest.fixture
def dataset(folders: list[Path]) -> Dataset:
    for folder in folders:
        folder.mkdir(parents=True)
    place_dataset(folders[0], roots=[str(folder) for folder in folders[1:]], copies=2)
    made = make_dataset(open_roots(folders[0])[0], [[30, 40, 50], [60, 70], [80], [90]])
    protect(str(folders[0]), width=3)
    return made


def files_with(folders: list[Path], tokens: bytes) -> list[str]:
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if tokens in path.read_bytes()]


def test_a_purged_document_is_in_no_place_and_no_parity_file_gives_it_back(
    folders: list[Path], dataset: Dataset
) -> None:
    values, offsets = dataset.token_shard(0)
    tokens = values[offsets[1] : offsets[2]].tobytes()
    assert len(files_with(folders, tokens)) >= 2  # Two copies; and a parity file, where its group has one member.
    report = purge(str(folders[1]), where="tokens = 40")
    assert files_with(folders, tokens) == []
    assert report.parity_files == 2
    assert report.unnamed_files == 0
    after = open_dataset(folders[2])
    assert verify(after).ok
    protect(str(folders[0]), width=3)
    assert verify(open_dataset(folders[0])).ok


def test_while_a_place_is_away_nothing_is_purged(folders: list[Path], dataset: Dataset) -> None:
    delete(dataset, where="tokens = 40")
    away = folders[2].with_name("away")
    folders[2].rename(away)
    before = open_dataset(folders[0]).version
    with pytest.raises(StorageError, match="a place of the dataset cannot be reached"):
        purge(str(folders[0]))
    assert open_dataset(folders[0]).version == before
    away.rename(folders[2])
    assert purge(str(folders[0])).committed
    assert verify(open_dataset(folders[0])).ok


def test_a_place_that_goes_away_meanwhile_is_purged_when_it_is_back(
    folders: list[Path], dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, offsets = dataset.token_shard(0)
    tokens = values[offsets[1] : offsets[2]].tobytes()
    away = folders[1].with_name("away")

    def leave(*arguments: object, **options: object) -> object:
        folders[1].rename(away)
        monkeypatch.undo()
        return finish(*arguments, **options)  # type: ignore[operator]

    from datastore.dataset.operations.purge import purge as purging

    finish = purging.finish_plan
    monkeypatch.setattr(purging, "finish_plan", leave)
    with pytest.raises(StorageError):
        purge(str(folders[0]), where="tokens = 40")
    assert list_certificates(open_dataset(folders[0]).storage) == []
    assert open_dataset(folders[0]).live_documents(0).num_rows == 2
    shutil.rmtree(folders[1], ignore_errors=True)
    away.rename(folders[1])
    report = purge(str(folders[0]))
    assert [certificate.documents for certificate in report.resumed] == [1]
    assert files_with(folders, tokens) == []
