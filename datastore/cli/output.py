"""The output of commands: text for people or one JSON document on stdout, progress on stderr.

Progress is a bar on a terminal. Elsewhere, in a log, it is a line every ten seconds, so that a command which takes less
says nothing; and with `--json` nothing, for who reads that often reads both streams as one. `--progress` says otherwise.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from datastore.cli.shell import BROKEN_PIPE, CliSession, silence_stdout
from datastore.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from datastore.storage.base import Storage

__all__ = [
    "LINE_EVERY_S",
    "PlainLines",
    "ProgressWords",
    "StagedProgress",
    "fields",
    "json_option",
    "moment",
    "progress_kind",
    "progress_option",
    "say",
    "say_json",
    "table",
    "waiting",
    "with_progress",
]

T = TypeVar("T")

LINE_EVERY_S = 10.0
"""How often a line is printed where there is no terminal."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")


def _remember_progress(context: click.Context, _parameter: click.Parameter, kind: str | None) -> None:
    if kind is not None:
        context.ensure_object(CliSession).progress = kind


progress_option = click.option(
    "--progress",
    type=click.Choice(["bar", "plain", "none"]),
    expose_value=False,
    callback=_remember_progress,
    help="Show progress on stderr: as a bar (on a terminal), a line every 10 s (elsewhere), or not at all (with --json).",
)


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


def progress_kind() -> str:
    """Return how to show progress: `bar`, `plain` or `none`, as `--progress` says or as suits stderr."""
    context = click.get_current_context(silent=True)
    session = context.find_object(CliSession) if context else None
    if session is not None and session.progress:
        return session.progress
    if sys.stderr.isatty():
        return "bar"
    return "none" if context and context.params.get("as_json") else "plain"


class ProgressWords:
    """Says how far something is: `1 GiB of 4 GiB (25%), 100 MiB/s, 30.7 s left`.

    The rate counts from the first call on: what an earlier run has done was not done since.
    """

    def __init__(self, *, unit: str = "bytes", clock: Callable[[], float] = time.monotonic) -> None:
        self._unit = unit
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> str:
        """Return the words; a `total` of 0 is one that nobody knows."""
        now = self._clock()
        first_done, started = self._first = self._first or (done, now)
        part = format_bytes(done) if self._unit == "bytes" else f"{done:,}"
        parts = [f"{part} of {self._amount(total)} ({done / total:.0%})" if total else self._amount(done)]
        if done > first_done and now > started:
            rate = (done - first_done) / (now - started)
            parts.append(f"{format_bytes(rate)}/s" if self._unit == "bytes" else f"{rate:,.3g} {self._unit}/s")
            parts += [f"{format_seconds((total - done) / rate)} left"] if total > done else []
        return ", ".join(parts)

    def _amount(self, count: int) -> str:
        return format_bytes(count) if self._unit == "bytes" else f"{count:,} {self._unit}"


class PlainLines:
    """Prints a line on stderr if the last one, or the beginning, is ten seconds ago."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def say(self, words: Callable[[], str]) -> None:
        """Print `words()` if it is time."""
        now = self._clock()
        if now - self._last >= LINE_EVERY_S:
            self._last = now
            sys.stderr.write(f"{words()}\n")
            sys.stderr.flush()


def with_progress(title: str, function: Callable[..., T], *, unit: str = "bytes", **arguments: Any) -> T:
    """Return `function(**arguments, progress=...)`, and show meanwhile how far it is; `unit` is what it counts."""
    kind = progress_kind()
    if kind == "none":
        return function(**arguments, progress=None)
    words = _StageWords(title, unit)
    if kind == "bar":
        with _bar(title, words) as show:
            return function(**arguments, progress=show)
    lines = PlainLines()

    def tell(done: int, total: int, stage: str = "") -> None:
        text = words(done, total, stage)  # Each call counts: the rate begins with the first.
        lines.say(lambda: ": ".join(filter(None, text)))

    return function(**arguments, progress=tell)


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show how long the body has taken so far: for work of which nobody knows how much there is, such as a query."""
    kind, started, over = progress_kind(), time.monotonic(), threading.Event()
    if kind == "none":
        yield
        return

    def tell(show: Callable[[str], object], every_s: float) -> None:
        while not over.wait(every_s):
            show(f"{format_seconds(time.monotonic() - started)} so far")

    with ExitStack() as stack:
        if kind == "bar":
            bar = stack.enter_context(_bar(title, lambda _done, _total, stage: (title, stage)))
            shown: tuple[Callable[[str], object], float] = (partial(bar, 0, 0), 1.0)
        else:
            shown = (lambda words: sys.stderr.write(f"{title}: {words}\n"), LINE_EVERY_S)
        thread = threading.Thread(target=tell, args=shown, name="datastore-waiting", daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(over.set)
        yield


class StagedProgress(Protocol):
    """A `Progress` that may also be told a stage, whose rate is its own."""

    def __call__(self, done: int, total: int, stage: str = "") -> None:
        """Take how much is done, of how much, in which stage."""


class _StageWords:
    """Says what is done, and how far it is: a title with its stage, and the words of `ProgressWords`."""

    def __init__(self, title: str, unit: str) -> None:
        self._title = title
        self._unit = unit
        self._stage = ""
        self._words = ProgressWords(unit=unit)

    def __call__(self, done: int, total: int, stage: str) -> tuple[str, str]:
        if stage != self._stage:
            self._stage, self._words = stage, ProgressWords(unit=self._unit)
        words = self._words(done, total)
        return (f"{self._title}, {stage}" if stage else self._title), words if done or total else ""


@contextmanager
def _bar(title: str, words: Callable[[int, int, str], tuple[str, str]]) -> Iterator[StagedProgress]:
    """Yield what moves a bar on stderr, which is gone in the end."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    columns: tuple[Any, ...] = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    with Bars(*columns, console=Console(stderr=True, force_terminal=True), transient=True) as bars:
        task = bars.add_task(title, total=None, words="")

        def show(done: int, total: int, stage: str = "") -> None:
            what, far = words(done, total, stage)
            bars.update(task, description=what, completed=done, total=total or None, words=far)

        yield show
