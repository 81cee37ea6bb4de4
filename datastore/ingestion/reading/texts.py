r"""The text of a record that is made of several of its fields, by a template.

A template names fields in braces, as Python's `format` does, and nothing more: `{title}\n\n{body}`. A record that lacks one of them, or
has something there that is no text, has no text; an empty field is one.
"""

import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datastore.errors import ConfigError

__all__ = ["Template", "parse_template"]

_ESCAPES = {"\\n": "\n", "\\t": "\t"}
"""A shell hands on a line feed that is written so as two signs."""


class Template(NamedTuple):
    """What stands before each field, and the field; the last has none."""

    parts: tuple[tuple[str, str], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that a record must have."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name))

    def fill(self, row: Mapping[str, Any]) -> str | None:
        """Return the text of `row`; None if a field is not there, or no text."""
        texts = {name: row.get(name) for name in self.fields}
        if not all(isinstance(text, str) for text in texts.values()):
            return None
        return "".join(f"{between}{texts[name] if name else ''}" for between, name in self.parts)

    def fill_all(self, columns: Mapping[str, Sequence[Any]]) -> list[str | None]:
        """Return the text of each row of `columns`."""
        rows = zip(*(columns[name] for name in self.fields), strict=True)
        return [self.fill(dict(zip(self.fields, map(_decoded, row), strict=True))) for row in rows]


def parse_template(template: str) -> Template:
    r"""Return what `template` says.

    Raises:
        ConfigError: it is no template.

    >>> parse_template(r"{title}\n{body}").fill({"title": "One", "body": "Two"})
    'One\nTwo'
    """
    try:
        found = list(string.Formatter().parse(template))
    except ValueError as error:
        raise _wrong(str(error), template) from None
    if any(spec or mark or name == "" for _, name, spec, mark in found):
        raise _wrong("a field has a name and nothing else", template)
    if not any(name for _, name, _, _ in found):
        raise _wrong("it names no field", template)
    return Template(tuple((_unescaped(between), name or "") for between, name, _, _ in found))


def _decoded(value: Any) -> Any:
    """Return bytes that are UTF-8 as text."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return None


def _unescaped(between: str) -> str:
    for signs, meaning in _ESCAPES.items():
        between = between.replace(signs, meaning)
    return between


def _wrong(why: str, template: str) -> ConfigError:
    return ConfigError(
        f"the template cannot be used: {why}", template=template, hint="Write it like this: `template={title}: {body}`."
    )
