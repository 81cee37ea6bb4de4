"""What one begins with: settings to start from, and completion."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

import datastore as ds
from datastore.cli.main import cli
from datastore.config import commented, settings_from
from datastore.document import setting_names
from datastore.training.settings import Settings


@pytest.mark.parametrize("kind", [Settings, ds.IngestSettings])
def test_every_setting_is_in_the_file_once_and_the_file_says_the_defaults(kind: type[ds.IngestSettings]) -> None:
    given = {"data.url": "data"} if kind is Settings else {}
    text = commented(kind, given)
    assert settings_from(kind, tomllib.loads(text), where="it") == settings_from(
        kind, {"data": {"url": "data"}} if given else {}, where="it"
    )
    opened = "\n".join(
        line.removeprefix("# ")
        if " = " in line and line.startswith("# ") and line[2:].split(" = ")[0].isidentifier()
        else line
        for line in text.splitlines()
    )
    loaded = tomllib.loads(opened)
    first = settings_from(kind, {"data": {"url": "data"}} if given else {}, where="it")
    defaults = msgspec.json.decode(msgspec.json.encode(first))
    for name, value in loaded.items():
        for key, inner in value.items() if isinstance(value, dict) and name in defaults and name != "objective" else ():
            assert defaults[name][key] == inner, (name, key)
    missing = {name for name in setting_names(kind) if name.split(".")[-1] not in text}
    assert not missing


def test_a_recipe_trains_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["init", "recipe", "--data", "data/code"])
    assert done.exit_code == 0, done.output
    assert "datastore train recipe.toml" in done.output
    settings = ds.load_settings(ds.RunSettings, "recipe.toml")
    assert (settings.data.url, settings.train.steps) == ("data/code", 500)
    again = CliRunner().invoke(cli, ["init", "recipe"])
    assert isinstance(again.exception, ds.ConfigError)
    assert "there is such a file already" in str(again.exception)
    assert CliRunner().invoke(cli, ["init", "recipe", "--force", "--data", "other"]).exit_code == 0
    assert ds.load_settings(ds.RunSettings, "recipe.toml").data.url == "other"
    assert CliRunner().invoke(cli, ["init", "ingest"]).exit_code == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed(shell: str) -> None:
    done = CliRunner().invoke(cli, ["completion", shell])
    assert done.exit_code == 0
    assert "_DATASTORE_COMPLETE" in done.output


@pytest.mark.parametrize(
    ("words", "count", "said"),
    [
        ("datastore checkpoint ve", 2, "plain,verify"),
        ("datastore ingest --on-error q", 3, "plain,quarantine"),
        ("datastore show ./da", 2, "file,./da"),
        ("datastore ingest src --to da", 4, "file,da"),
    ],
)
def test_the_shell_completes_commands_options_and_paths(words: str, count: int, said: str) -> None:
    environ = os.environ | {"_DATASTORE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(count)}
    done = subprocess.run(
        [sys.executable, "-m", "datastore"], env=environ, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == said
