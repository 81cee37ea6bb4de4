"""The commands about versions: list, compare, let expire and remove them; and take a dataset elsewhere."""

from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from datastore.cli.datasets import amounts
from datastore.cli.output import (
    fields,
    json_option,
    moment,
    progress_option,
    say,
    say_json,
    table,
    waiting,
    with_progress,
)
from datastore.cli.shell import example

if TYPE_CHECKING:  # pyarrow takes longer to load than a wrong option takes to find.
    from datastore.dataset.diff import Diff
    from datastore.dataset.log.manifest import Commit
    from datastore.dataset.operations.vacuum import Amount, VacuumReport
    from datastore.dataset.snapshot import Dataset

__all__ = ["COMMANDS"]

URL = click.argument("url")
SOURCE = click.argument("source")
TARGET = click.argument("target")


@click.command(
    short_help="List the versions of a dataset.",
    epilog=example("datastore log data/code", "datastore log data/code --limit 0"),
)
@URL
@click.option("--limit", type=click.IntRange(min=0), default=20, help="How many, from the newest back; 0 for all.")
@json_option
def log(*, url: str, limit: int, as_json: bool) -> None:
    """List the versions of the dataset at URL, newest first; the chain of their sha256 is checked."""
    from datastore.dataset.snapshot import open_dataset

    newest = open_dataset(url)
    commits = list(islice(newest.log.history(newest.commit), limit or None))
    notes = _notes(newest)
    if as_json:
        say_json([_facts(commit) | notes(commit.version) for commit in commits])
        return
    header = ("version", "time", "operation", "documents", "tokens", "shards", "writer", "")
    table(
        header,
        [
            (
                c.version,
                moment(c.time),
                c.operation,
                *(amounts(c)[name] for name in ("documents", "tokens", "shards")),
                c.writer,
                ", ".join(notes(c.version)["tags"]) or ("expired" if notes(c.version)["expired"] else ""),
            )
            for c in commits
        ],
    )
    if len(commits) < newest.version:
        say(f"... and {newest.version - len(commits):,} older; --limit 0 lists all")


def _facts(commit: "Commit") -> dict[str, Any]:
    """Return the commit, and how much the version holds by the names that `show` uses."""
    import msgspec

    return msgspec.to_builtins(commit) | amounts(commit)  # type: ignore[no-any-return]


def _notes(newest: "Dataset") -> Callable[[int], dict[str, Any]]:
    """Return a function that gives what there is to say of a version: its tags, and whether it has expired."""
    from datastore.dataset.log.manifest import oldest_readable
    from datastore.dataset.log.tags import list_tags, read_tag

    tags: dict[int, list[str]] = {}
    for name in list_tags(newest.storage):
        tags.setdefault(read_tag(newest.storage, name).version, []).append(name)
    oldest = oldest_readable(newest.info, newest.log.newest() or newest.commit)

    def notes(version: int) -> dict[str, Any]:
        return {"tags": tags.get(version, []), "expired": version < oldest}

    return notes


@click.command(
    short_help="Show what changed between two versions.",
    epilog=example(
        "datastore diff data/code@1 data/code", "datastore diff data/code@1 data/code --documents --limit 5"
    ),
)
@click.argument("before")
@click.argument("after")
@click.option("--documents", is_flag=True, help="List the documents, too; reads the shards that changed.")
@click.option("--limit", type=click.IntRange(min=0), default=20, help="How many documents; 0 for all.")
@progress_option
@json_option
def diff(*, before: str, after: str, documents: bool, limit: int, as_json: bool) -> None:
    """Count the documents that AFTER has and BEFORE has not, and the other way round; each is a URL, URL@7 or URL@name.

    The counts come from the manifests alone. Where shards were written anew (`compact`), a document stands on both
    sides; --documents reads the shards that changed, and lists those that are in one of the two only.
    """
    from datastore.dataset.diff import diff as compare

    with waiting("diff"):
        found = compare(before, after)
        listed = list(islice(found.documents(), limit or None)) if documents else []
    if as_json:
        facts = {
            name: {"url": side.url, "version": side.version}
            for name, side in (("before", found.before), ("after", found.after))
        }
        counts = {"added": found.added, "removed": found.removed, "rewritten": found.rewritten, "exact": found.exact}
        say_json(facts | counts | ({"documents": listed} if documents else {}))
        return
    _tell_diff(found)
    if listed:
        columns = tuple(listed[0].row)
        table(("", *columns), [(change.sign, *(_cell(change.row.get(name)) for name in columns)) for change in listed])
    if documents and limit and len(listed) == limit:
        say("... and maybe more; --limit 0 lists all")


def _tell_diff(found: "Diff") -> None:
    def shown(side: "Dataset") -> str:
        return f"{side.url}, version {side.version} ({side.commit.operation}, {moment(side.commit.time)})"

    tokens = "tokens" in (found.before.kind, found.after.kind)
    counts = {
        name: f"{_many(side.documents, 'document')}{f', {side.tokens:,} tokens' if tokens else ''}"
        f" in {_many(side.shards, 'shard')} of its own"
        for name, side in (("added", found.added), ("removed", found.removed))
    }
    anew = f"{_many(found.rewritten, 'shard')}, the same documents in them" if found.rewritten else None
    note = None if found.exact else "what was only moved stands on both sides; --documents tells it apart"
    fields({"before": shown(found.before), "after": shown(found.after), **counts, "rewritten": anew, "note": note})


def _many(count: int, name: str) -> str:
    """Return `1 shard`, `2 shards`."""
    return f"{count:,} {name}{'s' * (count != 1)}"


def _cell(value: object) -> object:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    line = " ".join(str(value).split())
    return value if isinstance(value, int | float | None) else line if len(line) <= 80 else f"{line[:77]}..."


@click.command(
    short_help="Let old versions expire.",
    epilog=example("datastore expire data/code --keep 10", "datastore expire data/code --older-than 30d --dry-run"),
)
@URL
@click.option("--keep", type=click.IntRange(min=1), help="Keep that many versions, from the newest back.")
@click.option("--older-than", metavar="TIME", help="Keep what was the newest at some time within it: 12h, 30d, 8w.")
@click.option("--dry-run", is_flag=True, help="Only say what would expire; nothing is written.")
@json_option
def expire(*, url: str, keep: int | None, older_than: str | None, dry_run: bool, as_json: bool) -> None:
    """Let old versions of the dataset at URL expire: they cannot be opened any more.

    No file is removed; `datastore vacuum` does that. A version with a tag, and all after it, do not expire. With both
    limits, a version goes only if both let it go.
    """
    if keep is None and older_than is None:
        raise click.UsageError("Give --keep, --older-than, or both.")
    from datastore.dataset.operations.expire import expire as expire_versions
    from datastore.units import parse_seconds

    older_than_s = None if older_than is None else parse_seconds(older_than)
    report = expire_versions(url, keep_last=keep, older_than_s=older_than_s, dry_run=dry_run)
    if as_json:
        say_json(report)
        return
    if report.held_by:
        say(f"the tag {report.held_by} keeps version {report.oldest} and all after it")
    done = "would expire" if dry_run else "expired"
    gone = f"{_many(report.expired, 'version')} {done}" if report.expired else "nothing expires"
    say(f"{gone}; versions {report.oldest} to {report.version} {'could' if dry_run else 'can'} be read")


@click.command(
    short_help="Remove the files that no version needs.",
    epilog=example("datastore vacuum data/code", "datastore vacuum data/code --delete"),
)
@URL
@click.option("--delete", is_flag=True, help="Remove them; without it they are only counted.")
@click.option(
    "--older-than", default="24h", metavar="TIME", help="Leave younger files: somebody may be about to commit them."
)
@progress_option
@json_option
def vacuum(*, url: str, delete: bool, older_than: str, as_json: bool) -> None:
    """Count, or remove, the files of the dataset at URL that no version which can be read names.

    Among them is what only expired versions had, and what killed writers left: shards of ingests that nobody went on
    with for a day, hidden files, uploads to S3 without an end. Shallow clones are not known here: those that read what
    is removed break.
    """
    from datastore.dataset.operations.vacuum import vacuum as vacuum_dataset
    from datastore.units import parse_seconds

    older_than_s = parse_seconds(older_than)
    report = with_progress(
        "vacuum", vacuum_dataset, unit="files", target=url, dry_run=not delete, older_than_s=older_than_s
    )
    say_json(report) if as_json else _tell_vacuum(report)


def _tell_vacuum(report: "VacuumReport") -> None:
    from datastore.units import format_bytes

    def shown(amount: "Amount") -> str | None:
        return f"{amount.files:,} files, {format_bytes(amount.bytes)}" if amount.files else None

    kept = f"versions {report.oldest} to {report.newest}, {report.listed:,} files listed"
    fields(
        {
            "readable": kept,
            "too young": shown(report.young),
            "of ingests": shown(report.of_ingests),
            **{kind.replace("_", " "): shown(amount) for kind, amount in report.removed.items()},
        }
    )
    total = shown(report.total)
    if total is None:
        say("nothing to remove")
    else:
        say(f"would remove {total}; --delete does it" if report.dry_run else f"removed {total}")


@click.command(
    short_help="Make a new dataset of a version.",
    epilog=example("datastore clone data/code@1 data/mine", "datastore clone data/code data/light --shallow"),
)
@SOURCE
@TARGET
@click.option("--shallow", is_flag=True, help="Copy no shards: read those of SOURCE, which must not remove them.")
@progress_option
@json_option
def clone(*, source: str, target: str, shallow: bool, as_json: bool) -> None:
    """Make a new dataset at TARGET of one version of SOURCE: another uuid, one version, no history.

    A killed clone goes on when the same command is given again. WARNING: a shallow clone reads the files of SOURCE. When
    they are removed there (vacuum, purge), or SOURCE is moved, it breaks, and nothing tells SOURCE that it exists.
    """
    from datastore.dataset.operations.clone import clone as clone_dataset
    from datastore.units import format_bytes

    report = with_progress("clone", clone_dataset, source=source, target=target, shallow=shallow)
    if as_json:
        say_json(report)
        return
    brought = f"{report.files:,} files, {format_bytes(report.bytes)}"
    fields(
        {
            "dataset": f"{report.url}, version 1",
            "made of": f"{report.source}, version {report.source_version}: {report.shards:,} shards",
            "copied": "no shards: it breaks when they are removed there" if report.shallow else brought,
            "were there": f"{report.present:,} files" if report.present else None,
            "uuid": report.uuid,
        }
    )


@click.command(
    short_help="Copy a dataset to another place, or bring a copy up to date.",
    epilog=example("datastore copy data/code backup/code", "datastore copy data/code backup/all --all-versions"),
)
@SOURCE
@TARGET
@click.option("--all-versions", is_flag=True, help="All versions that can be read, not only the newest.")
@progress_option
@json_option
def copy(*, source: str, target: str, all_versions: bool, as_json: bool) -> None:
    """Copy the dataset at SOURCE to TARGET: the same uuid, the same versions, the tags of those that are copied.

    Every file is checked against its digest on its way. A killed copy goes on when the same command is given again, and
    shows nothing new before it is complete; given once more later, it brings what is new. Do not write to a copy.
    """
    from datastore.dataset.operations.copy import copy as copy_dataset
    from datastore.units import format_bytes, format_seconds

    report = with_progress("copy", copy_dataset, source=source, target=target, all_versions=all_versions)
    if as_json:
        say_json(report)
        return
    rate = f"{format_bytes(report.bytes / max(report.seconds, 1e-3))}/s"
    fields(
        {
            "dataset": f"{report.url}, version {report.version}",
            "readable": f"versions {report.oldest} to {report.version}",
            "copied": f"{report.files:,} files, {format_bytes(report.bytes)}, {report.commits:,} versions of the log",
            "were there": f"{report.present:,} files" if report.present else None,
            "time": f"{format_seconds(report.seconds)}, {rate}",
        }
    )


COMMANDS = (log, diff, expire, vacuum, clone, copy)
