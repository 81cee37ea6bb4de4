"""The commands about several places and about damage: place, protect, repair, replicate; and what `doctor` says of a dataset."""

import time
from typing import TYPE_CHECKING, Any

import click

from datastore.cli.checkpoints import checkpoint
from datastore.cli.output import fields, json_option, progress_option, say, say_json, table, with_progress
from datastore.cli.shell import example
from datastore.units import format_bytes

if TYPE_CHECKING:  # pyarrow takes longer to load than a wrong option takes to find.
    from datastore.dataset.durability.health import Health
    from datastore.dataset.durability.repair import RepairReport

__all__ = ["COMMANDS", "tell_health"]

URL = click.argument("url")

_SHOWN = 20


@click.command(
    short_help="Let a dataset lie on several disks.",
    epilog=example(
        "datastore place data/books --root mirror/books", "datastore ingest src/ --to data/books --tokenizer tok.json"
    ),
)
@URL
@click.option("--root", "roots", multiple=True, metavar="URL", required=True, help="A further place; may be repeated.")
@click.option("--copies", type=click.IntRange(min=1), default=2, help="How many of the places hold each file.")
@progress_option
@json_option
def place(*, url: str, roots: tuple[str, ...], copies: int, as_json: bool) -> int:
    """Let the dataset at URL, which is made if it is not there, lie at URL and on the roots, one folder on each disk.

    As many copies as places are mirrors; one copy is a stripe, whose disks together hold the data once: give it parity
    with `datastore protect`. From then on any of the places opens the dataset. What it holds already is copied now.
    """
    from datastore.dataset.durability.repair import repair as repair_dataset
    from datastore.dataset.roots import open_roots, place_dataset

    info = place_dataset(url, roots=roots, copies=copies)
    storage, _ = open_roots(url)
    held = any(True for _ in storage.list("_log"))
    report = with_progress("copy", repair_dataset, unit="files", url=url) if held else None
    placement = info.placement
    assert placement is not None
    if as_json:
        say_json({"url": storage.url, "uuid": info.uuid, "placement": placement, "repair": report})
        return 0 if report is None or report.ok else 1
    many = len(placement.roots)
    kind = "mirrors" if placement.copies == many else "a stripe" if placement.copies == 1 else "several disks"
    fields(
        {
            "dataset": storage.url,
            "places": ", ".join(ref.url for ref in placement.roots),
            "copies": f"{placement.copies} of each file on {many} places ({kind})",
            "copied": f"{report.repaired:,} files" if report is not None and report.repaired else None,
        }
    )
    return 0 if report is None or report.ok else 1


@click.command(
    short_help="Make parity files, from which damaged shards can be made again.",
    epilog=example("datastore protect data/code --parity 4", "datastore doctor data/code"),
)
@URL
@click.option("--parity", "width", type=click.IntRange(min=1), default=4, help="Files per parity file.")
@progress_option
@json_option
def protect(*, url: str, width: int, as_json: bool) -> None:
    """Make parity files for the shards and documents of URL that have none, one for each few: `repair` uses them.

    Of each group one file may be lost or damaged. On several disks a group has no two files on one disk, as long as
    there are more disks than files per parity file. Run it again after each ingest: only what is new is read.
    """
    from datastore.dataset.durability.parity import protect as protect_dataset
    from datastore.units import format_bytes

    report = with_progress("protect", protect_dataset, target=url, width=width)
    if as_json:
        say_json(report)
        return
    if not report.committed:
        say(f"nothing new: {report.url}, version {report.version}, is protected")
    fields(
        {
            "dataset": f"{report.url}, version {report.version}",
            "made": f"{report.new_groups:,} parity files, {format_bytes(report.written_bytes)}, "
            f"from {format_bytes(report.read_bytes)}"
            if report.new_groups
            else None,
            "protected": f"{report.files:,} files by {report.groups:,} parity files ({format_bytes(report.parity_bytes)})",
            "beware": f"a lost disk would take more than one file of {report.shared_roots:,} groups; "
            "choose fewer files per parity file than there are disks"
            if report.shared_roots
            else None,
        }
    )


@click.command(
    short_help="Repair what is damaged or gone, from copies and parity.",
    epilog=example("datastore repair data/code --dry-run", "datastore repair data/code"),
)
@URL
@click.option("--dry-run", is_flag=True, help="Only say what is damaged, and whether it could be repaired.")
@click.option(
    "--root",
    "roots",
    multiple=True,
    metavar="OLD[=NEW]",
    help="The place OLD has a new, empty disk, which is filled; or is at NEW now. May be repeated.",
)
@click.option("--promote", is_flag=True, help="The first place is lost for good: the next one takes over.")
@progress_option
@json_option
def repair(*, url: str, dry_run: bool, roots: tuple[str, ...], promote: bool, as_json: bool) -> int:
    """Read every copy of every file of URL, and make again what is damaged or gone; exit with 1 if that was not possible.

    All versions that can be read are repaired, with their tags. Nothing is replaced but by bytes that have the right
    digest.
    """
    from datastore.dataset.durability.repair import repair as repair_dataset

    moves = {old: new or old for old, _, new in (root.partition("=") for root in roots)}
    report = with_progress(
        "repair", repair_dataset, unit="files", url=url, roots=moves, promote=promote, dry_run=dry_run
    )
    if as_json:
        say_json(report)
    else:
        _tell(report)
    return 0 if report.ok else 1


def _tell(report: "RepairReport") -> None:
    from datastore.units import format_bytes

    bad = [found for found in report.findings if not found.repair]
    good = [found for found in report.findings if found.repair]
    would = "could be " if report.dry_run else ""
    for found in good[:_SHOWN]:
        say(f"{would}repaired: {found.path} in {found.root}: {found.fault}; {found.repair}")
    if len(good) > _SHOWN:
        say(f"... and {len(good) - _SHOWN:,} more; --json lists all")
    for found in bad:
        say(f"not repaired: {found.path} in {found.root}: {found.fault}; {found.reason}")
    for root in report.lost_roots:
        say(f"not there: {root}. Mount it; or give its disk up with --root {root}, or --root {root}=NEW")
    result = (
        f"{report.repaired:,} {would}repaired, {len(bad):,} not"
        if report.findings
        else "every copy is as it was written"
    )
    say(f"{report.files:,} files, {report.copies:,} copies, {format_bytes(report.bytes)} read: {result}")


def tell_health(found: "Health") -> None:
    """Print what losing a disk would cost."""
    from datastore.units import format_bytes

    fields(
        {
            "dataset": f"{found.url}, version {found.version}",
            "copies": f"{found.copies} of each file on {len(found.roots)} place{'s' if len(found.roots) > 1 else ''}",
            "parity": f"{found.groups:,} groups" if found.groups else "none",
            "without either": f"{found.unprotected:,} of {found.files:,} files" if found.unprotected else None,
            "copies missing": f"{found.degraded:,}: run `datastore repair`" if found.degraded else None,
        }
    )
    say()
    say("If one of these were lost, so would be:")
    table(
        ("place", "holds", "documents", "tokens", "shards", "versions", "made again", "state"),
        [
            (
                loss.root,
                format_bytes(loss.bytes),
                loss.documents,
                loss.tokens,
                loss.shards,
                loss.versions,
                loss.rebuilt,
                "not there" if not loss.there else "has missed writes" if loss.behind else "ok",
            )
            for loss in found.roots
        ],
    )


@checkpoint.command(
    short_help="Keep a run in a second place, too.",
    epilog=example("datastore checkpoint replicate runs/first --to backup/first"),
)
@click.argument("run")
@click.option("--to", required=True, metavar="URL", help="The second place: a folder or a bucket.")
@click.option("--keep", type=click.IntRange(min=1), default=3, help="How many steps stay there.")
@click.option("--codec", type=click.Choice(["none", "zstd"]), default="none", help="How tensors are stored there.")
@click.option("--every", type=click.FloatRange(min=1), metavar="SECONDS", help="Do it again and again, until Ctrl-C.")
@progress_option
@json_option
def replicate(*, run: str, to: str, keep: int, codec: Any, every: float | None, as_json: bool) -> None:
    """Bring the steps of RUN that the second place lacks there, each held against its digests, and what the trainer keeps beside them.

    The run may go on meanwhile. Give the two the other way round to bring a run back, or resume it where the copy is.
    """
    from datastore.checkpoint.keeping import Keep
    from datastore.checkpoint.replica import replicate as bring

    while True:
        found = with_progress("replicate", bring, source=run, target=to, keep=Keep(last=keep), codec=codec)
        if as_json:
            say_json(found)
        else:
            steps = ", ".join(map(str, found.steps)) or "none"
            say(f"steps {steps}; {found.files:,} other files; {format_bytes(found.size_bytes)}")
            for what, named in (("damaged", found.damaged), ("dropped", found.dropped), ("let go", found.removed)):
                if named:
                    say(f"{what}: {', '.join(map(str, named))}")
        if every is None:
            return
        time.sleep(every)


COMMANDS = (place, protect, repair)
