"""The commands about loading: the disk of a cache, and how loading will go before there is a cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from datastore.cli.output import fields, json_option, progress_option, say, say_json, table, waiting, with_progress
from datastore.cli.shell import CommandGroup, example

if TYPE_CHECKING:
    from datastore.loader.forecast.forecast import Forecast

__all__ = ["cache", "plan"]

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


@click.command(
    short_help="Forecast how loading will go on a cluster.",
    epilog=example("datastore plan data/code --ranks 1,8,64 --seq-len 64 --batch 1 --link 1GiB --step 0.3"),
)
@click.argument("url", required=False)
@click.option(
    "--tokens", type=click.IntRange(min=1), help="Instead of URL: a dataset of so many tokens that is not there."
)
@click.option("--shard", metavar="SIZE", default="512 MiB", show_default=True, help="With --tokens: size of a shard.")
@click.option(
    "--ranks", default="1", show_default=True, metavar="N,...", help="Ranks that read; several numbers make a table."
)
@click.option(
    "--per-node",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Ranks of a node, which share its link.",
)
@click.option("--seq-len", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of a sample.")
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Samples of each rank in a step."
)
@click.option(
    "--link",
    metavar="SIZE",
    default="1.16 GiB",
    show_default=True,
    help="What a node receives in a second (10 Gbit/s).",
)
@click.option(
    "--store",
    metavar="SIZE",
    default="1024 TiB",
    help="What the store sends in a second, to all nodes.  [default: no limit]",
)
@click.option(
    "--delay",
    type=click.FloatRange(min=0),
    default=0.02,
    show_default=True,
    help="Seconds until the first byte of a request.",
)
@click.option(
    "--step",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Seconds of a training step without waiting.",
)
@click.option("--steps", type=click.IntRange(min=1), default=200, show_default=True, help="How many steps to look at.")
@click.option(
    "--cost", type=click.FloatRange(min=0), default=0.4, show_default=True, help="What a million requests cost."
)
@click.option("--memory", metavar="SIZE", default="1 GiB", show_default=True, help="`loader.memory_bytes` of a rank.")
@click.option(
    "--lanes", type=click.IntRange(min=1, max=65_536), default=4096, show_default=True, help="`loader.lanes`."
)
@click.option("--threads", type=click.IntRange(min=1), default=8, show_default=True, help="`loader.threads` of a rank.")
@click.option(
    "--plot",
    type=click.Path(path_type=Path),
    help="Save a picture (.png, .svg, .pdf) of requests, bytes and waiting by step.",
)
@progress_option
@json_option
def plan(*, url: str | None, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Forecast how loading the dataset URL will go: time to the first batch, requests, bytes, waiting, and what the requests cost.

    The planning is the real one, without data; the link, the threads and the memory of a node are simulated, and all other nodes
    are taken to be like it.
    """
    from datastore.dataset.snapshot import open_dataset
    from datastore.errors import ConfigError
    from datastore.loader.forecast.forecast import Cluster, forecast
    from datastore.loader.forecast.imagined import ImaginedDataset
    from datastore.loader.settings import LoaderSettings
    from datastore.units import format_bytes, format_seconds, parse_bytes

    if (url is None) == (options["tokens"] is None):
        raise ConfigError("one dataset is planned for", hint="Name a URL, or give --tokens.")
    data = (
        open_dataset(url)
        if url is not None
        else ImaginedDataset.of(options["tokens"], shard_bytes=parse_bytes(options["shard"]))
    )
    settings = LoaderSettings(
        memory_bytes=parse_bytes(options["memory"]), lanes=options["lanes"], threads=options["threads"]
    )
    with waiting("plan"):
        found = [
            forecast(
                data,
                Cluster(
                    ranks=ranks,
                    ranks_per_node=options["per_node"],
                    link_bytes_per_s=parse_bytes(options["link"]),
                    store_bytes_per_s=parse_bytes(options["store"]),
                    delay_s=options["delay"],
                    step_s=options["step"],
                    steps=options["steps"],
                    requests_cost=options["cost"],
                ),
                seq_len=options["seq_len"],
                rows=options["batch"],
                options=settings,
            )
            for ranks in _numbers(options["ranks"])
        ]
    if plot is not None:
        _draw(found, plot)
    if as_json:
        say_json(found)
        return
    rows = [
        (
            f"{one.ranks:,}",
            format_seconds(one.start_s),
            f"{one.stall:.1%}",
            f"{one.requests:,}",
            format_bytes(one.fetched_bytes),
            f"{format_bytes(round(one.bytes_per_s))}/s",
            f"{one.hit_rate:.1%}",
            f"{one.cost:.4f}",
        )
        for one in found
    ]
    table(("ranks", "first batch", "waiting", "requests", "fetched", "node", "there", "cost"), rows)
    say(f"{found[0].steps:,} steps of {format_seconds(options['step'])}; {found[0].lanes:,} lanes")
    if plot is not None:
        say(f"picture     {plot}")


def _numbers(text: str) -> list[int]:
    from datastore.errors import ConfigError

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError("not numbers of ranks", ranks=text, hint="Write 8, or 1,8,64.")
    return [int(part) for part in parts]


def _draw(found: "list[Forecast]", path: Path) -> None:
    """Save a picture of what each forecast says of a node, step by step."""
    from datastore.display import figure_class, save_figure

    figure = figure_class()(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(3, sharex=True)
    for one in found:
        steps = range(1, 1 + len(one.per_step))
        for axis, values in zip(
            axes, zip(*((each[2], each[3] / 2**20, each[1]) for each in one.per_step), strict=True), strict=True
        ):
            axis.plot(steps, values, label=f"{one.ranks:,} ranks")
    for axis, title in zip(axes, ("requests of a node", "MiB fetched by a node", "seconds waited"), strict=True):
        axis.set_title(title, loc="left")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("step")
    save_figure(figure, path)
