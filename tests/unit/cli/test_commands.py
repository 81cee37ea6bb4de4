"""Every command: its help, its flags, its JSON."""

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.start import train


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = dict(commands(cli))
REPORTING = [path for path in COMMANDS if path != ("tag",)]

FLAGS = {
    "export": "column format shard-bytes to",
    "import": "format set text-key to tokenizer tokens-key workers",
    "sql": "",
    "ingest": "dry-run exclude format id-key include max-reject-ratio on-error overwrite separator set text-key to tokenizer "
    "workers",
    "tokenizer train": "exclude include text-key to vocab",
    "show": "",
    "ls": "documents limit",
    "verify": "deep sample seed",
    "tag": "delete replace",
    "log": "limit",
    "diff": "documents limit",
    "expire": "dry-run keep older-than",
    "vacuum": "delete older-than",
    "clone": "shallow",
    "copy": "all-versions",
    "delete": "allow-missing dry-run id ids-from source where",
    "purge": "drop-tags dry-run id ids-from source where",
    "compact": "dry-run target",
    "schema": "",
    "evolve": "add default drop rename widen",
    "train": "processes set take-over to",
    "resume": "processes set take-over",
    "prove": "",
    "trace": "limit rank step",
    "evaluate": "run samples step",
    "generate": "prompt seed step temperature tokens top-k",
    "place": "copies root",
    "protect": "parity",
    "repair": "dry-run promote root",
    "checkpoint ls": "",
    "checkpoint show": "step",
    "checkpoint verify": "step",
    "checkpoint gc": "dry-run last",
    "checkpoint rewind": "dry-run step",
    "checkpoint export": "quantize replace step",
    "doctor": "url",
}
"""Every flag but --json, --debug and --help. A flag that goes or changes its name breaks somebody's script."""


def test_the_flags_are_those_that_people_use() -> None:
    found = {
        " ".join(path): " ".join(
            sorted(
                option.removeprefix("--")
                for parameter in command.params
                if isinstance(parameter, click.Option)
                for option in parameter.opts
                if option not in {"--json", "--debug"}
            )
        )
        for path, command in COMMANDS.items()
    }
    assert found == FLAGS


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_ends_with_an_example_and_needs_nothing(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli, [*path, "--help"], CliSession()) == 0
    shown = capsys.readouterr().out
    assert f"  datastore {' '.join(path)}" in shown.partition("Example:")[2]
    assert "--debug" in shown


@pytest.mark.parametrize("path", REPORTING, ids=" ".join)
def test_what_reports_can_report_in_json(path: tuple[str, ...]) -> None:
    assert "--json" in {option for parameter in COMMANDS[path].params for option in parameter.opts}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the dataset `data` and the run `run`."""
    folder = tmp_path_factory.mktemp("cli")
    make_language(folder / "data")
    train(tiny_settings(folder / "data", "train.steps=6", "checkpoint.every=2"), str(folder / "run"))
    return folder


@pytest.mark.parametrize("words", ["show data", "verify data", "ingest text --to added"])
def test_json_tells_what_the_storage_was_asked_for(
    run: Path, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    Path("text").mkdir(exist_ok=True)
    Path("text/a.txt").write_text("a document")
    assert call(cli, [*words.split(), "--json"], CliSession()) == 0
    storage = json.loads(capsys.readouterr().out)["storage"]
    asked = storage["get" if "ingest" not in words else "put"]
    assert set(asked) == {"requests", "bytes", "retries", "seconds"}
    assert asked["requests"] > 0
    assert asked["bytes"] > 0
    assert asked["retries"] == 0


@pytest.mark.parametrize(
    "words",
    [
        "show data",
        "ls data",
        "ls data --documents",
        "log data",
        "diff data@1 data",
        "diff data@1 data --documents",
        "vacuum data",
        "expire data --keep 5",
        "copy data copied",
        "verify data",
        "delete data --where false",
        "purge data --dry-run",
        "compact data --dry-run",
        "verify data --deep",
        "verify data --sample 50%",
        "prove run",
        "trace run --step 3",
        "evaluate run",
        "generate run --prompt w1 --tokens 4",
        "checkpoint ls run",
        "checkpoint show run",
        "checkpoint verify run",
        "checkpoint gc run --dry-run",
        "checkpoint rewind run --step 4 --dry-run",
        "checkpoint export run model --replace",
        "resume run",
    ],
)
def test_json_is_one_document_and_nothing_else(
    run: Path, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    assert call(cli, [*words.split(), "--json"], CliSession()) == 0
    json.loads(capsys.readouterr().out)
    assert call(cli, words.split(), CliSession()) == 0
    text = capsys.readouterr().out
    assert text.strip()
    assert not text.startswith(("{", "["))


def test_a_tag_is_set_moved_and_removed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run)
    assert call(cli, ["tag", "data", "v1"], CliSession()) == 0
    assert call(cli, ["show", "data@v1", "--json"], CliSession()) == 0
    out = capsys.readouterr().out
    assert json.loads(out[out.index("{") :])["tags"] == {"v1": 1}
    assert call(cli, ["tag", "data", "v1", "--delete"], CliSession()) == 0
    assert call(cli, ["show", "data@v1"], CliSession()) == 1
