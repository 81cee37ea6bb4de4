"""The commands that speak to other tools: `sql`, `export` and `import`; and those of checkpoints that do: `export`, `average`, `import`."""

from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from datastore.cli.checkpoints import RUN, STEP, checkpoint, saved_steps
from datastore.cli.ingest import in_source_bytes
from datastore.cli.output import fields, json_option, progress_option, say, say_json, table, waiting, with_progress
from datastore.cli.shell import example, given_options

if TYPE_CHECKING:
    from datastore.ingestion.report import IngestReport

__all__ = ["COMMANDS"]

URL = click.argument("url")
EXPORTS = ("parquet", "hf", "mds", "litdata", "megatron", "webdataset", "jsonl")
IMPORTS = ("parquet", "arrow", "csv", "tsv", "hf", "mds", "litdata", "megatron", "webdataset")

_WIDEST = 80
"""Characters of a cell."""


@click.command(
    short_help="Ask a dataset in SQL.",
    epilog=example(
        'datastore sql data/code "SELECT source, sum(tokens) FROM documents GROUP BY 1 ORDER BY 2 DESC LIMIT 5"'
    ),
)
@URL
@click.argument("query")
@progress_option
@json_option
def sql(*, url: str, query: str, as_json: bool) -> None:
    """Run one SELECT over the dataset at URL: over the table `documents`, or for a dataset of records `records`.

    DuckDB runs it, and reads only the columns and row groups that it needs. Deleted rows are not there.
    """
    from datastore.dataset.snapshot import open_dataset
    from datastore.formats.plain import python_rows, python_values

    with waiting("sql"):
        found = open_dataset(url).sql(query)
    if as_json:
        say_json([{name: _exact(value) for name, value in row.items()} for row in python_rows(found)])
        return
    columns = [
        [_shown(value) for value in python_values(column, name=name)]
        for name, column in zip(found.column_names, found.columns, strict=True)
    ]
    table(found.column_names, list(zip(*columns, strict=True)))


def _exact(value: Any) -> Any:
    """Return a sum as a number: DuckDB adds whole numbers as decimals of 38 digits."""
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    return value


def _shown(value: Any) -> Any:
    value = _exact(value)
    if isinstance(value, int | float | None):
        return value
    text = " ".join((value.hex() if isinstance(value, bytes) else str(value)).split())
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


@click.command(
    short_help="Write a dataset in another format.",
    epilog=example(
        "datastore export data/code --format mds --to exports/code",
        "datastore export data/code@1 --format parquet --to exports/v1",
    ),
)
@URL
@click.option("--format", "kind", type=click.Choice(EXPORTS), required=True, help="What to write.")
@click.option(
    "--to", required=True, metavar="DIR", help="A folder that does not exist, or holds this very export: a path or URL."
)
@click.option("--column", "columns", multiple=True, metavar="NAME", help="Write only this column; may be repeated.")
@click.option(
    "--shard-bytes", metavar="SIZE", help="About how large a file is, such as 64MiB; by default as suits the format."
)
@progress_option
@json_option
def export(*, url: str, kind: Any, to: str, columns: tuple[str, ...], shard_bytes: str | None, as_json: bool) -> None:
    """Write what the dataset at URL holds, without what is deleted, in a format that another library reads.

    parquet; hf (datasets.load_from_disk); mds (MosaicML Streaming); litdata; megatron (.bin and .idx); webdataset (tar);
    jsonl. The folder appears when it is complete.
    """
    from datastore.dataset.snapshot import open_dataset
    from datastore.interop.export import export as export_dataset
    from datastore.units import format_bytes, format_seconds, parse_bytes

    dataset = open_dataset(url)
    size = parse_bytes(shard_bytes) if shard_bytes else 0
    report = with_progress(
        "export",
        export_dataset,
        unit="shards",
        dataset=dataset,
        to=to,
        format=kind,
        columns=columns or None,
        shard_bytes=size,
    )
    if as_json:
        say_json(report)
        return
    rate = f"{format_bytes(report.bytes / max(report.seconds, 1e-3))}/s"
    fields(
        {
            "written": f"{report.to} ({report.format})",
            "from": f"{dataset.url}, version {report.version}",
            "documents": f"{report.documents:,}",
            "tokens": f"{report.tokens:,}" if report.tokens else None,
            "files": f"{report.files:,}, {format_bytes(report.bytes)}",
            "time": f"{format_seconds(report.seconds)}, {rate}",
        }
    )


@click.command(
    name="import",
    short_help="Bring in a dataset of another format.",
    epilog=example("datastore import exports/code --format mds --to data/moved"),
)
@click.argument("source")
@click.option("--format", "kind", type=click.Choice(IMPORTS), required=True, help="What the source is.")
@click.option("--to", required=True, metavar="URL", help="The dataset; it is made if it is not there.")
@click.option(
    "--tokenizer", metavar="FILE", help="The tokenizer.json that made the tokens, or that is to encode the text."
)
@click.option("--text-key", help="Column of the text, if a tokenizer encodes it.  [default: text]")
@click.option("--tokens-key", help="Column of the token ids.  [default: tokens or input_ids]")
@click.option("--workers", type=int, help="Processes; as many as there are cores if left out. They change no byte.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any other setting of ingest; may be repeated."
)
@progress_option
@json_option
def import_(*, source: str, kind: Any, to: str, overrides: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Add what SOURCE, a folder or file that another library wrote, holds to a dataset.

    Token ids become tokens; with a tokenizer, text is encoded; all else becomes records with all their columns. A killed
    import goes on when the same command is given again; given once more, it adds nothing. Columns of pickles are refused.
    `datastore ingest` reads all of these, too, and finds out the format.
    """
    from datastore.config import settings_from
    from datastore.ingestion.importing import import_dataset
    from datastore.ingestion.settings import IngestSettings

    given, origins = given_options(options)
    settings = settings_from(IngestSettings, given, overrides=overrides, where="the options", origins=origins)
    report = with_progress(
        "import", in_source_bytes(import_dataset), source=source, to=to, format=kind, settings=settings
    )
    say_json(report) if as_json else _tell(report)


def _tell(report: "IngestReport") -> None:
    from datastore.units import format_bytes, format_seconds

    if not report.added:
        say(f"nothing new: {report.url}, version {report.version}, has all {report.known_files:,} files")
        return
    fields(
        {
            "dataset": f"{report.url}, version {report.version}, of {report.kind}",
            "added": f"{report.documents:,} documents" + (f", {report.tokens:,} tokens" if report.tokens else ""),
            "from": f"{report.files:,} files",
            "already there": f"{report.known_files:,} files" if report.known_files else None,
            "rejected": f"{sum(report.rejected.values()):,}, see {report.rejects}" if report.rejected else None,
            "shards": f"{report.shards:,}, {format_bytes(report.shard_bytes)}",
            "time": f"{format_seconds(report.seconds)}, {format_bytes(report.shard_bytes / max(report.seconds, 1e-3))}/s",
            "taken over": f"{report.tasks_resumed} of {report.tasks} tasks" if report.tasks_resumed else None,
        }
    )


@checkpoint.command("export", epilog=example("datastore checkpoint export runs/first hf/model --quantize int8"))
@RUN
@click.argument("to")
@STEP
@click.option(
    "--as",
    "kind",
    type=click.Choice(["hf", "gguf", "adapter", "torch", "safetensors", "dcp"]),
    default="hf",
    help="hf: a folder that transformers opens, adapters merged; gguf: a file for llama.cpp; adapter: the adapters alone, for peft; "
    "or a file of torch.save or safetensors, or a folder of torch's DCP.",
)
@click.option("--item", help="With torch, safetensors and dcp: only this item, such as model, without its name.")
@click.option(
    "--quantize",
    type=click.Choice(["int8", "int4", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"]),
    help="Store linear layers with so many bits per weight; q...: with gguf, as its own package rounds.",
)
@click.option("--replace", is_flag=True, help="Overwrite what the folder holds.")
@progress_option
@json_option
def export_checkpoint(
    *, run: str, to: str, step: int | None, kind: str, item: str | None, as_json: bool, **options: Any
) -> None:
    """Write the model of RUN to the folder TO, as transformers and vLLM open it; or the state of RUN in another format."""
    from datastore.training.export.export import export as export_model
    from datastore.units import format_bytes

    if kind in {"gguf", "adapter"}:
        from datastore.training.export.others import export_other

        done = export_other(run, to, step=step, kind=kind, **options)
        say_json(done) if as_json else say(f"step {done.step} is in {done.url}, {format_bytes(done.size_bytes)}")
        return
    if kind != "hf":
        _export_files(run, to, step=step, kind=kind, item=item, as_json=as_json)
        return
    done = with_progress("export", export_model, unit="stages", run=run, to=to, step=step, **options)
    if as_json:
        say_json(done)
        return
    say(f"step {done.step} is in {done.url}, {format_bytes(done.size_bytes)}")
    for reason in done.passed_over:
        say(f"not used: {reason}")


@checkpoint.command(epilog=example("datastore checkpoint average runs/first hf/mean --last 3"))
@RUN
@click.argument("to")
@click.option("--last", type=click.IntRange(min=1), default=3, help="So many of the newest steps that are stored.")
@progress_option
@json_option
def average(*, run: str, to: str, last: int, as_json: bool) -> None:
    """Write the mean of some steps of RUN to the folder TO, as transformers and vLLM open it."""
    from datastore.training.export.averaging import average as average_steps

    done = with_progress("average", average_steps, unit="steps", run=run, to=to, last=last)
    say_json(done) if as_json else say(f"the mean of {last} steps up to {done.step} is in {done.url}")


def _export_files(run: str, to: str, *, step: int | None, kind: Any, item: str | None, as_json: bool) -> None:
    from datastore.checkpoint.exchange.files import read_items, write_files
    from datastore.errors import ConfigError
    from datastore.storage.resolve import open_storage

    number = saved_steps(run, step)[-1]
    items = read_items(open_storage(run), number)
    if item is not None and item not in items:
        raise ConfigError("the step has no such item", item=item, items=list(items), hint="Name one that it has.")
    write_files(items if item is None else items[item], Path(to), format=kind)
    if as_json:
        say_json({"step": number, "path": to, "items": [item] if item else list(items)})
        return
    say(f"step {number} is in {to}")


@checkpoint.command(
    "import",
    short_help="Bring in a checkpoint of another format.",
    epilog=example("datastore checkpoint import hf/model --to runs/imported --step 0"),
)
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--to", "run", required=True, help="The run: a folder or URL.")
@click.option("--step", type=click.IntRange(min=0), default=0, help="The step that it becomes.")
@click.option("--item", default="model", help="The item that it becomes, if it is not a map of maps.")
@progress_option
@json_option
def import_checkpoint(*, source: Path, run: str, step: int, item: str, as_json: bool) -> None:
    """Save SOURCE as a step of a run: a file of torch.save or safetensors, a folder of Hugging Face, of torch's DCP, or of Orbax.

    Nothing of it is run: tensors and plain values alone are taken.
    """
    from datastore.checkpoint.exchange.files import import_files
    from datastore.storage.resolve import open_storage

    with waiting("import"):
        commit = import_files(source, open_storage(run), step=step, item=item)
    if as_json:
        say_json({"step": commit.step, "items": list(commit.items)})
        return
    say(f"step {commit.step} of {run}: {', '.join(commit.items)}")


COMMANDS = (sql, export, import_)
