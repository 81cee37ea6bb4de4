"""Settings: a TOML file and `--set key=value` overrides become one frozen record, or one clear error.

A setting is declared once, in the `Document` beside the code that uses it; nothing here knows any of them. A setting that
names a class, such as a hook or an objective, may name one of somebody else.
"""

import ast
import inspect
import json
import os
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from datastore.document import Document, SettingsDocument, convert
from datastore.errors import ConfigError, DependencyError, MissingError

__all__ = [
    "commented",
    "default_of",
    "find_class",
    "load_settings",
    "meanings_of",
    "parse_override",
    "read_table",
    "settings_from",
    "toml_value",
]

D = TypeVar("D", bound=Document)
T = TypeVar("T")


def load_settings(kind: type[D], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> D:
    """Return the settings in the TOML file `path` as `kind`, changed by `overrides` such as `train.steps=200`.

    Raises:
        MissingError: there is no such file.
        ConfigError: it cannot be read or is not TOML; or an unknown key, a wrong type or a value out of range, with its path.
    """
    return settings_from(kind, read_table(path), overrides=overrides, where=str(path))


def read_table(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the TOML file `path` says.

    Raises:
        MissingError: there is no such file.
        ConfigError: it cannot be read or is not TOML.
    """
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError("no such file", file=str(path), hint="Name a TOML file that exists.") from None
    except OSError as error:
        raise ConfigError(f"the file cannot be read: {error.strerror}", file=str(path), hint="Check it.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"not a TOML file: {error}", file=str(path), hint="Correct that line.") from None


def settings_from(
    kind: type[D],
    table: Mapping[str, Any],
    *,
    overrides: Sequence[str] = (),
    where: str,
    origins: Mapping[str, str] | None = None,
) -> D:
    """Return `table`, changed by `overrides`, as a `kind`.

    What is wrong is said to be `where`, unless `origins` says of its key that it comes from elsewhere, or it was set by
    an override.

    Raises:
        ConfigError: as `load_settings`.
    """
    merged: dict[str, Any] = _deep_copy(table)
    origins = dict(origins or {})
    for text in overrides:
        keys, value = parse_override(text)
        inner = merged
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError("not a table", key=key, where=f"--set {text}", hint="Set one of its values instead.")
        inner[keys[-1]] = value
        origins[".".join(keys)] = f"--set {text}"
    return convert(kind, merged, where=where, origins=origins)


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
        found = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return keys, value
    return keys, value if isinstance(found, _DATES) else found


_DATES = (date, time)
"""TOML has dates without quotes, and no setting is one: what looks like one is text, such as `chat_day`."""


def _deep_copy(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _deep_copy(value)
        if isinstance(value, Mapping)
        else value.isoformat()
        if isinstance(value, _DATES)
        else value
        for key, value in table.items()
    }


def find_class(name: str, *, base: type[T], ours: Mapping[str, str], group: str) -> type[T]:
    """Return the class that a setting calls `name`; it inherits from `base`.

    The name is one of `ours` (name -> `module:Class`), an entry point in `group`, or `module:Class` itself.

    Raises:
        ConfigError: there is none of that name, or it is something else.
        DependencyError: its module cannot be imported.
    """
    what = f"{'an' if base.__name__[0] in 'AEIOU' else 'a'} {base.__name__.lower()}"
    others = {point.name: point.value for point in entry_points(group=group)}
    path = name if ":" in name else ours.get(name) or others.get(name)
    if path is None:
        raise ConfigError(
            f"no such {base.__name__.lower()}",
            use=name,
            known=sorted({*ours, *others}),
            hint=f"Use one of these, module:Class, or an entry point in the group {group}.",
        )
    module, _, attribute = path.partition(":")
    try:
        kind = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"{what} cannot be imported",
            use=name,
            missing=error.name,
            hint="Install it, or name the folder that it lies in: PYTHONPATH=FOLDER.",
        ) from None
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise ConfigError(
            f"not {what}", use=name, found=repr(kind), hint=f"Name a class that inherits {base.__name__}."
        )
    return kind


def meanings_of(kind: type) -> dict[str, str]:
    """Return the text below each setting in the code of `kind`."""
    found: dict[str, str] = {}
    name = ""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    for node in tree.body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = " ".join(str(node.value.value).split())
            name = ""
    return found


def toml_value(value: Any) -> str:
    """Return a value as TOML writes it.

    >>> toml_value({"use": "causal", "weights": [1, 2.5]})
    '{ use = "causal", weights = [1, 2.5] }'
    """
    if isinstance(value, dict):
        return (
            "{ " + ", ".join(f"{name} = {toml_value(inner)}" for name, inner in value.items()) + " }" if value else "{}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    """Return what a setting is if nothing is said."""
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


def commented(kind: type[SettingsDocument], given: Mapping[str, Any]) -> str:
    """Return a TOML file with every setting of `kind`, each below what it means; those that are not `given` are commented out.

    Args:
        kind: Settings, and tables of settings.
        given: Values by dotted key, such as `data.url`.
    """
    return "\n".join(_lines(kind, given, table="")).strip() + "\n"


_WIDE = 110

_LINK = re.compile(r"\[([^]]*)\]\(([^)]*)\)")


def _lines(kind: type[SettingsDocument], given: Mapping[str, Any], *, table: str) -> Iterator[str]:
    meanings = meanings_of(kind)
    fields = msgspec.structs.fields(kind)
    inner = {field.name: field.type for field in fields if _is_table(field.type)}
    if table:
        yield from ("", *_comment((inspect.getdoc(kind) or "").split("\n\n")[0]), f"[{table}]")
    for field in fields:
        if field.name in inner:
            continue
        yield from _comment(" ".join(filter(None, (meanings.get(field.name, ""), _choices(field.type)))))
        key = f"{table}.{field.name}".lstrip(".")
        if key in given:
            yield f"{field.name} = {toml_value(given[key])}"
        elif field.required or default_of(field) is None:
            yield f"# {field.name} ="
        else:
            yield f"# {field.name} = {toml_value(default_of(field))}"
    for name, part in inner.items():
        yield from _lines(part, given, table=f"{table}.{name}".lstrip("."))


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, SettingsDocument)


def _choices(kind: Any) -> str:
    return f"One of {', '.join(map(toml_value, get_args(kind)))}." if get_origin(kind) is Literal else ""


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()), _WIDE, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
