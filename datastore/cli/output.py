"""The output of commands: text for people or one JSON document on stdout, progress on stderr if that is a terminal."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from datastore.cli.shell import BROKEN_PIPE, silence_stdout

if TYPE_CHECKING:
    from datastore.storage.base import Storage

__all__ = ["fields", "json_option", "moment", "progress_bar", "say", "say_json", "table"]

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


def say(text: str = "") -> None:
    """Print `text` and a newline; if the reader has gone (`| head`), end quietly."""
    try:
        sys.stdout.write(text + "\n")
        if sys.stdout.line_buffering:
            sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        raise click.exceptions.Exit(BROKEN_PIPE) from None


def say_json(value: object, *, storage: "Storage | None" = None) -> None:
    """Print `value` as one JSON document: plain values, documents and frozen dataclasses.

    With `storage` the document, an object, has one key more: what that storage was asked for.
    """
    import msgspec

    if storage is not None:
        value = msgspec.to_builtins(value, enc_hook=_plain) | {"storage": storage.statistics()}
    say(msgspec.json.format(msgspec.json.encode(value, enc_hook=_plain), indent=2).decode())


def _plain(value: object) -> object:
    """Return a NumPy number as a Python one; paths and the like as text."""
    item = getattr(value, "item", None)
    return item() if callable(item) else str(value)


def fields(values: Mapping[str, object]) -> None:
    """Print one `name  value` line for each entry, values aligned; entries that are None are left out."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        if value is not None:
            say(f"{name:<{width}}  {value}")


def moment(text: str) -> str:
    """Return a stored time (UTC, ISO 8601) as people read it.

    >>> moment("2026-11-24T22:34:25.582583Z")
    '2026-11-24 22:34:25 UTC'
    """
    return f"{text[:19].replace('T', ' ')} UTC"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print `rows` in aligned columns below `header`; columns that hold only numbers stand to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    right = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(header))]
    for line in [list(header), *cells]:
        parts = [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ]
        say("  ".join(parts).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value).lower()
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function `(done, total)` that moves a bar on stderr, or None if stderr is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns: tuple[Any, ...] = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
