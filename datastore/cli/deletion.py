"""The commands that take documents out of a dataset: hidden at once, gone for good, or dropped while shards are merged."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from datastore.cli.ingest import engine_of, on_engine
from datastore.cli.output import fields, json_option, progress_option, say, say_json, table, with_progress
from datastore.cli.shell import example, given_options

if TYPE_CHECKING:
    from datastore.dataset.operations.purge.purge import PurgeReport
    from datastore.dataset.operations.selection import Selection

__all__ = ["COMMANDS"]

F = TypeVar("F", bound=Callable[..., Any])

URL = click.argument("url")

_LISTED = 20
"""Shards that are listed one by one."""


def selection(command: F) -> F:
    """Give a command the options that say which documents are meant."""
    options = (
        click.option("--id", "ids", metavar="ID", multiple=True, help="A document with this id; may be repeated."),
        click.option(
            "--ids-from", metavar="FILE", help="Documents with the ids in this file, one per line; - is stdin."
        ),
        click.option(
            "--source",
            "sources",
            metavar="GLOB",
            multiple=True,
            help="Documents from such a source, * for any text; may be repeated.",
        ),
        click.option(
            "--where", metavar="SQL", help="Documents for which this is true; over their columns, through DuckDB."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _ids(ids: tuple[str, ...], ids_from: str | None) -> list[str] | None:
    """Return the ids given one by one and those in a file; None if there are neither options."""
    from datastore.dataset.operations.selection import read_ids

    if not ids and ids_from is None:
        return None
    return [*ids, *(read_ids("/dev/stdin" if ids_from == "-" else ids_from) if ids_from is not None else ())]


def _selection(ids: list[str] | None, sources: tuple[str, ...], where: str | None) -> "Selection":
    from datastore.dataset.operations.selection import Selection

    return Selection.of(ids=ids, sources=sources, where=where)


@click.command(
    short_help="Delete documents; old versions keep them.",
    epilog=example(
        "datastore delete data/code --where \"source LIKE '%/json/%' AND tokens > 2000\" --dry-run",
        "datastore delete data/code --source 'src/email/_*'",
    ),
)
@URL
@selection
@click.option("--allow-missing", is_flag=True, help="Ids that no document has are no error.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@progress_option
@json_option
def delete(
    *,
    url: str,
    ids: tuple[str, ...],
    ids_from: str | None,
    sources: tuple[str, ...],
    where: str | None,
    allow_missing: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Delete the documents of the dataset at URL that meet everything that is given.

    One small commit: no shard is touched, and older versions keep the documents. For loaders the deleted tokens read as
    end-of-text without loss, or are left out. To be rid of the bytes, `purge`; to get the space back, `compact`.
    """
    from datastore.dataset.operations.delete import delete_selected
    from datastore.units import format_bytes, format_seconds

    selection = _selection(_ids(ids, ids_from), sources, where)
    report = with_progress(
        "delete", delete_selected, target=url, selection=selection, allow_missing=allow_missing, dry_run=dry_run
    )
    if as_json:
        say_json(report)
        return
    if report.shards:
        shown = [(shard.path, shard.documents, shard.tokens) for shard in report.shards[:_LISTED]]
        table(("shard", "documents", "tokens"), shown)
    if len(report.shards) > _LISTED:
        say(f"... and {len(report.shards) - _LISTED:,} more shards")
    verb = "would be deleted" if dry_run else "deleted"
    done = f" in version {report.version}" if report.committed else ""
    say(f"{report.documents:,} documents ({report.tokens:,} tokens) in {len(report.shards):,} shards {verb}{done}")
    if report.already:
        say(f"{report.already:,} more are deleted already")
    if report.missing:
        say(f"{len(report.missing):,} ids are those of no document: {', '.join(report.missing[:5])}")
    say(f"read {format_bytes(report.read_bytes)} in {format_seconds(report.seconds)}")


@click.command(
    short_help="Bring back what one version deleted.",
    epilog=example("datastore undelete data/code --of 2 --dry-run"),
)
@URL
@click.option(
    "--of", type=click.IntRange(min=1), required=True, metavar="VERSION", help="The version that deleted them."
)
@click.option("--dry-run", is_flag=True, help="Only say what would come back.")
@json_option
def undelete(*, url: str, of: int, dry_run: bool, as_json: bool) -> None:
    """Bring the documents back, in a new version of the dataset at URL, that version VERSION deleted.

    A delete, a dedup, or an ingest with --replace: what was added or deleted since stays so. What was purged, or left out by a
    compact, is gone.
    """
    from datastore.dataset.operations.undelete import undelete as bring_back

    report = bring_back(url, of=of, dry_run=dry_run)
    if as_json:
        say_json(report)
        return
    verb = "would be back" if dry_run else "are back"
    done = f" in version {report.version}" if report.committed else ""
    say(f"{report.documents:,} documents ({report.tokens:,} tokens) {verb}{done}")
    if report.gone:
        say(f"{report.gone:,} more are back already, or gone for good")


@click.command(
    short_help="Remove deleted documents for good, with a certificate.",
    epilog=example("datastore purge data/code --source 'src/json/_*' --dry-run"),
)
@URL
@selection
@click.option("--drop-tags", is_flag=True, help="Let tags of versions that go, go with them.")
@click.option("--dry-run", is_flag=True, help="Only say what would be purged.")
@on_engine
@progress_option
@json_option
def purge(
    *,
    url: str,
    ids: tuple[str, ...],
    ids_from: str | None,
    sources: tuple[str, ...],
    where: str | None,
    drop_tags: bool,
    dry_run: bool,
    as_json: bool,
    **who: Any,
) -> None:
    """Remove for good what is deleted in the dataset at URL; first delete what the options name.

    There is no way back. Shards are written again with those documents blank, older versions expire, and their files and
    the journals of finished ingests, rejects included, are removed at once. Everything is read back, and a
    certificate stored. Copies, backups, and the files that the text came from are yours to see to.
    """
    from datastore.dataset.operations.purge.purge import purge_selected

    named = _ids(ids, ids_from)
    selection = None if named is None and not sources and where is None else _selection(named, sources, where)
    report = with_progress(
        "purge",
        purge_selected,
        target=url,
        selection=selection,
        drop_tags=drop_tags,
        dry_run=dry_run,
        engine=engine_of(**who),
    )
    if as_json:
        say_json(report)
        return
    for certificate in report.resumed:
        say(f"finished the purge of version {certificate.version}, which had been cut off")
    if dry_run:
        fields(
            {
                "documents": f"{report.documents:,} at most, in {report.shards:,} shards that would be written again",
                "tags": f"in the way: {', '.join(report.tags)}; --drop-tags lets them go" if report.tags else None,
            }
        )
    elif report.committed:
        _say_purged(report)
    else:
        say("nothing to purge: no file holds a document that the newest version does not have")


def _say_purged(report: "PurgeReport") -> None:
    from datastore.units import format_seconds

    certificate = report.certificate
    assert certificate is not None
    fields(
        {
            "purged": f"{report.documents:,} documents ({report.tokens:,} tokens) in version {report.version}",
            "written": f"{len(certificate.files_written):,} files, with them blank",
            "removed": f"{len(certificate.files_removed):,} files that versions before {report.oldest} needed",
            "tags removed": ", ".join(report.tags) or None,
            "journals": f"of {len(certificate.ingests_cleared):,} ingests cleared, rejects included"
            if certificate.ingests_cleared
            else None,
            "parity": f"{report.parity_files:,} files removed; `datastore protect` makes new ones"
            if report.parity_files
            else None,
            "read back": f"{certificate.files_checked:,} files, in {format_seconds(report.seconds)} altogether",
            "certificate": f"{report.url}/{report.certificate_key}",
            "not looked at": f"{len(report.unfinished_ingests):,} unfinished ingests, {report.unnamed_files:,} files that"
            " no version knows; `datastore vacuum` removes what was abandoned"
            if report.unfinished_ingests or report.unnamed_files
            else None,
        }
    )


@click.command(
    short_help="Merge small shards and drop deleted documents: a new generation.",
    epilog=example("datastore compact data/code --target '8 MiB'"),
)
@URL
@click.option("--target", "target_bytes", metavar="SIZE", default="64 MiB", help="What a full shard holds.")
@click.option("--dry-run", is_flag=True, help="Only say what would be merged.")
@on_engine
@progress_option
@json_option
def compact(*, url: str, target_bytes: str, dry_run: bool, as_json: bool, **who: Any) -> None:
    """Merge small neighbouring shards of the dataset at URL into full ones, without the documents that are deleted.

    Documents keep their order, but shards get new uids, and the order of samples follows from those: a new generation.
    A run that is under way goes on with the version that it began with, until `vacuum` removes its files.
    """
    from datastore.dataset.operations.compact import compact as compact_shards
    from datastore.units import format_bytes, format_seconds, parse_bytes

    report = with_progress(
        "compact",
        compact_shards,
        target=url,
        target_bytes=parse_bytes(target_bytes),
        dry_run=dry_run,
        engine=engine_of(**who),
    )
    if as_json:
        say_json(report)
        return
    if not report.merged:
        say(f"nothing to gain: {report.shards_before:,} shards stay as they are")
        return
    fields(
        {
            "shards": f"{report.shards_before:,} -> {report.shards_after:,}",
            "written again": f"{report.merged:,} shards ({format_bytes(report.read_bytes)})",
            "dropped": f"{report.dropped_documents:,} deleted documents ({report.dropped_tokens:,} tokens)"
            if report.dropped_documents
            else None,
            "version": f"{report.version}, a new generation: runs on older versions go on there until `datastore vacuum`"
            if report.committed
            else f"{report.version} as before; without --dry-run, a new generation",
            "time": format_seconds(report.seconds),
        }
    )


@click.command(
    short_help="Delete near duplicates.",
    epilog=example("datastore dedup data/code --threshold 0.8 --dry-run"),
)
@click.argument("url")
@click.option(
    "--threshold", type=float, help="Share of the runs of words that documents have in common.  [default: 0.8]"
)
@click.option("--words", type=int, help="How many words a run has.  [default: 5]")
@click.option("--keep", type=click.Choice(["first", "longest"]), help="Which one stays.  [default: first]")
@click.option("--text-column", help="Column of the text, in a dataset of records.  [default: text]")
@click.option("--clusters", metavar="FILE", help="Write which documents are alike, as Parquet: a path or URL.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
@on_engine
@progress_option
@json_option
def dedup(
    *, url: str, dry_run: bool, as_json: bool, workers: int | None, engine: str, address: str | None, **options: Any
) -> None:
    """Find documents of the dataset at URL that are nearly the same, and delete all but one of each kind.

    They are found by MinHash over runs of words. It is a delete like any other: no shard is touched, and the version before
    has them still. Documents that are deleted already are not looked at, so given once more it finds what is left.
    """
    from datastore.config import settings_from
    from datastore.ingestion.quality.similar import DedupSettings, deduplicate

    given, origins = given_options(options)
    settings = settings_from(DedupSettings, given, where="the options", origins=origins)
    report = with_progress(
        "dedup",
        deduplicate,
        unit="documents",
        target=url,
        settings=settings,
        dry_run=dry_run,
        engine=engine_of(engine, address, workers=workers),
    )
    if as_json:
        say_json(report)
        return
    verb = "would be deleted" if dry_run else "deleted"
    tokens = f" ({report.tokens:,} tokens)" if report.tokens else ""
    say(
        f"{report.duplicates:,} of {report.documents:,} documents{tokens} {verb}: near duplicates, in {report.clusters:,} clusters"
    )
    if report.committed:
        say(f"{report.url}, version {report.version}")


COMMANDS = (delete, undelete, purge, compact, dedup)
