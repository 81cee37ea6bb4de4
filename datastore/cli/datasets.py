"""The commands that look at a dataset, check it, name a version of it, and change the columns of its records."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from datastore.cli.ingest import engine_of, on_engine
from datastore.cli.output import fields, json_option, moment, progress_option, say, say_json, table, with_progress
from datastore.cli.shell import example

if TYPE_CHECKING:
    from datastore.dataset.log.manifest import Commit
    from datastore.dataset.snapshot import Dataset

__all__ = ["COMMANDS", "RECORD_COMMANDS", "amounts"]

URL = click.argument("url")

_WIDEST = 80
"""Characters of a cell."""

_LOOKED_AT = 16
"""Shards whose documents are counted for a histogram."""


def _share(_context: click.Context, _parameter: click.Parameter, text: str) -> float:
    """Return a part of a whole, written `1%` or `0.01`."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no share; write 1% or 0.01") from None
    if not 0 < share <= 1:
        raise click.BadParameter(f"{text!r} is not above 0 and at most 1")
    return share


@click.command(
    short_help="Show what a dataset holds.",
    epilog=example("datastore show data/code", "datastore show data/code@1 --json"),
)
@URL
@json_option
def show(*, url: str, as_json: bool) -> None:
    """Show what the dataset at URL holds."""
    from datastore.dataset.snapshot import open_dataset
    from datastore.units import format_bytes, format_count

    dataset = open_dataset(url)
    commit, totals, tokenizer = dataset.commit, dataset.totals, dataset.commit.tokenizer
    tags, live = _tags(dataset), amounts(commit)
    if as_json:
        facts: dict[str, object] = {"url": dataset.url, "uuid": dataset.uuid, "version": dataset.version}
        facts |= {"operation": commit.operation, "time": commit.time, "writer": commit.writer, "kind": dataset.kind}
        facts |= amounts(commit) | {"totals": totals, "tokenizer": tokenizer, "tags": tags}
        facts["exclusive"] = dataset.info.exclusive
        say_json(facts, storage=dataset.storage)
        return
    fields(
        {
            "dataset": dataset.url,
            "version": f"{dataset.version} ({commit.operation}, {moment(commit.time)}, {commit.writer})",
            "tags": ", ".join(f"{name} -> {version}" for name, version in tags.items()) or None,
            "holds": dataset.kind,
            "documents": f"{live['documents']:,}",
            "tokens": f"{live['tokens']:,} ({format_count(live['tokens'])})" if dataset.kind == "tokens" else None,
            "lengths": _lengths(dataset),
            "deleted": f"{totals.deleted_documents:,} more documents ({totals.deleted_tokens:,} tokens)"
            if totals.deleted_documents
            else None,
            "vocabulary": f"{tokenizer.vocab_size:,} ids; {tokenizer.end_of_text} ends a document"
            if tokenizer
            else None,
            "tokenizer": f"sha256 {tokenizer.sha256[:16]}..." if tokenizer else None,
            "schema": None if dataset.kind == "tokens" else ", ".join(f"{c.name}: {c.type}" for c in dataset.schema),
            "shards": f"{totals.shards:,} ({format_bytes(totals.size_bytes)})",
            "uuid": dataset.uuid,
        }
    )


def _lengths(dataset: "Dataset") -> str | None:
    """Return a histogram of the tokens of documents, in one line; of a large dataset some shards stand for all."""
    from datastore.display import sparkline, upper_half
    from datastore.errors import DatastoreError

    if dataset.kind != "tokens" or not dataset.totals.documents:
        return None
    try:
        found = dataset.lengths(most_shards=_LOOKED_AT)
    except DatastoreError as error:  # What is known without reading is shown all the same.
        return f"unknown: {error}"
    if not found:
        return None
    low, half = next(bits for bits, count in enumerate(found) if count), (1 << upper_half(found)) - 1
    part = "" if len(dataset.segments) <= _LOOKED_AT else f"; of {_LOOKED_AT} shards"
    span = f"{1 << low >> 1:,} to {(1 << len(found) - 1) - 1:,} tokens"
    return f"{sparkline(found[low:])} {span}, half of them at most {half:,}{part}"


@click.command(
    short_help="Say what a dataset is made of, as Markdown.",
    epilog=example("datastore card data/code", "datastore card data/code@1 --to README.md"),
)
@URL
@click.option("--to", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="Write it there instead.")
def card(*, url: str, to: Path | None) -> None:
    """Print the card of the dataset at URL: its sources and their licences, filters, counts, and how to make it again.

    It begins with the front matter that the Hugging Face Hub reads.
    """
    from datastore.dataset.card import card as card_of

    found = card_of(url)
    if to is None:
        say(found.rstrip("\n"))
    else:
        to.write_text(found, encoding="utf-8")


def amounts(commit: "Commit") -> dict[str, int]:
    """Return how much a version holds, as `show`, `log` and `doctor` say it: without what is deleted."""
    totals = commit.totals
    return {
        "documents": totals.documents - totals.deleted_documents,
        "tokens": totals.tokens - totals.deleted_tokens,
        "deleted_documents": totals.deleted_documents,
        "deleted_tokens": totals.deleted_tokens,
        "shards": totals.shards,
        "size_bytes": totals.size_bytes,
    }


def _tags(dataset: "Dataset") -> dict[str, int]:
    from datastore.dataset.log.tags import list_tags, read_tag

    return {name: read_tag(dataset.storage, name).version for name in list_tags(dataset.storage)}


@click.command(
    short_help="List shards or documents.",
    epilog=example("datastore ls data/code", "datastore ls data/code --documents --limit 5"),
)
@URL
@click.option(
    "--documents", is_flag=True, help="List documents, with source and byte offset, or records, instead of shards."
)
@click.option("--limit", type=click.IntRange(min=0), default=20, help="How many lines; 0 for all.")
@json_option
def ls(*, url: str, documents: bool, limit: int, as_json: bool) -> None:
    """List the shards, or the documents, of the dataset at URL."""
    from datastore.dataset.snapshot import open_dataset

    dataset = open_dataset(url)
    shown = list(islice(_document_rows(dataset) if documents else _shard_rows(dataset), limit or None))
    if as_json:
        say_json(shown)
        return
    if shown:
        table(tuple(shown[0]), [tuple(map(_brief, row.values())) for row in shown])
    totals = dataset.totals
    total = totals.documents - totals.deleted_documents if documents else totals.shards
    if len(shown) < total:
        say(f"... and {total - len(shown):,} more; --limit 0 lists all")


def _brief(value: object) -> object:
    """Return what fits into a cell: text is cut and kept on one line, bytes are counted."""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, str):
        line = " ".join(value[: 2 * _WIDEST].split()) if "\n" in value else value
        return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 3]}..."
    return value if isinstance(value, int | float | None) else _brief(str(value))


def _shard_rows(dataset: "Dataset") -> Iterator[dict[str, object]]:
    for shard in dataset.segments:
        yield {
            "shard": shard.path,
            "documents": shard.documents,
            "tokens": shard.tokens,
            "size_bytes": shard.size_bytes,
            "first_source": shard.source_first,
            "last_source": shard.source_last,
        }


def _document_rows(dataset: "Dataset") -> Iterator[dict[str, object]]:
    if dataset.kind == "records":
        yield from dataset.iter_records()
        return
    for index in range(len(dataset.segments)):
        yield from dataset.live_documents(index).drop_columns(["digest"]).to_pylist()


@click.command(
    short_help="Read and check a dataset, every byte of it or a sample.",
    epilog=example(
        "datastore verify data/code", "datastore verify data/code --sample 1%", "datastore verify data/code --deep"
    ),
)
@URL
@click.option("--sample", callback=_share, default="100%", help="Share of the blocks to read, such as 1% or 0.01.")
@click.option("--seed", type=click.IntRange(min=0), help="Draw the same blocks again as the run that named this seed.")
@click.option("--deep", is_flag=True, help="Decode each shard, too, and compare it with what the manifest says of it.")
@on_engine
@progress_option
@json_option
def verify(*, url: str, sample: float, seed: int | None, deep: bool, as_json: bool, **who: Any) -> int:
    """Read every byte of the dataset at URL and name each bad block; exit with 1 if there is one."""
    from datastore.dataset.durability.verify import verify as verify_dataset
    from datastore.dataset.snapshot import open_dataset
    from datastore.units import format_bytes

    dataset = open_dataset(url)
    report = with_progress(
        "verify", verify_dataset, dataset=dataset, sample=sample, seed=seed, deep=deep, engine=engine_of(**who)
    )
    if as_json:
        say_json(report, storage=dataset.storage)
        return 1 if report.bad else 0
    for bad in report.bad:
        say(f"bad: {bad.path}{'' if bad.block is None else f', block {bad.block}'}: {bad.reason}")
    if report.seed is not None:
        part = report.blocks / max(1, report.of_blocks)
        say(f"a sample: {report.blocks:,} of {report.of_blocks:,} blocks ({part:.2%}), drawn by --seed {report.seed}")
    sound = "every byte is as it was written" if report.seed is None else "every byte read is as it was written"
    result = f"{len(report.bad):,} bad blocks" if report.bad else f"{sound}, and decodes" if deep else sound
    say(f"{report.files:,} files, {format_bytes(report.bytes)}: {result}")
    return 1 if report.bad else 0


@click.command(
    short_help="Name a version of a dataset.",
    epilog=example("datastore tag data/code v1", "datastore show data/code@v1"),
)
@URL
@click.argument("name")
@click.option("--replace", is_flag=True, help="Move a tag that names another version.")
@click.option("--delete", is_flag=True, help="Remove the tag instead; versions stay.")
def tag(*, url: str, name: str, replace: bool, delete: bool) -> None:
    """Give the newest version of the dataset at URL (or URL@version) the name NAME."""
    from datastore.dataset.log.tags import remove_tag, set_tag
    from datastore.dataset.snapshot import open_dataset

    dataset = open_dataset(url)
    if delete:
        remove_tag(dataset.storage, name)
        say(f"removed the tag {name}")
        return
    set_tag(dataset.storage, name, dataset.commit, replace=replace)
    say(f"{dataset.url}@{name} is version {dataset.version}")


COMMANDS = (show, card, ls, verify, tag)


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


RECORD_COMMANDS = (schema, evolve)
