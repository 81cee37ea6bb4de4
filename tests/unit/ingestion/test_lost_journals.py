"""What an ingest has brought is not brought again, whatever has become of its journal: the dataset itself says so."""

import os
import shutil
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from datastore.dataset.journal import Journal
from datastore.dataset.operations.compact import compact
from datastore.dataset.snapshot import open_dataset
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.ingest import ingest
from datastore.ingestion.quality.plain import Length
from datastore.ingestion.report import IngestReport
from datastore.ingestion.settings import IngestSettings


class Ground:
    """Texts in `src`, ingested into `set` as tokens or as they are."""

    def __init__(self, root: Path, kind: str) -> None:
        self.src, self.to = root / "src", root / "set"
        self.src.mkdir()
        for letter in "abc":
            self.write(letter)
        settings = IngestSettings(workers=1)
        if kind == "tokens":
            raw = train_tokenizer([str(self.src)], settings=TokenizerSettings(vocab_size=300))
            (root / "tok.json").write_bytes(raw)
            settings = IngestSettings(workers=1, tokenizer=str(root / "tok.json"))
        self.settings = settings

    def write(self, letter: str) -> None:
        (self.src / f"{letter}.txt").write_text(f"the text {letter} " * 9)

    def run(self) -> IngestReport:
        return ingest([str(self.src)], str(self.to), settings=self.settings)

    def journal(self, report: IngestReport) -> Path:
        return self.to / "ingests" / report.ingest_id

    def names(self) -> Counter[str]:
        return Counter(Path(str(name)).stem for name in open_dataset(self.to).to_arrow().column("source").to_pylist())


@pytest.fixture(params=["tokens", "records"])
def ground(tmp_path: Path, request: pytest.FixtureRequest) -> Ground:
    return Ground(tmp_path, request.param)


def lose(journal: Path) -> None:
    shutil.rmtree(journal)


def damage(journal: Path) -> None:
    plan = journal / "plan.json"
    raw = plan.read_bytes()
    plan.write_bytes(raw[: len(raw) // 2])


@pytest.mark.parametrize("spoil", [lose, damage])
def test_the_same_ingest_adds_nothing_and_makes_its_plan_again(ground: Ground, spoil: object) -> None:
    first = ground.run()
    compact(str(ground.to))
    spoil(ground.journal(first))  # type: ignore[operator]
    again = ground.run()
    assert (again.added, again.known_files) == (False, 3)
    assert ground.names() == Counter("abc")
    plan = Journal(open_dataset(ground.to).storage, first.ingest_id).find_plan()
    assert plan is not None
    assert [file.path for file in plan.files] == ["src/a.txt", "src/b.txt", "src/c.txt"]


def test_a_plan_made_again_knows_filters_and_settings(ground: Ground) -> None:
    filters = (Length(min_words=5),)
    ground.settings = msgspec.structs.replace(ground.settings, take="text", filters=filters)
    first = ground.run()
    journal = Journal(open_dataset(ground.to).storage, first.ingest_id)
    before = journal.find_plan()
    assert before is not None
    assert before.filters_digest
    assert before.settings["filters"] == [{"use": "length", "min_words": 5}]
    lose(ground.journal(first))
    assert not ground.run().added
    assert journal.find_plan() == before


@pytest.mark.parametrize("spoil", [lose, damage])
def test_of_a_folder_that_has_grown_only_what_is_new_is_added(
    ground: Ground, spoil: object, caplog: pytest.LogCaptureFixture
) -> None:
    first = ground.run()
    compact(str(ground.to))
    spoil(ground.journal(first))  # type: ignore[operator]
    ground.write("d")
    again = ground.run()
    assert (again.added, again.files, again.known_files) == (True, 1, 3)
    assert "known by their names, 3 of 4" in caplog.text
    assert ground.names() == Counter("abcd")
    assert not ground.run().added


def test_a_file_that_has_changed_since_is_a_new_one(ground: Ground) -> None:
    lose(ground.journal(ground.run()))
    ground.write("a")
    os.utime(ground.src / "a.txt", (2**32, 2**32))
    assert ground.run().files == 1
    assert ground.names() == Counter("aabc")


def test_what_was_overwritten_is_no_more_known(ground: Ground, tmp_path: Path) -> None:
    first = ground.run()
    other = tmp_path / "other"
    other.mkdir()
    (other / "z.txt").write_text("another text")
    overwriting = ground.settings.__class__(workers=1, tokenizer=ground.settings.tokenizer, operation="overwrite")
    ingest([str(other)], str(ground.to), settings=overwriting)
    lose(ground.journal(first))
    assert ground.run().files == 3
    assert ground.names() == Counter("abcz")
