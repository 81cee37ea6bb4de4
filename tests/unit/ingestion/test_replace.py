"""`replace`: a file that has changed takes the place of what it was, in one commit, exactly once."""

import os
import random
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

import datastore as ds
from datastore.dataset.log.commits import CommitLog
from datastore.errors import ConfigError, StorageError
from datastore.ingestion.report import IngestReport
from datastore.ingestion.settings import IngestSettings

REPLACE = IngestSettings(replace=True, workers=1)


def write(folder: Path, name: str, *texts: str, at: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    os.utime(folder / name, (at, at))


def ingest(tmp_path: Path, settings: IngestSettings = REPLACE) -> IngestReport:
    return ds.ingest(str(tmp_path / "src"), str(tmp_path / "data"), settings=settings)


def texts(tmp_path: Path, version: int | None = None) -> list[str]:
    return sorted(row["text"] for row in ds.open(str(tmp_path / "data"), version=version).iter_records())


def test_a_changed_file_takes_the_place_of_what_it_was_in_one_commit(tmp_path: Path) -> None:
    write(tmp_path / "src", "a.jsonl", "a1", "a2", at=1)
    write(tmp_path / "src", "b.jsonl", "b1", at=1)
    assert ingest(tmp_path).replaced_documents == 0
    write(tmp_path / "src", "a.jsonl", "a1", "a3", "a4", at=2)
    write(tmp_path / "src", "c.jsonl", "c1", at=2)
    report = ingest(tmp_path)
    assert (report.version, report.files, report.changed_files, report.replaced_documents) == (2, 2, 1, 2)
    assert texts(tmp_path) == ["a1", "a3", "a4", "b1", "c1"]
    assert texts(tmp_path, version=1) == ["a1", "a2", "b1"]
    assert not ingest(tmp_path).added


def test_a_file_that_is_as_it_once_was_is_read_again(tmp_path: Path) -> None:
    for number, text in enumerate(("first", "second", "first", "third", "first"), 1):
        write(tmp_path / "src", "a.jsonl", text, at=["first", "second", "third"].index(text) + 1)
        assert ingest(tmp_path).version == number
        assert texts(tmp_path) == [text]
        assert not ingest(tmp_path).added
    write(tmp_path / "src", "a.jsonl", "second", at=2)
    assert ingest(tmp_path, IngestSettings(workers=1)).added  # Without `replace`, too: its documents are not there.
    assert texts(tmp_path) == ["first", "second"]


def test_without_it_the_older_documents_stay_and_later_go_all_together(tmp_path: Path) -> None:
    for at, text in enumerate(("one", "two"), 1):
        write(tmp_path / "src", "a.jsonl", text, at=at)
        ingest(tmp_path, IngestSettings(workers=1))
    assert texts(tmp_path) == ["one", "two"]
    write(tmp_path / "src", "a.jsonl", "three", at=3)
    assert ingest(tmp_path).replaced_documents == 2
    assert texts(tmp_path) == ["three"]


def test_tokens_are_replaced_likewise_and_names_are_no_patterns(tmp_path: Path) -> None:
    write(tmp_path / "src", "a[1].jsonl", "some words " * 9, at=1)
    write(tmp_path / "src", "a1.jsonl", "other words " * 9, at=1)
    raw = ds.train_tokenizer([str(tmp_path / "src")], settings=ds.TokenizerSettings(vocab_size=300))
    (tmp_path / "tok.json").write_bytes(raw)
    settings = IngestSettings(replace=True, workers=1, tokenizer=str(tmp_path / "tok.json"))
    ingest(tmp_path, settings)
    write(tmp_path / "src", "a[1].jsonl", "new words " * 9, at=2)
    assert ingest(tmp_path, settings).replaced_documents == 1
    totals = ds.open(str(tmp_path / "data")).totals
    assert (totals.documents, totals.deleted_documents) == (3, 1)


def test_a_commit_that_fails_deletes_nothing_and_is_made_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "src", "a.jsonl", "one", at=1)
    ingest(tmp_path)
    write(tmp_path / "src", "a.jsonl", "two", at=2)

    def fail(*_: object, **__: object) -> None:
        raise StorageError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(CommitLog, "append", fail)
        with pytest.raises(StorageError):
            ingest(tmp_path)
    assert texts(tmp_path) == ["one"]
    report = ingest(tmp_path)
    assert (report.tasks_resumed, report.replaced_documents) == (1, 1)
    assert texts(tmp_path) == ["two"]


def test_rows_that_are_taken_over_cannot_be_replaced(tmp_path: Path) -> None:
    write(tmp_path / "src", "a.jsonl", "one", at=1)
    with pytest.raises(ConfigError, match="which file they are from"):
        ingest(tmp_path, IngestSettings(replace=True, take="rows"))


@pytest.mark.slow
def test_killed_at_any_moment_each_file_is_there_once(tmp_path: Path) -> None:
    random.seed(7)
    command = [sys.executable, "-m", "datastore", "ingest", "src", "--to", "data", "--replace", "--workers", "1"]
    for state in range(4):
        for name in range(30):
            write(tmp_path / "src", f"{name}.jsonl", *(f"{state}-{name}-{row}" for row in range(20)), at=state + 1)
        for kills in count():
            started = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            try:
                started.communicate(timeout=random.uniform(0.5, 2.0 + kills))
                assert started.returncode == 0
                break
            except subprocess.TimeoutExpired:
                started.send_signal(signal.SIGKILL)
                started.communicate()
                time.sleep(0.01)
        assert texts(tmp_path) == sorted(f"{state}-{name}-{row}" for name in range(30) for row in range(20))
