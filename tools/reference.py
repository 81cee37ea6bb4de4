"""Write docs/commands.md, the page of all commands, from what the command line says of itself.

`python tools/reference.py` writes it; with `--check` it exits with 1 if the page is not what would be written.
"""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from datastore.cli.main import cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
LONG = 36
"""Characters of an option and its choices that stand side by side."""

HEAD = """\
# Commands

What `datastore COMMAND --help` says, on one page. `python tools/reference.py` writes it; a test runs every example.

Everything that reports takes `--json` and then prints one JSON document on stdout: sizes are bytes, times are seconds, and
keys are written like_this. Every command takes `--debug`, which shows the traceback of an error.

What can take long shows its progress on stderr: how much is done, how fast, and what time is left. On a terminal that is a
bar. Elsewhere it is a line every ten seconds, or with `--json` nothing. `--progress` chooses `bar`, `plain` or `none`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed; one line on stderr says what to do |
| 2 | wrong use: an option, an argument or a setting |
| 3 | more input was rejected than the limit allows; nothing was committed |
| 130 | interrupted; the same command goes on |
"""


def reference() -> str:
    """Return the page."""
    return "\n".join([HEAD, *(section(path, command) for path, command in commands(cli, "datastore"))])


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield every command below `group` with its full name."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def section(path: str, command: click.Command) -> str:
    """Return the part of the page about one command."""
    context = click.Context(command, info_name=path)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## `{path}`", "", inspect.cleandoc(command.help or "").replace("\b\n", ""), ""]
    lines += ["```text", f"{path} {usage}", "```", ""]
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    rows = [
        record for option in options if (record := option.get_help_record(context)) and "--debug" not in option.opts
    ]
    if rows:
        lines += ["| option | |", "|---|---|", *(row(flags, told) for flags, told in rows), ""]
    examples = [line.strip() for line in (command.epilog or "").splitlines()[2:]]
    # Blocks of `sh` are run by the tests of the docs, and this one would go on until somebody ends it.
    language = "text" if path in _SERVES else "sh"
    return "\n".join([*lines, f"```{language}", *examples, "```", ""])


_SERVES = {"datastore ui"}


def row(flags: str, told: str) -> str:
    """Return the row of an option. Many choices stand in the second column, or the first would take all the room."""
    flags = flags.replace("|None", "")
    if "|" in flags and len(flags) > LONG:
        flags, _, choices = flags.partition("[")
        flags += "CHOICE"
        told += f" One of {', '.join(choices.rstrip(']').split('|'))}."
    return f"| `{in_cell(flags)}` | {in_cell(told)} |"


def in_cell(text: str) -> str:
    """Return `text` as a cell of a table: GitHub ends one at a bare `|`, in code, too."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    text = reference()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/commands.md is not what the command line says: run python tools/reference.py")
