"""Every code block of README and docs/ runs, every link leads somewhere, every command is described.

Blocks are told apart by their language: `sh` and `python` are run, `sql` goes through DuckDB, `toml` and `json` must
parse, `text` is output or a drawing. A `python alone` block runs in a process of its own, a `python slow` one likewise, in a test
that is marked slow and skipped where what it imports is missing. In a table whose last column is headed `here`, the code in that column
runs, too, in the order of the page. A page whose first line holds `starts empty` runs in a folder with nothing but
`src/`; any other finds there what the tutorial makes: `tok.json`, `data/code`, `run.toml` and `runs/first`; and
`data/text`, the same files as records.
"""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from _pytest.mark import ParameterSet

import datastore as public_names
from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[ ]?([^\n]*)\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^\|[^\n]*\| here \|\n\|[-| ]+\|\n((?:\|[^\n]*\|\n)+)", re.MULTILINE)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
RUN = """
[data]
url = "data/code"
seq_len = 64
global_batch = 8

[model]
layers = 2
width = 64
heads = 2

[optim]
warmup = 5

[train]
steps = 12

[checkpoint]
every = 4

[eval]
every = 6
samples = 16
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    line: int
    mark: str = ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[1], match[3], text.count("\n", 0, match.start()) + 1, match[2]) for match in FENCE.finditer(text)
    ]
    return sorted(found + cells(text), key=lambda block: block.line)


def cells(text: str) -> list[Block]:
    """Return the code in the last column of tables that are headed `here`."""
    return [
        Block(
            "sh" if code.startswith("datastore ") else "python", code, text.count("\n", 0, table.start(1)) + 1 + number
        )
        for table in TABLE.finditer(text)
        for number, row in enumerate(table[1].splitlines())
        for code in re.findall(r"`([^`]+)`", row.rsplit(" | ", 1)[1])
    ]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def headings(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of the headings of `page`."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def datastore(line: str) -> None:
    """Run one command line in this process and expect success."""
    assert call(cli, shlex.split(line, comments=True)[1:], CliSession()) == 0, line


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but `src/`: some Python files."""
    folder = tmp_path_factory.mktemp("sources")
    for package in ("json", "email"):
        shutil.copytree(
            Path(os.__file__).parent / package, folder / "src" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return folder


@pytest.fixture(scope="session")
def finished(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which somebody has followed the tutorial up to a run of twelve steps."""
    folder = tmp_path_factory.mktemp("finished") / "w"
    shutil.copytree(sources, folder)
    (folder / "run.toml").write_text(RUN, encoding="utf-8")
    (folder / "recipe.toml").write_text('[[hooks]]\nuse = "prune"\nratio = 2.0\nschedule = "once"\n', encoding="utf-8")
    with contextlib.chdir(folder):
        datastore("datastore tokenizer train src/ --vocab 1024 --to tok.json")
        datastore("datastore ingest src/ --to data/code --tokenizer tok.json")
        datastore("datastore ingest src/ --to data/text")
        datastore("datastore train run.toml --to runs/first")
    return folder


@pytest.fixture
def workspace(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the page `request.param` is run."""
    fresh = "starts empty" in request.param.read_text(encoding="utf-8").partition("\n")[0]
    made: Path = request.getfixturevalue("sources" if fresh else "finished")
    folder = tmp_path / "w"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def case(page: Path) -> ParameterSet:
    """A page to run. What frameworks warn of is theirs to mend."""
    marks = [pytest.mark.filterwarnings("ignore")] if page.name == "frameworks.md" else []
    return pytest.param(page, page, marks=marks, id=name_of(page))


@pytest.mark.parametrize(("page", "workspace"), [case(page) for page in PAGES if blocks(page)], indirect=["workspace"])
@pytest.mark.usefixtures("workspace")
def test_every_block_runs(page: Path) -> None:
    names: dict[str, object] = {"__name__": "__docs__"}
    for block in blocks(page):
        where = f"{name_of(page)}:{block.line}"
        assert block.language in RUNNERS, f"{where}: a block needs one of the languages {', '.join(RUNNERS)}"
        if block.mark == "alone":
            run_alone(block, where)
        elif block.mark != "slow":
            RUNNERS[block.language](block.text, names, where)


SLOW = [page for page in PAGES if any(block.mark == "slow" for block in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize(("page", "workspace"), [case(page) for page in SLOW], indirect=["workspace"])
@pytest.mark.usefixtures("workspace")
def test_every_slow_block_runs(page: Path) -> None:
    for block in blocks(page):
        if block.mark == "slow":
            for name in set(re.findall(r"^(?:import|from) (\w+)", block.text, re.MULTILINE)):
                if importlib.util.find_spec(name) is None:
                    pytest.skip(f"{name} is not installed")
            run_alone(block, f"{name_of(page)}:{block.line}")


def run_alone(block: Block, where: str) -> None:
    """Run a block in a process of its own: what it imports changes the process that it is in."""
    Path("block.py").write_text(block.text, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "block.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{where}: {done.stderr[-2000:]}"


def run_python(text: str, names: dict[str, object], where: str) -> None:
    exec(compile(text, where, "exec"), names)


def run_shell(text: str, _names: dict[str, object], where: str) -> None:
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "datastore":
            datastore(line)
        elif words[0].startswith("tools/"):
            assert os.access(ROOT / words[0], os.X_OK), f"{where}: no such tool: {words[0]}"
        elif words[0] == "pip":
            check_install(words, where)
        else:
            pytest.fail(f"{where}: the tests cannot run {words[0]!r}")


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def check_install(words: list[str], where: str) -> None:
    """Check that the extras named by a `pip install` line exist."""
    extras = project()["optional-dependencies"]
    named = [extra for word in words for extra in re.findall(r"\[(.*?)\]", word)]
    for extra in ",".join(named).split(",") if named else []:
        assert extra in extras, f"{where}: no such extra: {extra}"


def run_sql(text: str, _names: dict[str, object], _where: str) -> None:
    import duckdb

    assert duckdb.sql(text).fetchall() is not None


def check_toml(text: str, _names: dict[str, object], _where: str) -> None:
    tomllib.loads(text)


def check_json(text: str, _names: dict[str, object], _where: str) -> None:
    json.loads(text)


def check_nothing(_text: str, _names: dict[str, object], _where: str) -> None:
    """A drawing or some output: there is nothing to run."""


RUNNERS = {
    "python": run_python,
    "sh": run_shell,
    "sql": run_sql,
    "toml": check_toml,
    "json": check_json,
    "text": check_nothing,
}


@pytest.mark.parametrize("path", [*PAGES, *(ROOT / "datastore").rglob("*.py")], ids=name_of)
def test_nobody_is_led_to_the_package_that_is_called_as_we_are(path: Path) -> None:
    """`datastore` on PyPI is somebody else's."""
    text = path.read_text(encoding="utf-8")
    wrong = re.findall(r"install datastore\b|(?<![\w-])datastore\[.*?\]|version\([\"']datastore[\"']\)", text)
    assert wrong == [], f"{name_of(path)} must say {project()['name']}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name_of(page)} links to {target}, which does not exist"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{name_of(page)} links to {target}, but there is no such heading"


def test_every_page_can_be_reached_from_the_index() -> None:
    reached = {ROOT / "docs" / "index.md"}
    waiting = list(reached)
    while waiting:
        page = waiting.pop()
        targets = LINK.findall(page.read_text(encoding="utf-8"))
        pages = {(page.parent / target.partition("#")[0]).resolve() for target in targets if "://" not in target}
        fresh = {found for found in pages if found.suffix == ".md" and found.exists()} - reached
        reached |= fresh
        waiting.extend(fresh)
    assert set(PAGES) - reached - {ROOT / "README.md"} == set()


def test_every_public_name_is_used_in_an_example() -> None:
    code = "\n".join(block.text for page in PAGES for block in blocks(page) if block.language == "python")
    assert [name for name in public_names.__all__ if not re.search(rf"\bds\.{name}\b", code)] == []


def test_the_page_of_commands_is_what_the_command_line_says() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "docs" / "commands.md").read_text(encoding="utf-8") == tool.reference(), (
        "run python tools/reference.py"
    )


def test_the_readme_is_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def commands(group: click.Group, path: str = "datastore") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


@pytest.mark.parametrize("path", [path for path, _ in commands(cli)])
def test_every_command_is_described(path: str) -> None:
    assert f"## `{path}`" in (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
