"""Purging what was ingested: the journal keeps neither text nor names of it, and still knows which files were read."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datastore.dataset.durability.verify import verify
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.operations.compact import compact
from datastore.dataset.operations.delete import delete
from datastore.dataset.operations.purge.purge import purge
from datastore.dataset.snapshot import open_dataset
from datastore.errors import RejectedError
from datastore.ingestion.destination import open_target
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import record_writer
from datastore.storage.backends.local import LocalStorage


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "src"
    folder.mkdir()
    for name in ("alice", "bob", "carol"):
        (folder / f"{name}.txt").write_text(f"{name} wrote this about {name}-matters, again and again. " * 3)
    rows = [{"id": f"mail-{n}", "text": f"letter number {n} of somebody-{n}"} for n in range(5)]
    rows.append({"id": "mail-1", "text": "a second letter of somebody-1"})
    (folder / "mails.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken of somebody-1\n")
    return folder


@pytest.fixture
def tokenizer(tmp_path: Path, source: Path) -> str:
    path = tmp_path / "tok.json"
    path.write_bytes(train_tokenizer([str(source)], settings=TokenizerSettings(vocab_size=300)))
    return str(path)


def settings(tokenizer: str = "", **more: object) -> IngestSettings:
    return IngestSettings(tokenizer=tokenizer, workers=1, max_reject_ratio=0.9, **more)  # type: ignore[arg-type]


def files_with(folder: Path, text: str) -> list[str]:
    """The files below `folder` in whose name or bytes `text` is, also where Parquet has compressed it."""
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        raw = path.read_bytes()
        if path.suffix == ".parquet":
            raw += repr(pa.parquet.read_table(path).to_pylist()).encode()
        if text in path.name or text.encode() in raw:
            found.append(path.relative_to(folder).as_posix())
    return found


@pytest.mark.parametrize("kind", ["tokens", "records"])
def test_neither_text_nor_name_of_a_purged_file_is_left(
    tmp_path: Path, source: Path, tokenizer: str, kind: str
) -> None:
    to, options = tmp_path / "set", settings(tokenizer if kind == "tokens" else "")
    ingest([str(source)], to=str(to), settings=options)
    assert len(files_with(to, "alice")) >= 2
    report = purge(str(to), ids=["src/alice.txt"])
    assert report.documents == 1
    assert files_with(to, "alice") == []
    assert files_with(to, "bob") != []
    assert verify(open_dataset(to)).ok
    # The same files again are no news, and the purged one stays away.
    again = ingest([str(source)], to=str(to), settings=options)
    assert (again.added, again.known_files) == (False, 4)


def test_rejects_and_digests_of_ids_go_with_the_journal(tmp_path: Path, source: Path, tokenizer: str) -> None:
    to = tmp_path / "set"
    first = ingest([str(source)], to=str(to), settings=settings(tokenizer))
    assert files_with(to, "somebody-1") != []
    report = purge(str(to), ids=["mail-1"])
    assert report.certificate is not None
    assert report.certificate.ingests_cleared == (first.ingest_id,)
    assert files_with(to, "somebody-1") == []
    assert files_with(to, "mail-1") == []
    kept = {path.name for path in (to / "ingests" / first.ingest_id).iterdir() if path.is_file() or any(path.iterdir())}
    assert kept <= {"plan.json", "running"}
    assert ingest([str(source)], to=str(to), settings=settings(tokenizer)).added is False


def test_after_an_overwrite_the_same_files_may_come_back(tmp_path: Path, source: Path, tokenizer: str) -> None:
    to = tmp_path / "set"
    ingest([str(source)], to=str(to), settings=settings(tokenizer))
    purge(str(to), ids=["src/alice.txt"])
    commit_shards(LocalStorage(to), [], operation="overwrite", tokenizer=open_dataset(to).commit.tokenizer)
    purge(str(to))
    assert ingest([str(source)], to=str(to), settings=settings(tokenizer)).documents == 8
    dataset = open_dataset(to)
    assert verify(dataset).ok
    assert "src/alice.txt" in dataset.documents(0).column("id").to_pylist()


def test_an_ingest_that_was_not_committed_is_named_and_not_touched(
    tmp_path: Path, source: Path, tokenizer: str
) -> None:
    to = tmp_path / "set"
    ingest([str(source / "bob.txt")], to=str(to), settings=settings(tokenizer))
    with pytest.raises(RejectedError):
        ingest([str(source)], to=str(to), settings=settings(tokenizer, on_error="fail"))
    delete(str(to), ids=["bob.txt"])
    report = purge(str(to))
    assert len(report.unfinished_ingests) == 1
    assert ingest([str(source)], to=str(to), settings=settings(tokenizer)).added


def test_a_column_that_was_dropped_does_not_keep_a_purged_row(tmp_path: Path) -> None:
    evolve = pytest.importorskip("datastore.dataset.operations.evolve").evolve
    with record_writer(tmp_path / "set") as out:
        out.write([{"id": "a", "note": "secret-of-a"}, {"id": "b", "note": "of-b"}])
    evolve(tmp_path / "set", drop=["note"])
    purge(str(tmp_path / "set"), ids=["a"])
    assert files_with(tmp_path / "set", "secret-of-a") == []
    dataset = open_dataset(tmp_path / "set")
    assert list(dataset.iter_records()) == [{"id": "b"}]
    assert np.array_equal(dataset.deletions.rows(dataset.segments.shard(0).uid), [0])


def test_two_that_do_the_same_ingest_add_it_once_even_if_its_shards_are_compacted_between(
    tmp_path: Path, source: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "set"
    ingest([str(source / "bob.txt")], to=str(to), settings=settings(tokenizer))
    before = open_target(str(to))
    ingest([str(source)], to=str(to), settings=settings(tokenizer))
    assert compact(str(to)).committed
    opened = iter([before])
    monkeypatch.setattr(
        "datastore.ingestion.preparation.open_target", lambda url: next(opened, None) or open_target(url)
    )
    report = ingest([str(source)], to=str(to), settings=settings(tokenizer))
    assert (report.added, report.overtaken_files) == (False, report.known_files)
    dataset = open_dataset(to)
    assert dataset.commit.operation == "compact"
    names = dataset.documents(0).column("id").to_pylist()
    assert len(names) == len(set(names)) == dataset.totals.documents
