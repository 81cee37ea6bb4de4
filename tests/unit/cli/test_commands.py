"""Every command: its help, its flags, its JSON."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from typing_extensions import override

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
REPORTING = [
    path for path in COMMANDS if path not in {("tag",), ("card",), ("init",), ("completion",), ("ui",)}
]  # A card is Markdown already.

FLAGS = {
    "export": "column format shard-bytes to",
    "import": "format set text-key to tokenizer tokens-key workers",
    "sql": "",
    "ingest": "address as begin-anew chat chat-template commit config dry-run engine exclude files-from format gitignore html-text id-field id-key include max-reject-ratio "
    "on-error overwrite pairs replace separator set task template text-field text-key to tokenizer trace-filters workers",
    "rejects": "limit",
    "teach": "model step to top",
    "retokenize": "address engine max-reject-ratio set to tokenizer workers",
    "tokenizer train": "exclude include model text-key to vocab",
    "show": "",
    "ls": "documents limit",
    "verify": "address deep engine sample seed workers",
    "tag": "delete replace",
    "log": "limit",
    "checkpoint replicate": "codec every keep to",
    "card": "to",
    "undelete": "dry-run of",
    "diff": "documents limit",
    "expire": "dry-run keep older-than",
    "vacuum": "delete older-than",
    "clone": "shallow",
    "copy": "all-versions",
    "delete": "allow-missing dry-run id ids-from source where",
    "purge": "address drop-tags dry-run engine id ids-from source where workers",
    "compact": "address dry-run engine target workers",
    "dedup": "address clusters dry-run engine keep text-column threshold words workers",
    "schema": "",
    "evolve": "add default drop rename widen",
    "train": "dry-run processes profile restarts set take-over to",
    "resume": "processes profile restarts set take-over",
    "plan": "batch cost delay lanes link memory per-node plot ranks seq-len shard step steps store threads tokens",
    "fork": "processes set step to",
    "prove": "",
    "trace": "limit rank step",
    "evaluate": "data run samples step",
    "generate": "cache-bits prompt seed step temperature tokens top-k",
    "runs ls": "",
    "runs show": "",
    "runs compare": "",
    "plot": "against number to",
    "report": "data plot run",
    "compress": "data processes recipe to",
    "place": "copies root",
    "protect": "parity",
    "repair": "dry-run promote root",
    "checkpoint ls": "",
    "checkpoint show": "step",
    "checkpoint verify": "step",
    "checkpoint gc": "best best-count budget dry-run every last within",
    "checkpoint drop": "before item step",
    "checkpoint diff": "item limit",
    "checkpoint pin": "remove step",
    "checkpoint rewind": "dry-run step",
    "checkpoint fork": "step to",
    "checkpoint export": "as item quantize replace step",
    "checkpoint average": "last",
    "checkpoint import": "item step to",
    "cache ls": "",
    "cache clear": "dataset",
    "cache warm": "bytes columns dir global-batch seed seq-len steps",
    "init": "data force to",
    "ui": "host open port",
    "completion": "",
    "doctor": "url",
    "explain": "",
}
"""Every flag but --json, --debug, --progress and --help. A flag that goes or changes its name breaks somebody's script."""


def test_the_flags_are_those_that_people_use() -> None:
    found = {
        " ".join(path): " ".join(
            sorted(
                option.removeprefix("--")
                for parameter in command.params
                if isinstance(parameter, click.Option)
                for option in parameter.opts
                if option not in {"--json", "--debug", "--progress"}
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
        "checkpoint gc run --dry-run --budget 1GiB",
        "checkpoint rewind run --step 4 --dry-run",
        "checkpoint export run model --replace",
        "cache warm data --dir cache",
        "cache ls cache",
        "cache clear cache",
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


LONG = {
    "checkpoint diff": "checkpoint diff run@2 run@4 --progress plain",
    "ingest": "ingest src --to new --progress plain",
    "import": "import exported --format parquet --to imported --progress plain",
    "retokenize": "retokenize littered --to anew --tokenizer small.json --progress plain",
    "teach": "teach data --model run --to taught --progress plain",
    "tokenizer train": "tokenizer train src --vocab 300 --to tok.json --progress plain",
    "export": "export data --format parquet --to other --progress plain",
    "verify": "verify data --progress plain",
    "copy": "copy data copy2 --progress plain",
    "clone": "clone data clone2 --progress plain",
    "delete": "delete data --source none --progress plain",
    "purge": "purge holed --progress plain",
    "compact": "compact holed --progress plain",
    "dedup": "dedup data --progress plain",
    "vacuum": "vacuum littered --delete --older-than 0s --progress plain",
    "place": "place data --root second --progress plain",
    "protect": "protect data --progress plain",
    "repair": "repair data --dry-run --progress plain",
    "train": "train run.toml --to newrun --progress plain",
    "resume": "resume begun --set train.steps=3 --progress plain",
    "fork": "fork run --to forked --set train.steps=2 --progress plain",
    "prove": "prove run --progress plain",
    "evaluate": "evaluate run --progress plain",
    "cache warm": "cache warm zip://data.zip/data --dir warmed --progress plain",
    "checkpoint verify": "checkpoint verify run --progress plain",
    "checkpoint replicate": "checkpoint replicate run --to backup --progress plain",
    "checkpoint export": "checkpoint export run model2 --progress plain",
    "checkpoint fork": "checkpoint fork run --to branch --progress plain",
    "checkpoint average": "checkpoint average run mean --last 1 --progress plain",
    "compress": "compress run --recipe recipe.toml --to smaller --progress plain",
    "report": "report run begun --progress plain",
}
"""A command line for every command that can take minutes."""

UNCOUNTED = {
    "checkpoint gc": "checkpoint gc run --progress plain",
    "checkpoint import": "checkpoint import model --to imported-run --progress plain",
    "diff": "diff holed@1 holed --documents --progress plain",
    "generate": "generate run --prompt w1 --tokens 4 --progress plain",
    "plan": "plan data --ranks 2,4 --progress plain",
    "plot": "plot run --to loss.svg --progress plain",
    "sql": "sql data 'SELECT count(*) FROM documents' --progress plain",
}
"""A command line for every command that can take long, and cannot know how much there is to do."""


@pytest.fixture(scope="module")
def places(run: Path) -> Path:
    """The folder `run`, and in it something for each of the long commands to do."""
    with contextlib.chdir(run):
        Path("src").mkdir()
        Path("src/a.txt").write_text("some words to read, and to read again\n" * 50)
        Path("run.toml").write_text(
            '[data]\nurl = "data"\nseq_len = 8\nglobal_batch = 4\n[train]\nsteps = 2\n'
            "[model]\nlayers = 1\nwidth = 16\nheads = 2\n[eval]\nsamples = 4\n"
        )
        Path("recipe.toml").write_text('[[hooks]]\nuse = "prune"\n')
        if not Path("model").exists():  # Which an example that has run before may have made.
            assert call(cli, ["checkpoint", "export", "run", "model"], CliSession()) == 0
        for words in (
            "export data --format parquet --to exported",
            "ingest src --to holed",
            "ingest src --to littered",
            "tokenizer train src --vocab 300 --to small.json",
        ):
            assert call(cli, words.split(), CliSession()) == 0
        Path("src/b.txt").write_text("more of the same")
        assert call(cli, ["ingest", "src", "--to", "holed"], CliSession()) == 0
        assert call(cli, ["delete", "holed", "--source", "*b.txt"], CliSession()) == 0
        assert call(cli, ["train", "run.toml", "--to", "begun"], CliSession()) == 0
        with zipfile.ZipFile("data.zip", "w") as archive:
            for path in Path("data").rglob("*"):
                archive.write(path)
        Path("littered/shards/00").mkdir(parents=True, exist_ok=True)
        Path(f"littered/shards/00/{'0' * 32}.arrow").write_bytes(b"left behind")
    return run


@pytest.fixture
def workspace(places: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a copy of `places` the current folder."""
    shutil.copytree(places, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")


@pytest.mark.usefixtures("workspace")
def test_tracing_a_step_loads_no_torch() -> None:
    program = "import sys; from datastore.training.run.audit import trace; print(trace('run', 3).rows, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"[1-9]\d* False\n", done.stdout)


@pytest.mark.usefixtures("workspace")
def test_a_run_is_resumed_where_its_copy_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli, ["checkpoint", "replicate", "begun", "--to", "backup"], CliSession()) == 0
    assert "steps 2;" in capsys.readouterr().out
    shutil.rmtree("begun")
    assert call(cli, ["resume", "backup", "--set", "train.steps=3"], CliSession()) == 0
    assert call(cli, ["prove", "backup"], CliSession()) == 0
    assert call(cli, ["checkpoint", "replicate", "backup", "--to", "begun"], CliSession()) == 0
    assert call(cli, ["checkpoint", "verify", "begun", "--step", "3"], CliSession()) == 0


def test_the_long_commands_are_those_with_the_option() -> None:
    found = {
        " ".join(path)
        for path, command in COMMANDS.items()
        if "--progress" in {option for parameter in command.params for option in parameter.opts}
    }
    assert found == {*LONG, *UNCOUNTED}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.usefixtures("workspace")
def test_a_long_command_says_how_far_it_is(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datastore.cli.output.LINE_EVERY_S", 0.0)
    assert call(cli, LONG[name].split(), CliSession()) == 0
    err = capsys.readouterr().err
    if name in {"train", "resume", "fork", "compress"}:
        assert "step " in err
    else:
        assert re.search(r"^[a-z0-9 ]+: .+ of .+ \(\d+%\)", err, re.MULTILINE), err


class Hasty(threading.Event):
    """An event whose first wait has passed without it, whatever the time and whether it has come or not."""

    waited = False

    @override
    def wait(self, timeout: float | None = None) -> bool:
        first, self.waited = not self.waited, True
        return not first and super().wait(timeout)


@pytest.mark.parametrize("name", UNCOUNTED)
@pytest.mark.usefixtures("workspace")
def test_a_command_that_cannot_count_says_how_long_it_has_taken(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A command of few milliseconds may end before the other thread has its turn: here the first wait is over at once.
    monkeypatch.setattr("datastore.cli.output.threading", SimpleNamespace(Event=Hasty, Thread=threading.Thread))
    assert call(cli, shlex.split(UNCOUNTED[name]), CliSession()) == 0
    assert re.search(rf"^{name.rsplit(maxsplit=1)[-1]}: [\d.]+ m?s so far$", capsys.readouterr().err, re.MULTILINE)


MORE = [
    "show data",
    "ls data",
    "ls data --documents",
    "log data",
    "diff data@1 data --documents",
    "expire data --keep 5",
    "schema holed",
    "evolve holed --add lang string",
    "sql data 'SELECT count(*) AS documents, sum(tokens) AS tokens FROM documents'",
    "ingest src --to new2 --dry-run",
    "prove run",
    "trace run --step 3",
    "generate run --prompt w1 --tokens 4",
    "runs ls",
    "runs show run",
    "runs compare run run",
    "checkpoint ls run",
    "checkpoint show run",
    "checkpoint gc run --dry-run",
    "checkpoint pin run --step 4",
    "checkpoint drop run --item optim --step 2",
    "doctor",
    "doctor data",
    "doctor --url probed",
    "explain",
    "explain corrupt",
]
"""What reports and takes no time."""

NAMED_BY_DATA = {
    "tags",
    "values",
    "packages",
    "extras",
    "files",
    "tensors",
    "reasons",
    "rejected",
    "skipped",
    "metrics",
    "settings",
    "data",
    "tokens_per_s",
}
"""Objects whose keys are names of somebody else."""


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield every value of a JSON document with its path, and every key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if path.rpartition(".")[2] not in NAMED_BY_DATA and "extras." not in f"{path}.":
                assert re.fullmatch(r"[a-z][a-z0-9_]*", key), f"{path}.{key}"
            yield from leaves(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, path)
    else:
        yield path, value


def json_of(words: str, capsys: pytest.CaptureFixture[str]) -> Any:
    capsys.readouterr()
    line = shlex.split(words.replace(" --progress plain", ""))
    assert call(cli, [*line, "--json"], CliSession()) == 0
    out, err = capsys.readouterr()
    assert "%" not in err
    return json.loads(out)


@pytest.mark.parametrize("words", [*LONG.values(), *MORE])
@pytest.mark.usefixtures("workspace")
def test_json_has_numbers_and_keys_that_programs_like(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path, value in leaves(json_of(words, capsys)):
        if isinstance(value, str):
            assert not re.fullmatch(r"~?[\d.,]+ ?(%|[kMGT]|B|[KMGT]i?B|ms|s|min|h|[KMG]i?B/s)", value), (
                f"{path}: {value}"
            )


@pytest.mark.usefixtures("workspace")
def test_show_log_and_doctor_say_the_same_of_a_version(capsys: pytest.CaptureFixture[str]) -> None:
    shown, logged, checked = (json_of(f"{command} holed", capsys) for command in ("show", "log", "doctor"))
    assert shown["deleted_documents"] > 0
    newest, disk = logged[0], checked["roots"][0]
    assert {name: newest[name] for name in shown if name in newest} == {
        name: value for name, value in shown.items() if name in newest
    } | {"tags": newest["tags"]}
    assert {"version", "documents", "tokens", "deleted_documents", "shards", "size_bytes", "time"} <= set(newest) & set(
        shown
    )
    assert {name: disk[name] for name in ("documents", "tokens", "shards")} == {
        name: shown[name] for name in ("documents", "tokens", "shards")
    }
    texts = []
    for command in ("show", "log", "doctor"):
        assert call(cli, [command, "holed"], CliSession()) == 0
        texts.append(capsys.readouterr().out)
    assert re.search(rf"^documents +{shown['documents']}$", texts[0], re.MULTILINE)
    assert re.search(rf" {shown['documents']} ", texts[1].splitlines()[1])
    assert re.search(rf" {shown['documents']} ", texts[2].splitlines()[-1])
