"""Things as people see them at a glance: a histogram as one line of text, tables as HTML for notebooks, and pictures.

HTML is what `_repr_html_` of a class returns, and a notebook shows. It names no colours and no fonts, so it suits a dark notebook
as well, and every text in it is escaped.
"""

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from datastore.errors import ConfigError, DependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure_class", "html_fields", "html_table", "save_figure", "short_names", "sparkline", "upper_half"]

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(counts: Sequence[int]) -> str:
    """Return a bar for each of `counts`, as high as its share of the largest; any that is not 0 is seen.

    >>> sparkline([1, 8, 0, 2])
    '▂█▁▃'
    """
    most = max(counts, default=0) or 1
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in counts)


def short_names(urls: Sequence[str]) -> list[str]:
    """Return the end of each of `urls` by which it is told from the others: the last part, or as many as that takes.

    >>> short_names(["runs/first", "runs/second/", "old/second"])
    ['first', 'runs/second', 'old/second']
    """
    parts = [url.rstrip("/").split("/") for url in urls]

    def ends(count: int) -> list[str]:
        return ["/".join(each[-count:]) for each in parts]

    found = ends(1)
    for count in range(2, max(map(len, parts), default=0) + 1):
        longer, seen = ends(count), Counter(found)
        found = [name if seen[name] == 1 else more for name, more in zip(found, longer, strict=True)]
    return found


def upper_half(counts: Sequence[int]) -> int:
    """Return the first number up to which at least half of all `counts` lie.

    >>> upper_half([0, 1, 8, 0, 2])
    2
    """
    total = sum(counts)
    return next(number for number, seen in enumerate(accumulate(counts)) if 2 * seen >= total)


def html_fields(title: str, fields: Mapping[str, object]) -> str:
    """Return what is known of one thing, a line for each of `fields`; those that are None are left out.

    >>> html_fields("Dataset", {"documents": "1,000", "deleted": None})
    '<table><caption style="text-align:left">Dataset</caption><tbody><tr><th style="text-align:left">documents</th><td style="text-align:left">1,000</td></tr></tbody></table>'
    """
    rows = "".join(f"<tr>{_cell(name, 'th')}{_cell(value)}</tr>" for name, value in fields.items() if value is not None)
    return f"<table>{_caption(title)}<tbody>{rows}</tbody></table>"


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return many things of a kind, a row for each: numbers to the right, everything else to the left.

    >>> html_table("Steps", ["step", "time"], [[7, "now"]]).count("<tr>")
    2
    """
    head = "".join(_cell(name, "th") for name in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f"<table>{_caption(title)}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _caption(title: str) -> str:
    return f'<caption style="text-align:left">{escape(title)}</caption>'


def _cell(value: object, tag: str = "td") -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = f"{value:,}" if is_number else str(value)
    return f'<{tag} style="text-align:{"right" if is_number else "left"}">{escape(text)}</{tag}>'


def figure_class() -> "type[Figure]":
    """Return what a picture begins with.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional
    except ImportError:
        raise DependencyError(
            "a picture needs matplotlib", hint="Install it: `pip install 'llm-datastore[plot]'`."
        ) from None

    class Picture(Figure):
        """A figure that a notebook shows by itself: one of matplotlib alone needs its `pyplot`, which nobody has loaded."""

        def _repr_png_(self) -> bytes:
            made = io.BytesIO()
            self.savefig(made, format="png")
            return made.getvalue()

    return Picture


def save_figure(figure: "Figure", path: str | Path) -> None:
    """Save `figure` as what the end of `path` says.

    Raises:
        ConfigError: it cannot be saved there, or not as such.
    """
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the picture cannot be saved: {error}", path=str(path), hint="Name a .png or .svg file."
        ) from None
