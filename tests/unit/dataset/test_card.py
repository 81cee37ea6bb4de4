"""The card says what a version is made of, and by its own words it can be made again."""

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import datastore as ds
from datastore.cli.main import cli as main
from datastore.errors import MissingError
from datastore.ingestion.settings import noted


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A dataset of two ingests: one with filters and a licence, one without."""
    (tmp_path / "src").mkdir()
    for number in range(6):
        (tmp_path / "src" / f"{number}.txt").write_text(f"mail me at me{number}@example.org " + "word " * 40 * number)
    (tmp_path / "src" / "bad.txt").write_bytes(b"\xff\xfe\xff" * 50)
    (tmp_path / "more.jsonl").write_text('{"text": "one more"}\n{"text": "and another"}\n')
    raw = ds.train_tokenizer([str(tmp_path / "src")], settings=ds.TokenizerSettings(vocab_size=300))
    (tmp_path / "tok.json").write_bytes(raw)
    filters = tmp_path / "filters.toml"
    filters.write_text(
        'license = "CC-BY-4.0"\n[[filters]]\nuse = "length"\nmin_words = 20\n[[filters]]\nuse = "redact"\nkinds = ["mail"]\n'
    )
    run("ingest", tmp_path / "src", "--to", tmp_path / "data", "--tokenizer", tmp_path / "tok.json", "--config", filters,
        "--max-reject-ratio", 0.5, "--workers", 1)  # fmt: skip
    return tmp_path


def run(*arguments: object) -> str:
    found = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def test_it_says_sources_licences_filters_and_counts(made: Path) -> None:
    text = ds.card(str(made / "data"))
    assert text.startswith('---\nlicense: "cc-by-4.0"\nsize_categories:\n- n<1K\n---\n')
    assert re.search(r"\| 1 \| `.*/src` \| 7 \| 5 \| CC-BY-4.0 \|", text)
    assert "| rejected | `invalid_utf8` | 1 |" in text
    assert re.search(r"\| dropped by a filter \| `length[^`]*` \| 1 \|", text)
    assert re.search(r"\| changed by a filter \| `redact: mail` \| 5 \|", text)
    assert '{"min_words" = 20, "use" = "length"}' in text
    assert "max_words" not in text


def test_a_licence_of_some_documents_is_not_that_of_all(made: Path) -> None:
    run("ingest", made / "more.jsonl", "--to", made / "data", "--workers", 1)
    text = ds.card(str(made / "data"))
    assert 'license: "other"' in text
    assert re.search(r"\| 2 \| `.*more.jsonl` \| 1 \| 2 \|  \|", text)
    assert ds.card(str(made / "data@1")) == ds.card(str(made / "data@1"))
    assert "more.jsonl" not in ds.card(str(made / "data@1"))


def test_what_it_says_makes_the_same_shards_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    text = ds.card("data")
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    for kind, block in blocks:
        if kind == "toml":
            Path(re.match(r"# (\S+)", block)[1]).write_text(block)  # type: ignore[index]
    (command,) = (block for kind, block in blocks if kind == "sh")
    words = shlex.split(command.replace("--to data", "--to again"))
    assert words[0] == "datastore"
    run(*words[1:])
    first, again = (ds.open(name) for name in ("data", "again"))
    assert [first.segments.shard(i).path for i in range(1)] == [again.segments.shard(i).path for i in range(1)]
    assert first.to_arrow() == again.to_arrow()


def test_only_what_is_there_since_the_last_overwrite_is_named(made: Path) -> None:
    run("ingest", made / "more.jsonl", "--to", made / "data", "--workers", 1, "--overwrite")
    text = ds.card(str(made / "data"))
    assert "more.jsonl" in text
    assert "/src`" not in text


def test_a_journal_that_is_gone_is_said(made: Path) -> None:
    (plan,) = (made / "data").glob("ingests/*/plan.json")
    plan.unlink()
    text = ds.card(str(made / "data"))
    assert "its journal is gone" in text
    assert "Of version 1 the journal is gone" in text


def test_an_ingest_that_was_compacted_is_named_once(made: Path) -> None:
    run("ingest", made / "more.jsonl", "--to", made / "data", "--workers", 1)
    ds.compact(str(made / "data"))
    text = ds.card(str(made / "data"))
    assert text.count("/src` |") == text.count("more.jsonl` |") == 1


def test_no_password_of_a_setting_gets_into_it() -> None:
    settings = ds.IngestSettings(tokenizer="https://me:secret@host/tok.json?sig=secret", workers=3)
    assert noted(settings) == {"tokenizer": "https://host/tok.json"}


def test_it_can_be_written_to_a_file_and_names_what_is_missing(made: Path) -> None:
    run("card", made / "data", "--to", made / "README.md")
    assert (made / "README.md").read_text() == ds.card(str(made / "data"))
    assert run("card", made / "data") == ds.card(str(made / "data"))
    with pytest.raises(MissingError):
        ds.card(str(made / "nowhere"))
