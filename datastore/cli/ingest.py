"""The commands that bring text in: `ingest`, and `rejects`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from datastore.cli.output import (
    StagedProgress,
    fields,
    json_option,
    progress_option,
    say,
    say_json,
    table,
    with_progress,
)
from datastore.cli.shell import example, given_options

if TYPE_CHECKING:  # pyarrow takes longer to load than a wrong option takes to find.
    from datastore.engines.engine import Engine
    from datastore.ingestion.estimate import Estimate
    from datastore.ingestion.report import IngestProgress, IngestReport

__all__ = [
    "ADDRESS",
    "COMMANDS",
    "ENGINE",
    "EXCLUDE",
    "INCLUDE",
    "SET",
    "SOURCES",
    "WORKERS",
    "engine_of",
    "in_source_bytes",
    "on_engine",
    "tell_ingest",
]

F = TypeVar("F", bound=Callable[..., Any])

READ_AS = (
    *("text", "lines", "jsonl", "json", "warc", "csv", "tsv", "parquet", "arrow"),
    *("hf", "mds", "litdata", "megatron", "webdataset"),
)
SOURCES = click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
INCLUDE = click.option(
    "--include", multiple=True, metavar="GLOB", help="Take only such files of a folder; may be repeated."
)
EXCLUDE = click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave out such files and folders; may be repeated."
)
WORKERS = click.option(
    "--workers", type=int, help="Processes; as many as there are cores if left out. They change no byte."
)
ENGINE = click.option(
    "--engine", type=click.Choice(["local", "ray"]), default="local", help="Who works: this machine, or a cluster."
)
ADDRESS = click.option("--address", metavar="HOST:PORT", help="Of the Ray cluster, if this machine is not part of one.")
SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting (all are in docs/settings.md); may be repeated.",
)


@click.command(
    short_help="Add files to a dataset.",
    epilog=example("datastore ingest src/ --to data/code --tokenizer tok.json --include '*.py'"),
)
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option("--to", required=True, metavar="URL", help="The dataset; it is made if it is not there.")
@click.option(
    "--tokenizer", metavar="FILE", help="A tokenizer.json or its folder; without it, in a new dataset, text stays text."
)
@click.option("--chat", "take", flag_value="chats", help="Take the chats of JSON lines or a table, with a loss mask.")
@click.option("--pairs", "take", flag_value="pairs", help="Take pairs of chats: prompt, chosen, rejected.")
@click.option("--chat-template", metavar="FILE", help="A chat template, if not the one beside the tokenizer.")
@click.option("--config", metavar="FILE", help="Settings as TOML, such as a list of filters; options come on top.")
@click.option("--trace-filters", type=int, metavar="N", help="Show so many samples of what each filter rule dropped.")
@INCLUDE
@EXCLUDE
@click.option("--gitignore", is_flag=True, default=None, help="Leave out of local folders what git ignores there.")
@click.option("--files-from", multiple=True, metavar="FILE", help="Read the files that FILE lists, one a line.")
@click.option(
    "--as",
    "--format",
    "format",
    type=click.Choice(READ_AS),
    help="Read all files as such, whatever they look like; without it each file says what it is.",
)
@click.option("--text-key", "--text-field", help="Key of the text in JSON, or its column.  [default: text]")
@click.option("--template", help=r"Make the text of several fields: '{title}\n\n{body}'.")
@click.option("--id-key", "--id-field", help="Key of the document's id in JSON, or its column.  [default: id]")
@click.option("--html-text", is_flag=True, default=None, help="Of HTML pages in WARC archives, take the main text.")
@click.option("--separator", help="What parts the documents of a text file; without it a file is one document.")
@WORKERS
@ENGINE
@ADDRESS
@click.option("--task", metavar="I/N", help="Do only share I of N, counted from 0; whoever is last commits.")
@click.option("--commit", is_flag=True, help="Do none of the work; commit what the shares of --task have done.")
@click.option("--on-error", type=click.Choice(["quarantine", "skip", "fail"]), help="What becomes of a bad document.")
@click.option("--max-reject-ratio", type=float, help="Above this share of bad documents nothing is committed.")
@SET
@click.option(
    "--overwrite", "operation", flag_value="overwrite", help="The new version holds nothing else; older ones stay."
)
@click.option("--begin-anew", is_flag=True, default=None, help="Leave what an ingest with other filters has done.")
@click.option("--replace", is_flag=True, default=None, help="Of a file that has changed, delete the earlier documents.")
@click.option("--dry-run", is_flag=True, help="Only estimate what there is to do; nothing is written.")
@progress_option
@json_option
def ingest(
    *,
    sources: tuple[str, ...],
    files_from: tuple[str, ...],
    to: str,
    config: str | None,
    overrides: tuple[str, ...],
    engine: str,
    address: str | None,
    task: str | None,
    commit: bool,
    dry_run: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Add what each SOURCE holds to a dataset: a folder, a file, a glob in quotes, a URL, or - for the standard input.

    Text and code, JSON lines and arrays, CSV, TSV, Parquet, Arrow, and what MDS, LitData, Megatron, WebDataset and
    Hugging Face datasets wrote are told apart by their content. A killed ingest goes on when the same command is given again; given once more, it adds nothing. Bad documents are set
    aside and counted.

    With --overwrite the new version holds the sources alone, with any tokenizer. What it held before is not removed: it
    can be read as URL@VERSION until `datastore expire` and `datastore vacuum`.
    """
    from datastore.config import read_table, settings_from
    from datastore.ingestion.ingest import ingest as ingest_sources
    from datastore.ingestion.reading.spool import spooled_stream
    from datastore.ingestion.settings import IngestSettings

    given, origins = given_options(options)
    table = read_table(Path(config)) if config else {}
    settings = settings_from(
        IngestSettings, table | given, overrides=overrides, where=config or "the options", origins=origins
    )
    if settings.filters:
        sys.path.insert(0, "")  # As `python -m` does: a function of the user's lies where the command is given.
    sources += tuple(f"@{name}" for name in files_from)
    with ExitStack() as stack:
        if "-" in sources:
            kept = stack.enter_context(spooled_stream(sys.stdin.buffer))
            sources = tuple(kept if source == "-" else source for source in sources)
        if dry_run:
            from datastore.ingestion.estimate import estimate

            expected = estimate(sources, to, settings=settings)
            say_json(expected) if as_json else _tell_estimate(expected)
            return
        report = with_progress(
            "ingest",
            in_source_bytes(ingest_sources),
            sources=sources,
            to=to,
            settings=settings,
            engine=engine_of(engine, address),
            share=_share(task, commit=commit),
        )
        say_json(report) if as_json else tell_ingest(report)


def engine_of(engine: str, address: str | None, workers: int | None = None) -> "Engine | None":
    """Return who does the work: a cluster, several `workers` of this machine, or None, if neither is asked for."""
    from datastore.engines.local import LocalEngine
    from datastore.engines.ray import RayEngine
    from datastore.errors import ConfigError

    if engine == "ray":
        return RayEngine(address or "auto")
    if address is not None:
        raise ConfigError("only a cluster has an address", address=address, hint="Give `--engine ray`, too.")
    return None if workers is None else LocalEngine(workers)


def on_engine(command: F) -> F:
    """Give a command the options that say who does its work."""
    few = click.option("--workers", type=click.IntRange(min=1), help="Processes; this one if left out.")
    for option in (few, ENGINE, ADDRESS):
        command = option(command)
    return command


def _share(task: str | None, *, commit: bool) -> str:
    from datastore.errors import ConfigError

    if task is not None and commit:
        raise ConfigError(
            "a share either does work or commits",
            task=task,
            hint="Give `--task` or `--commit`; the last share commits anyway.",
        )
    return "none" if commit else task or ""


def in_source_bytes(ingest_sources: Callable[..., "IngestReport"]) -> Callable[..., "IngestReport"]:
    """Return `ingest_sources` with a `progress` that is told the bytes of the sources, done and altogether."""

    def run(*, progress: "StagedProgress | None", **arguments: Any) -> "IngestReport":
        def show(now: "IngestProgress") -> None:
            if progress is not None:
                progress(now.source_bytes, now.source_bytes_total, _STAGES[now.stage])

        return ingest_sources(**arguments, progress=show)

    return run


_STAGES = {"plan": "looking at the sources", "work": "", "commit": "committing"}


def _tell_estimate(expected: "Estimate") -> None:
    from datastore.units import format_bytes, format_count, format_seconds

    tokens = f", about {format_count(expected.tokens)} tokens" if expected.kind == "tokens" else ""
    fields(
        {
            "to read": f"{expected.files:,} files, {format_bytes(expected.source_bytes)}",
            "already there": f"{expected.known_files:,} files" if expected.known_files else None,
            "changed": f"{_files(expected.changed_files)}; their older documents stay, unless --replace is given"
            if expected.changed_files
            else None,
            "left out": _counts(expected.skipped),
            "would add": f"about {expected.documents:,} documents{tokens}, {format_bytes(expected.shard_bytes)}",
            "would reject": f"about {expected.rejects:,}" if expected.rejects else None,
            "would take": f"about {format_seconds(expected.seconds)}, workers: {expected.workers}",
        }
    )


def tell_ingest(report: "IngestReport") -> None:
    """Print what an ingest did."""
    from datastore.units import format_bytes, format_count, format_seconds

    if report.tasks_open:
        say(
            f"this share is done; {report.tasks_open} of {report.tasks} tasks are those of others, the last of which commits"
        )
        return
    if not report.added:
        brought = f", {report.overtaken_files:,} of them brought meanwhile" if report.overtaken_files else ""
        files = report.known_files + report.files
        say(f"nothing new: {report.url}, version {report.version}, has all {files:,} files{brought}")
        return
    tokens = f", {report.tokens:,} tokens ({format_count(report.tokens)})" if report.kind == "tokens" else ""
    rate = f"{format_bytes(report.text_bytes / max(report.seconds, 1e-3))}/s"
    fields(
        {
            "dataset": f"{report.url}, version {report.version}",
            "added": f"{report.documents:,} documents{tokens}",
            "from": f"{report.files:,} files, {format_bytes(report.text_bytes)} of text",
            "lengths": lengths_line(report.lengths) or None,
            "already there": _known(report) if report.known_files else None,
            "changed": f"{_files(report.changed_files)} since version {report.changed_since}, {_older(report)}"
            if report.changed_files
            else None,
            "left out": _counts(report.skipped),
            "rejected": _counts(report.rejected, report.rejects),
            "filtered": _counts(report.filtered),
            "changed by filters": ", ".join(f"{count:,} {what}" for what, count in report.changed.items()) or None,
            "escaped": f"{report.escaped:,} chats spell a special token; it is made of ordinary ones"
            if report.escaped
            else None,
            "shards": f"{report.shards:,}, {format_bytes(report.shard_bytes)}",
            "time": f"{format_seconds(report.seconds)}, {rate}{f', {report.encoder}' if report.encoder else ''}",
            "CPU time": _cpu_words(report.cpu_s) or None,
            "taken over": f"{report.tasks_resumed} of {report.tasks} tasks" if report.tasks_resumed else None,
        }
    )
    for sample in report.samples:
        say(f"{sample.rule}  {sample.id}  {sample.begins[:80]!r}")


def _cpu_words(cpu_s: Mapping[str, float]) -> str:
    """Return `12.3 s: read 20%, encode 60%, write 20%`; empty where nothing was done."""
    from datastore.units import format_seconds

    total = sum(cpu_s.values())
    shares = ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in cpu_s.items()) if total else ""
    return f"{format_seconds(total)}: {shares}" if shares else ""


def lengths_line(lengths: Sequence[int]) -> str:
    """Return a histogram of texts in one line, of which number i counts those of 2**(i - 1) up to 2**i bytes; empty if there are none.

    >>> lengths_line([0] * 10 + [1, 8, 0, 2])
    '▂█▁▃ 512 B to 8 KiB, half of them below 2 KiB'
    """
    from datastore.display import sparkline, upper_half
    from datastore.units import format_bytes

    present = [bits for bits, count in enumerate(lengths) if count]
    if not present:
        return ""
    low, high, half = present[0], present[-1], format_bytes(1 << upper_half(lengths))
    bars = sparkline(lengths[low : high + 1])
    return f"{bars} {format_bytes(1 << low >> 1)} to {format_bytes(1 << high)}, half of them below {half}"


def _known(report: "IngestReport") -> str:
    meanwhile = f", {report.overtaken_files:,} of them brought by another ingest meanwhile"
    return f"{report.known_files:,} files{meanwhile if report.overtaken_files else ''}"


def _older(report: "IngestReport") -> str:
    gone = report.replaced_documents
    return f"{gone:,} older documents deleted" if gone else "added as new documents; the older ones stay"


def _files(count: int) -> str:
    return f"{count:,} file{'s' * (count != 1)}"


def _counts(reasons: Mapping[Any, int], where: str = "") -> str | None:
    """Return `3 (2 empty, 1 hidden)`, or None if there is nothing to say."""
    if not sum(reasons.values()):
        return None
    parts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count)
    return f"{sum(reasons.values()):,} ({parts}){f', see {where}' if where else ''}"


@click.command(
    short_help="List what an ingest has rejected.",
    epilog=example("datastore rejects data/code"),
)
@click.argument("url")
@click.option("--limit", type=click.IntRange(min=0), default=20, help="How many; 0 for all.")
@json_option
def rejects(*, url: str, limit: int, as_json: bool) -> None:
    """List the records that no ingest of the dataset at URL could take: where each stands, why, and how it begins.

    Repair them in their files, and give the command that ingested these again, with --replace: a file that has changed takes the
    place of what it was, and its rejects are over.
    """
    from itertools import islice

    from datastore.ingestion.report import rejected_records

    found = list(islice(rejected_records(url), limit + 1 if limit else None))
    shown = found[:limit] if limit else found
    if as_json:
        say_json([each._asdict() for each in shown])
        return
    if not shown:
        say("nothing was rejected, or all of it has been read again")
        return
    rows = [(each.version or "none", each.source, each.offset, each.reason, each.excerpt[:40]) for each in shown]
    table(("version", "source", "offset", "reason", "begins"), rows)
    if len(found) > len(shown):
        say("... and more; --limit 0 lists all")


COMMANDS = (ingest, rejects)
