"""`datastore doctor`: facts about this machine, and a storage probe that leaves nothing behind."""

import json
from pathlib import Path

import pytest

from datastore.cli.begin import doctor
from datastore.cli.shell import CliSession, call


def test_it_reports_the_machine_and_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(doctor, ["--json"], CliSession()) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["machine"]["cores"] >= 1
    assert facts["packages"]["pyarrow"]
    assert facts["storage"] is None


def test_a_storage_is_probed_and_left_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(doctor, ["--json", "--url", str(tmp_path / "new")], CliSession()) == 0
    probe = json.loads(capsys.readouterr().out)["storage"]
    assert probe["exclusive"] is True
    assert probe["write_mb_per_s"] > 0
    assert probe["read_mb_per_s"] > 0
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_text_names_every_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(doctor, [], CliSession()) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("python", "cores", "pyarrow", "torch", "s3fs"))


def test_a_storage_that_cannot_be_written_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(doctor, ["--url", "/proc/nowhere"], CliSession()) == 1
    assert capsys.readouterr().err.startswith("error[storage]: ")
