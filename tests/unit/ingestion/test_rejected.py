"""The list of rejects: of every ingest, until the file is read again."""

import json
import os
from pathlib import Path

import pytest

import datastore as ds
from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call
from datastore.errors import MissingError, RejectedError
from datastore.ingestion.report import rejected_records
from datastore.ingestion.settings import IngestSettings

ALLOWED = IngestSettings(max_reject_ratio=0.9, workers=1, replace=True)


def write(path: Path, *lines: str, at: int) -> str:
    path.write_text("\n".join(lines) + "\n")
    os.utime(path, (at, at))
    return str(path)


def test_rejects_are_shown_until_their_file_is_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = str(tmp_path / "data")
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    ds.ingest(write(one, '{"text": "a"}', "broken", at=1), to, settings=ALLOWED)
    ds.ingest(write(two, '{"text": null}', '{"text": "b"}', at=1), to, settings=ALLOWED)
    with pytest.raises(RejectedError):
        ds.ingest(write(tmp_path / "three.jsonl", '{"text": "c"}', "{}", at=1), to)
    found = [(each.version, each.source, each.offset, each.reason) for each in rejected_records(to)]
    assert found == [
        (0, "three.jsonl", 14, "missing_text"),
        (2, "two.jsonl", 0, "null_text"),
        (1, "one.jsonl", 14, "invalid_json"),
    ]
    ds.ingest(write(one, '{"text": "a"}', '{"text": "whole"}', at=2), to, settings=ALLOWED)
    assert [each.source for each in rejected_records(to)] == ["three.jsonl", "two.jsonl"]

    assert call(cli, ["rejects", to, "--limit", "1"], CliSession()) == 0
    told = capsys.readouterr().out
    assert "missing_text" in told
    assert "--limit 0" in told
    assert call(cli, ["rejects", to, "--json"], CliSession()) == 0
    assert [each["excerpt"] for each in json.loads(capsys.readouterr().out)] == ["{}", '{"text": null}']


def test_without_rejects_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    to = str(tmp_path / "data")
    ds.ingest(write(tmp_path / "one.jsonl", '{"text": "a"}', at=1), to)
    assert call(cli, ["rejects", to], CliSession()) == 0
    assert "nothing was rejected" in capsys.readouterr().out
    with pytest.raises(MissingError):
        list(rejected_records(str(tmp_path / "nowhere")))
