"""The commands about the disk of a cache: what is in it, empty it, fill it before it is needed."""

from pathlib import Path

import click

from datastore.cli.output import fields, json_option, progress_option, say, say_json, table, with_progress
from datastore.cli.shell import CommandGroup, example

__all__ = ["cache"]

FOLDER = click.argument("folder", type=click.Path(path_type=Path))


@click.group(cls=CommandGroup, short_help="Look at a cache on disk, empty it, fill it.")
def cache() -> None:
    """Look at the folder in which loaders keep blocks of datasets that lie elsewhere (`loader.cache_dir`), empty it, fill it."""


@cache.command(short_help="List what a cache holds.", epilog=example("datastore cache ls cache"))
@FOLDER
@json_option
def ls(*, folder: Path, as_json: bool) -> None:
    """List what the cache in FOLDER holds of each dataset, the one used last first."""
    from datetime import UTC, datetime

    from datastore.loader.cache.folder import list_cached
    from datastore.units import format_bytes

    found = list_cached(folder.expanduser())
    if as_json:
        say_json(found)
        return
    if not found:
        say(f"{folder} holds no block")
        return
    rows = [
        (
            dataset.url or dataset.uuid,
            dataset.blocks,
            format_bytes(dataset.size_bytes),
            f"{datetime.fromtimestamp(dataset.used, UTC):%Y-%m-%d %H:%M:%S} UTC",
        )
        for dataset in found
    ]
    table(("dataset", "blocks", "size", "used"), rows)


@cache.command(short_help="Empty a cache, or take one dataset out.", epilog=example("datastore cache clear cache"))
@FOLDER
@click.option(
    "--dataset", metavar="URL", help="Only what it holds of this dataset, by URL or uuid as `cache ls` has them."
)
@json_option
def clear(*, folder: Path, dataset: str | None, as_json: bool) -> None:
    """Remove all blocks from the cache in FOLDER. Runs that use it go on, and fetch again what they need."""
    from datastore.errors import MissingError
    from datastore.loader.cache.folder import clear_cached, list_cached
    from datastore.units import format_bytes

    root = folder.expanduser()
    chosen = [found for found in list_cached(root) if dataset in {None, found.url, found.uuid}]
    if dataset is not None and not chosen:
        raise MissingError("the cache holds nothing of this dataset", dataset=dataset, hint="See `datastore cache ls`.")
    gone = [removed for found in chosen for removed in clear_cached(root, uuid=found.uuid)]
    if as_json:
        say_json(gone)
        return
    size_bytes = sum(found.size_bytes for found in gone)
    say(f"removed {sum(found.blocks for found in gone):,} blocks ({format_bytes(size_bytes)})")


@cache.command(
    short_help="Fill a cache with a dataset.",
    epilog=example("datastore cache warm data/code --dir cache --bytes '8 GiB'"),
)
@click.argument("url")
@click.option("--dir", "folder", metavar="FOLDER", required=True, help="The cache: `cache_dir` of the loaders.")
@click.option("--bytes", "size", metavar="SIZE", default="64 GiB", help="What all its blocks may take: `cache_bytes`.")
@click.option("--steps", type=click.IntRange(min=1), help="Only what the first steps of a loader read.")
@click.option("--seq-len", type=click.IntRange(min=1), default=1024, help="Of that loader, as the next three.")
@click.option("--global-batch", type=click.IntRange(min=1), default=64)
@click.option("--seed", type=click.IntRange(min=0), default=0)
@click.option("--columns", metavar="NAMES", default="", help="Parted by commas; the loss mask always is among them.")
@progress_option
@json_option
def warm(*, url: str, folder: str, size: str, steps: int | None, as_json: bool, **values: str | int) -> int:
    """Bring the blocks of the dataset at URL to a cache, before a run needs them. Nothing is evicted for it.

    Exit with 1 if there was not enough room for all of it.
    """
    from datastore.dataset.snapshot import open_dataset
    from datastore.loader.cache.warm import warm_cache
    from datastore.loader.lookup import SampleReader, blocks_of_steps
    from datastore.loader.settings import LoaderSettings
    from datastore.units import format_bytes, parse_bytes

    columns = tuple(name for name in str(values["columns"]).split(",") if name)
    options = LoaderSettings(cache_dir=folder, cache_bytes=parse_bytes(size), columns=columns)
    dataset, blocks = open_dataset(url), None
    if steps is not None:
        reader = SampleReader(dataset, seq_len=int(values["seq_len"]), seed=int(values["seed"]), options=options)
        blocks = blocks_of_steps(reader, steps=steps, global_batch=int(values["global_batch"]))
    report = with_progress("warm", warm_cache, target=dataset, options=options, blocks=blocks)
    if as_json:
        say_json(report)
        return 0 if not report.left_out_bytes else 1
    if report.local:
        say(f"{report.url} lies on this machine and is read where it lies: there is nothing to keep")
        return 0
    fields(
        {
            "dataset": f"{report.url}, version {report.version}",
            "asked for": format_bytes(report.size_bytes),
            "there before": format_bytes(report.there_bytes),
            "fetched": format_bytes(report.written_bytes),
            "left out": f"{format_bytes(report.left_out_bytes)}: there is no room" if report.left_out_bytes else None,
        }
    )
    return 0 if not report.left_out_bytes else 1
