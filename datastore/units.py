"""Numbers with units, as text and back: `64 MiB`, `1.2 M`, `3 min 20 s`."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from datastore.errors import ConfigError

__all__ = ["Progress", "format_bytes", "format_count", "format_seconds", "parse_bytes", "parse_seconds", "telling"]

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""What a long operation tells now and then: how much is done, and how much there is."""


def telling(
    items: Iterable[T], progress: Progress | None, *, size: Callable[[T], int] = lambda _: 1, total: int | None = None
) -> Iterator[T]:
    """Yield `items`; tell `progress` of each once it has been dealt with. `total` is needed unless they are a sequence."""
    if total is None:
        total = sum(map(size, items)) if isinstance(items, Sequence) else 0
    done = 0
    for item in items:
        yield item
        done += size(item)
        if progress is not None:
            progress(done, total)


_BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def parse_bytes(text: str) -> int:
    """Return the number of bytes that `text` names.

    Only binary units are accepted: `64MB` is ambiguous in practice (10^6 or 2^20), and a cache that is 5 %
    smaller than planned is hard to notice.

    Raises:
        ConfigError: `text` is not a number followed by B, KiB, MiB, GiB or TiB.

    >>> parse_bytes("1.5 GiB")
    1610612736
    """
    found = _SIZE.fullmatch(text)
    if found is None or found[2] not in _BINARY:
        raise ConfigError("not a size in bytes", text=text, hint="Write a number and B, KiB, MiB, GiB or TiB.")
    return round(float(found[1]) * _BINARY[found[2]])


def parse_seconds(text: str) -> float:
    """Return the number of seconds that `text` names.

    Raises:
        ConfigError: `text` is not a number followed by s, min, h, d or w.

    >>> parse_seconds("1.5 h")
    5400.0
    """
    found = _SIZE.fullmatch(text)
    if found is None or found[2] not in _SECONDS:
        raise ConfigError("not a time", text=text, hint="Write a number and s, min, h, d or w: 30d.")
    return float(found[1]) * _SECONDS[found[2]]


def format_bytes(count: float) -> str:
    """Return `count` bytes in the largest binary unit that keeps it above one.

    >>> format_bytes(1610612736)
    '1.5 GiB'
    """
    for unit, size in reversed(_BINARY.items()):
        if abs(count) >= size and unit != "B":
            return f"{_three_digits(count / size)} {unit}"
    return f"{count:.0f} B"


def format_count(count: float) -> str:
    """Return `count` with a decimal suffix (k, M, G, T) and three digits.

    >>> format_count(12_345_678)
    '12.3 M'
    """
    for suffix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{_three_digits(count / size)} {suffix}"
    return f"{count:.0f}" if float(count).is_integer() else _three_digits(count)


def format_seconds(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> format_seconds(200)
    '3 min 20 s'
    """
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def _three_digits(value: float) -> str:
    """Return `value` with three digits, or as a whole number from 1,000 on, where `.3g` would write 1e+03."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"
