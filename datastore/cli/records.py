"""The commands that show and change the columns of a record dataset."""

import json
from typing import Any

import click

from datastore.cli.output import json_option, say, say_json, table
from datastore.cli.shell import example

__all__ = ["COMMANDS"]

URL = click.argument("url")


@click.command(short_help="Show the columns of records.", epilog=example("datastore schema data/text"))
@URL
@json_option
def schema(*, url: str, as_json: bool) -> None:
    """Show the columns of the record dataset at URL (or URL@version): types, numbers, defaults, media types."""
    from datastore.dataset.operations.evolve import describe
    from datastore.dataset.snapshot import open_dataset

    columns = describe(open_dataset(url).schema)
    if as_json:
        say_json(columns)
        return
    table(
        ("column", "type", "may be null", "number", "media type", "default"),
        [(c.name, c.type, c.nullable, c.number, c.media_type, c.default) for c in columns],
    )


@click.command(
    short_help="Change the columns of records.",
    epilog=example(
        "datastore evolve data/text --add lang string --default lang en",
        "datastore evolve data/text --widen offset int64 --rename lang language",
    ),
)
@URL
@click.option("--drop", metavar="NAME", multiple=True, help="Leave out a column; may be repeated, as all of these.")
@click.option("--rename", type=(str, str), metavar="OLD NEW", multiple=True, help="Give a column another name.")
@click.option(
    "--widen", type=(str, str), metavar="NAME TYPE", multiple=True, help="Give a column a type that holds more."
)
@click.option(
    "--add",
    type=(str, str),
    metavar="NAME TYPE",
    multiple=True,
    help="Add a column: int64, 'string not null', 'list<float>', image/jpeg, ...",
)
@click.option(
    "--default",
    type=(str, str),
    metavar="NAME VALUE",
    multiple=True,
    help="What an added column has in the rows that are there, as JSON or text; null if left out.",
)
@json_option
def evolve(
    *,
    url: str,
    drop: tuple[str, ...],
    rename: tuple[tuple[str, str], ...],
    widen: tuple[tuple[str, str], ...],
    add: tuple[tuple[str, str], ...],
    default: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Change the columns of the record dataset at URL: drop, rename, widen, then add. One commit; no data is rewritten."""
    from datastore.dataset.operations.evolve import evolve as evolve_dataset

    kinds = _once("--add", add)
    commit = evolve_dataset(
        url,
        drop=drop,
        rename=_once("--rename", rename),
        widen=_once("--widen", widen),
        add=kinds,
        defaults={name: _value(text, kinds.get(name, "")) for name, text in _once("--default", default).items()},
    )
    if as_json:
        say_json(commit)
        return
    say(f"version {commit.version} has the new columns: `datastore schema {url}` shows them")


def _once(option: str, pairs: tuple[tuple[str, str], ...]) -> dict[str, str]:
    named = dict(pairs)
    if len(named) < len(pairs):
        raise click.BadParameter("a column is named twice", param_hint=option)
    return named


def _value(text: str, kind: str) -> Any:
    """Return `text` as the value that it writes: itself in a column of texts, else JSON, or what the type reads."""
    if "string" in kind.partition("<")[0]:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


COMMANDS = (schema, evolve)
