"""How the command line ends: exit codes and one line on stderr, whatever goes wrong."""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest

from datastore.cli import shell
from datastore.cli.main import cli
from datastore.cli.shell import CliSession, CommandGroup, call, debug_option, last_words
from datastore.document import setting_names
from datastore.errors import ConfigError, CorruptError, RejectedError, StorageError
from datastore.ingestion.settings import IngestSettings


def ending_in(action: Callable[[], object]) -> click.Group:
    """Return a command line with one command `go` that does `action`."""

    @click.group(cls=CommandGroup, params=[debug_option()])
    def line() -> None:
        pass

    @line.command()
    def go() -> object:
        return action()

    return line


def raising(error: BaseException) -> Callable[[], object]:
    def action() -> object:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("world must be positive", world=0, hint="Set it."), 2),
        (RejectedError("too many records were bad", bad=12), 3),
        (CorruptError("bytes do not match their digest", where="shards/ab/x"), 1),
        (StorageError("disk full", url="data/"), 1),
        (OSError(28, "No space left on device", "data/x"), 1),
        (MemoryError(), 1),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_is_one_line_and_a_status(error: Exception, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(ending_in(raising(error)), ["go"], CliSession()) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error[")
    assert err.count("\n") == 1


def test_an_error_has_its_code_its_fact_its_values_and_its_hint(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError("world must\nbe positive", world=0, hint="Set WORLD_SIZE.")
    call(ending_in(raising(error)), ["go"], CliSession())
    line = "error[config]: world must be positive (world=0). Set WORLD_SIZE. See: datastore explain config\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("arguments", [["go", "--colour"], ["come"], ["go", "there"], ["--colour"]])
def test_wrong_use_is_one_line_that_names_the_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(ending_in(lambda: None), arguments, CliSession()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[usage]: ")
    assert "--help`" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--debug", "go"], ["go", "--debug"]])
def test_debug_shows_the_traceback_before_the_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(ending_in(raising(ConfigError("wrong"))), arguments, CliSession()) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error[config]: wrong. See: datastore explain config\n")


def test_an_interrupt_says_that_the_work_goes_on_and_ends_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(ending_in(raising(KeyboardInterrupt())), ["go"], CliSession()) == 130
    assert capsys.readouterr().err.strip().startswith("interrupted: ")


def test_a_command_may_return_its_status() -> None:
    assert call(ending_in(lambda: 1), ["go"], CliSession()) == 1
    assert call(ending_in(lambda: None), ["go"], CliSession()) == 0


def test_a_bug_is_one_line_and_its_traceback_needs_debug(capsys: pytest.CaptureFixture[str]) -> None:
    bug = ZeroDivisionError("division by zero")
    last_words(CliSession())(type(bug), bug, None)
    short = capsys.readouterr().err
    assert short.startswith("error[bug]: ZeroDivisionError: division by zero.")
    assert short.count("\n") == 1
    last_words(CliSession(debug=True))(type(bug), bug, None)
    assert "ZeroDivisionError: division by zero\n" in capsys.readouterr().err


def test_an_error_of_the_users_own_code_is_told_with_its_place(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import json\n\ndef run(text):\n    return json.loads(text)\n")
    scope: dict[str, Callable[[str], None]] = {}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    with pytest.raises(ValueError, match="Expecting value") as caught:
        scope["run"]("no JSON")
    trace = caught.value.__traceback__
    assert trace is not None
    last_words(CliSession())(caught.type, caught.value, trace.tb_next)
    told = capsys.readouterr().err
    assert f"It came from {file}:4, which is no part of datastore" in told
    assert "bug in datastore" not in told
    assert told.count("\n") == 1


def test_an_error_that_our_code_raises_when_theirs_calls_it_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AttributeError) as caught:
        call(cli, ["show", "x"], None)  # type: ignore[arg-type]
    last_words(CliSession())(caught.type, caught.value, caught.value.__traceback__)
    assert "This is a bug in datastore" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = (
        "from datastore.cli.output import say\nimport click, sys\nfrom datastore.cli.shell import call, CliSession\n"
    )
    program += "@click.command()\ndef go():\n    for i in range(100000): say('x' * 80)\n"
    program += "sys.exit(call(go, [], CliSession()))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(80)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.parametrize(
    ("words", "hint", "told"),
    [
        ("delete data", "Or allow it: `allow_missing`.", "Or allow it: --allow-missing."),
        (
            "delete data",
            "Give `ids`, `sources` or a condition (`where`).",
            "Give --id, --source or a condition (--where).",
        ),
        ("ingest a --to b", "Give `workers=1`.", "Give --workers 1."),
        ("ingest a --to b", "Or `operation=overwrite`.", "Or --overwrite."),
        ("ingest a --to b", "With a smaller `task_bytes`.", "With a smaller --set task_bytes=VALUE."),
        ("ingest a --to b", "Or `tokens_key=COLUMN`.", "Or --set tokens_key=COLUMN."),
        ("import a --to b --format mds", "Or `tokens_key=COLUMN`.", "Or --tokens-key COLUMN."),
        ("import a --to b --format mds", "Or `operation=overwrite`.", "Or --set operation=overwrite."),
        ("train run.toml", "Use a smaller `seq_len`.", "Use a smaller --set data.seq_len=VALUE."),
        ("train run.toml", "Raise data.holdout.", "Raise data.holdout. Settings are given as --set KEY=VALUE, too."),
        ("fork runs/a --to b", "Use a smaller `seq_len`.", "Use a smaller --set data.seq_len=VALUE."),
        ("train run.toml", "Wait longer: `timeout_s`.", "Wait longer: `timeout_s`."),  # of ranks, or of the loader
        ("train run.toml", "Name a dataset: `data`.", "Name a dataset: `data`."),  # a table
        ("show data", "Or `operation=overwrite`.", "Or `operation=overwrite`."),
        ("show data", "See `datastore place`.", "See `datastore place`."),
    ],
)
def test_on_the_command_line_a_hint_names_flags(
    words: str, hint: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("it is wrong", hint=hint)

    command = cli.commands[words.partition(" ")[0]]
    monkeypatch.setattr(command, "callback", refuse)
    assert call(cli, words.split(), CliSession()) == 2
    assert capsys.readouterr().err == f"error[config]: it is wrong. {told} See: datastore explain config\n"


def hints() -> Iterator[tuple[str, str]]:
    """Yield every hint that is written down in the package, with its place."""
    package = Path(shell.__file__).parents[1]
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for keyword in node.keywords if isinstance(node, ast.Call) else ():
                if keyword.arg == "hint":
                    parts = keyword.value.values if isinstance(keyword.value, ast.JoinedStr) else [keyword.value]
                    yield (
                        f"{path.relative_to(package).as_posix()}:{node.lineno}",
                        "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in parts),
                    )


def test_a_hint_has_arguments_in_backticks_so_that_they_can_become_flags() -> None:
    names = {name for command in cli.commands.values() for name in shell._flags(command) if "_" in name}
    names |= {name for name in setting_names(IngestSettings) if "_" in name}
    assert {"allow_missing", "task_bytes"} <= names
    plain = [
        f"{place}: {hint}"
        for place, hint in hints()
        for word in re.findall(r"[a-z_]+", re.sub(r"`[^`]*`", "", hint))
        if word in names
    ]
    assert plain == []


def test_no_hint_of_a_training_takes_a_setting_of_a_hook_for_one_of_the_run() -> None:
    train = cli.commands["train"]
    said = [hint for place, hint in hints() if place.startswith("training/")]
    assert len(said) > 100
    bare = [f"`{found[0]}`" for hint in said for found in re.finditer(r"(?<=`)[a-z_]+(?=(=[^`]*)?`)", hint)]
    assert [name for name in bare if shell._in_flags(name, train).startswith("--set")] == []


def test_a_process_that_was_a_rank_leaves_without_the_end_of_the_interpreter() -> None:
    """A thread of gloo may abort a process that ends in order (torch 2.13); what it said is out, and its status is kept."""
    program = """
import atexit, os, sys
from datastore.cli.main import main
from datastore.training.parallel import ranks
atexit.register(lambda: os._exit(77))
ranks._GROUPS.extend([object()] * int(sys.argv.pop()))
main()
"""
    for groups, wrong, status in (("1", [], 0), ("1", ["--wrong"], 2), ("0", [], 77)):
        command = [sys.executable, "-c", program, "--version", *wrong, groups]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        assert ("No such option" in done.stderr) if wrong else done.stdout.startswith("datastore ")
