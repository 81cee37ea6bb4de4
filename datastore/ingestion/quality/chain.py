"""Filters in a row: each sees what the one before has left, and each is counted.

A name such as `gopher_quality: few_letters` says which filter and which of its rules. If the same filter is there twice, the
second is called `gopher_quality 2`.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from datastore.errors import ConfigError
from datastore.ingestion.quality.filter import Filter
from datastore.ingestion.quality.gopher import GopherQuality, GopherRepetition
from datastore.ingestion.quality.outside import Function, Language
from datastore.ingestion.quality.plain import Length, Lines, Pattern, Symbols
from datastore.ingestion.quality.redaction import Redact
from datastore.ingestion.quality.split import Split
from datastore.ingestion.quality.text import Dropped, Text
from datastore.ingestion.quality.web import C4, FineWeb

__all__ = ["AnyFilter", "Chain", "Judged", "identities"]

AnyFilter = (
    GopherQuality
    | GopherRepetition
    | C4
    | FineWeb
    | Length
    | Lines
    | Symbols
    | Pattern
    | Language
    | Function
    | Redact
    | Split
)
"""What a table of `[[filters]]` may be."""


class Judged(NamedTuple):
    """What filters make of a document."""

    text: str
    """What is left of it; if it was dropped, as the filter saw it that dropped it."""

    dropped: str
    """Filter and rule; empty if it is kept."""

    changes: Counter[str]
    """What was changed in it, if it is kept."""


class Chain:
    """The filters of an ingest, ready for use."""

    def __init__(self, filters: Sequence[Filter], *, expected: Sequence[str] | None = None) -> None:
        """Look up what the filters need.

        Raises:
            ConfigError: they are not as `expected`, the `identities` of when the ingest was planned.
            MissingError, DependencyError: a file, module or library is not there.
        """
        found = identities(filters)
        if expected is not None and found != tuple(expected):
            raise ConfigError(
                "the model or the code of a filter changed while it was in use",
                filters=[
                    name for name, one, other in zip(_names(filters), found, expected, strict=True) if one != other
                ],
                hint="Run the same command again when they stay as they are.",
            )
        self._filters = list(zip(_names(filters), filters, strict=True))

    def judge(self, text: Text) -> Judged:
        """Return what the filters make of `text`."""
        changes: Counter[str] = Counter()
        for name, each in self._filters:
            verdict = each.apply(text)
            if isinstance(verdict, Dropped):
                return Judged(text.text, f"{name}: {verdict.reason}", Counter())
            if verdict is not text:
                changes[f"{name}: documents"] += 1
                changes.update({f"{name}: {what}": count for what, count in verdict.changes.items()})
                text = Text(verdict.text, about=text.about)
        return Judged(text.text, "", changes)


def identities(filters: Sequence[Filter]) -> tuple[str, ...]:
    """Return what each filter depends on beside its settings.

    Raises:
        ConfigError, MissingError, DependencyError: as `Filter.identity`.
    """
    return tuple(each.identity() for each in filters)


def _names(filters: Sequence[Filter]) -> list[str]:
    seen: Counter[str] = Counter()
    names = []
    for each in filters:
        name = str(each.__struct_config__.tag)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return names
