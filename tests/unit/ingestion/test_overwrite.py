"""`ingest --overwrite`: the new version holds the sources alone, the old ones stay, and giving it twice changes nothing."""

import uuid
from pathlib import Path

import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings

APPEND = IngestSettings(workers=1)
OVERWRITE = IngestSettings(workers=1, operation="overwrite")


def texts(url: str) -> list[str]:
    return [row["text"] for row in open_dataset(url).iter_records()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    return folder


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4().hex}"


def test_it_replaces_what_there_was_and_leaves_the_old_version(source: Path, url: str) -> None:
    ingest([str(source)], url, settings=APPEND)
    (source / "a.txt").unlink()
    (source / "b.txt").write_text("two")
    report = ingest([str(source)], url, settings=OVERWRITE)
    assert (report.version, report.added, texts(url), texts(f"{url}@1")) == (2, True, ["two"], ["one"])
    assert open_dataset(url).commit.operation == "overwrite"
    assert verify(open_dataset(url)).ok


def test_files_that_were_there_are_read_again(source: Path, url: str) -> None:
    ingest([str(source)], url, settings=APPEND)
    (source / "b.txt").write_text("two")
    assert ingest([str(source)], url, settings=OVERWRITE).known_files == 0
    assert texts(url) == ["one", "two"]


def test_given_twice_it_changes_nothing(source: Path, url: str) -> None:
    assert ingest([str(source)], url, settings=OVERWRITE).version == 1
    again = ingest([str(source)], url, settings=OVERWRITE)
    assert (again.version, again.added) == (1, False)
    (source / "b.txt").write_text("two")
    ingest([str(source)], url, settings=APPEND)
    assert ingest([str(source)], url, settings=OVERWRITE).version == 3


def test_nothing_overwrites_nothing(source: Path, url: str) -> None:
    ingest([str(source)], url, settings=APPEND)
    (source / "a.txt").write_text("")
    with pytest.raises(ConfigError, match="empty"):
        ingest([str(source)], url, settings=OVERWRITE)
    assert texts(url) == ["one"]


def test_an_append_after_it_knows_only_its_files(source: Path, url: str) -> None:
    ingest([str(source)], url, settings=APPEND)
    old = source.parent / "old.txt"
    (source / "a.txt").rename(old)
    (source / "b.txt").write_text("two")
    ingest([str(source)], url, settings=OVERWRITE)
    old.rename(source / "a.txt")
    ingest([str(source)], url, settings=APPEND)
    assert sorted(texts(url)) == ["one", "two"]


def test_it_may_bring_another_tokenizer(tmp_path: Path, source: Path, url: str) -> None:
    from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer

    (source / "a.txt").write_text("some words and some more words " * 50)
    for vocab in (260, 270):
        raw = train_tokenizer([str(source)], settings=TokenizerSettings(vocab_size=vocab))
        (tmp_path / f"{vocab}.json").write_bytes(raw)
    ingest([str(source)], url, settings=APPEND)
    assert open_dataset(url).kind == "records"
    for vocab in (260, 270):
        settings = IngestSettings(workers=1, operation="overwrite", tokenizer=str(tmp_path / f"{vocab}.json"))
        ingest([str(source)], url, settings=settings)
        newest = open_dataset(url)
        assert newest.commit.tokenizer is not None
        assert (newest.kind, newest.commit.tokenizer.vocab_size) == ("tokens", vocab)
