"""Every error code has its explanation, on the page and in a terminal, and whoever gets an error is told of it."""

import ast
import importlib.util
import inspect
import json
import re
import shlex
from pathlib import Path
from types import ModuleType
from typing import get_args

import click
import pytest

import datastore
from datastore import errors
from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call
from datastore.errors import ConfigError, DatastoreError
from datastore.ingestion.reading.listing import SkipReason
from datastore.ingestion.reading.rejects import Reason
from datastore.reasons import LEFT_OUT, REJECTED
from datastore.troubleshooting import DOCS_URL, EXPLANATIONS, Explanation, explain

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
CODES = [each.code for each in EXPLANATIONS]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("troubleshooting_page", ROOT / "tools" / "troubleshooting.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds() -> dict[str, type[DatastoreError]]:
    found = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, DatastoreError)]
    return {kind.code: kind for kind in found}


def codes_of_the_command_line() -> set[str]:
    """Return the codes that stand in `cli/shell.py` itself: the first of each pair that is returned, and in `error[...]`."""
    text = (ROOT / "datastore" / "cli" / "shell.py").read_text(encoding="utf-8")
    pairs = [node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Return)]
    first = [pair.elts[0] for pair in pairs if isinstance(pair, ast.Tuple)]
    written = {each.value for each in first if isinstance(each, ast.Constant)}
    return written | set(re.findall(r"error\[([a-z]+)\]: \{", text))


def test_every_code_has_its_explanation_and_none_is_of_no_code() -> None:
    assert {"usage", "bug", "system", "memory"} <= codes_of_the_command_line()
    assert sorted(CODES) == sorted(kinds().keys() | codes_of_the_command_line())


def test_no_error_class_stands_outside_the_tree() -> None:
    assert set(DatastoreError.__subclasses__()) <= set(kinds().values())


@pytest.mark.parametrize("told", EXPLANATIONS, ids=CODES)
def test_it_names_the_class_and_the_exit_code(told: Explanation, capsys: pytest.CaptureFixture[str]) -> None:
    if told.error:
        kind = kinds()[told.code]
        assert getattr(datastore, told.error) is kind

        @click.command()
        def fail() -> None:
            raise kind("it failed")

        assert call(fail, [], CliSession()) == told.status
        assert capsys.readouterr().err.endswith(f"See: datastore explain {told.code}\n")


@pytest.mark.parametrize("told", EXPLANATIONS, ids=CODES)
def test_it_has_a_way_out_for_each_case_and_pages_that_exist(told: Explanation) -> None:
    assert told.cases
    assert all(case.endswith(".") and way_out.endswith(".") for case, way_out in told.cases)
    assert all((ROOT / "docs" / page).is_file() for page in told.pages)


@pytest.mark.parametrize("told", EXPLANATIONS, ids=CODES)
def test_every_command_and_option_that_it_names_is_there(told: Explanation) -> None:
    text = " ".join(f"{case} {way_out}" for case, way_out in told.cases)
    options = {flag for command in all_commands(cli) for option in command.params for flag in option.opts}
    for code in re.findall(r"`([^`]+)`", text):
        words = shlex.split(code)
        if words[0] == "datastore" and words[1].islower():
            command: click.Command = cli
            for word in words[1:]:
                if isinstance(command, click.Group):
                    command = command.commands[word]
        for word in words:
            assert not word.startswith("--") or word in options | {"--help"}, f"{told.code}: {word}"


def all_commands(group: click.Group) -> list[click.Command]:
    found: list[click.Command] = []
    for command in group.commands.values():
        found += all_commands(command) if isinstance(command, click.Group) else [command]
    return found


def test_the_page_is_what_is_said_in_a_terminal(tool: ModuleType) -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == tool.page(), "run python tools/troubleshooting.py"
    assert re.findall(r"^## (\w+)$", text, re.MULTILINE) == CODES


def test_every_reason_of_an_ingest_is_explained_and_no_other() -> None:
    assert set(REJECTED) == set(get_args(Reason))
    assert set(LEFT_OUT) == set(get_args(SkipReason))
    assert not set(CODES) & (REJECTED.keys() | LEFT_OUT.keys())
    assert all(means.endswith(".") for means in (REJECTED | LEFT_OUT).values())


@pytest.mark.parametrize("reason", ["invalid_json", "hidden"])
def test_a_terminal_explains_a_reason(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli, ["explain", reason], CliSession()) == 0
    assert (REJECTED | LEFT_OUT)[reason] in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("code", CODES)
def test_a_terminal_has_all_of_it(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli, ["explain", f"error[{code}]:"], CliSession()) == 0
    out = capsys.readouterr().out
    told = explain(code)
    for line in [told.means, *(text for case in told.cases for text in case)]:
        assert line in out
    assert all(f"{DOCS_URL}/{page}" in out for page in told.pages)


def test_a_program_gets_it_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(cli, ["explain", "--json"], CliSession()) == 0
    assert [each["code"] for each in json.loads(capsys.readouterr().out)] == CODES
    assert call(cli, ["explain", "storage", "--json"], CliSession()) == 0
    assert json.loads(capsys.readouterr().out)["cases"][0]["what_to_do"]


def test_a_code_that_is_misspelt_is_recognized() -> None:
    with pytest.raises(ConfigError, match="Did you mean corrupt"):
        explain("corupt")
    with pytest.raises(ConfigError, match="There are: config, "):
        explain("E1234")
