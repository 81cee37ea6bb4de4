"""Settings: a TOML file and `--set key=value` overrides become one frozen record, or one clear error.

A setting is declared once, in the `Document` beside the code that uses it; nothing here knows any of them.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from datastore.document import Document, convert
from datastore.errors import ConfigError, MissingError

__all__ = ["load_settings", "parse_override", "settings_from"]

D = TypeVar("D", bound=Document)


def load_settings(kind: type[D], path: Path, overrides: Sequence[str] = ()) -> D:
    """Return the settings in the TOML file `path`, changed by `overrides` such as `train.steps=200`.

    Raises:
        MissingError: there is no such file.
        ConfigError: it cannot be read or is not TOML; or an unknown key, a wrong type or a value out of range, with its path.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError("no such file", file=str(path), hint="Name a TOML file that exists.") from None
    except OSError as error:
        raise ConfigError(f"the file cannot be read: {error.strerror}", file=str(path), hint="Check it.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not a TOML file: {error}", file=str(path), hint="Correct that line.") from None
    return settings_from(kind, table, overrides=overrides, where=str(path))


def settings_from(kind: type[D], table: Mapping[str, Any], *, overrides: Sequence[str] = (), where: str) -> D:
    """Return `table`, changed by `overrides`, as a `kind`.

    Raises:
        ConfigError: as `load_settings`.
    """
    merged: dict[str, Any] = _deep_copy(table)
    for text in overrides:
        keys, value = parse_override(text)
        inner = merged
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError("not a table", key=key, override=text, hint="Set one of its values instead.")
        inner[keys[-1]] = value
    return convert(kind, merged, where=where)


def parse_override(text: str) -> tuple[list[str], Any]:
    """Return the key path and the value of `a.b=value`; the value is TOML, or else a plain string.

    Raises:
        ConfigError: there is no `=` or an empty key.

    >>> parse_override("train.steps=200")
    (['train', 'steps'], 200)
    """
    key, equals, value = text.partition("=")
    keys = key.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError("not a setting", text=text, hint="Write key=value, such as train.steps=200.")
    try:
        return keys, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, value


def _deep_copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in table.items()}
