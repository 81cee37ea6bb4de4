"""The commands about the checkpoints of a run: which there are, what is in one, whether it is sound, which stay."""

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

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
from datastore.cli.shell import CommandGroup, example

if TYPE_CHECKING:
    from datastore.checkpoint.difference import TensorChange
    from datastore.storage.base import Storage

__all__ = ["RUN", "STEP", "checkpoint", "saved_steps"]

RUN = click.argument("run")
STEP = click.option("--step", type=click.IntRange(min=0), help="Which step; the newest if left out.")


@click.group(cls=CommandGroup, short_help="Look at checkpoints, export a model.")
def checkpoint() -> None:
    """Look at the checkpoints of a run, check them, export a model."""


@checkpoint.command(short_help="List the steps of a run.", epilog=example("datastore checkpoint ls runs/first"))
@RUN
@json_option
def ls(*, run: str, as_json: bool) -> None:
    """List the steps that RUN can be restored to, oldest first."""
    from datastore.checkpoint.inspect import list_steps
    from datastore.storage.resolve import open_storage
    from datastore.units import format_bytes

    saved_steps(run, None)
    found = list_steps(open_storage(run))
    if as_json:
        say_json(found)
        return
    names = sorted({name for step in found for name, value in (step.metrics or {}).items() if value is not None})
    rows = [
        (
            step.step,
            moment(step.time),
            step.world,
            format_bytes(step.state_bytes),
            *((step.metrics or {}).get(name) for name in names),
            f"damaged: {step.error}" if step.error else "pinned" if step.pinned else "",
        )
        for step in found
    ]
    table(("step", "time", "ranks", "state", *names, ""), rows)


@checkpoint.command(short_help="Show what a checkpoint holds.", epilog=example("datastore checkpoint show runs/first"))
@RUN
@STEP
@json_option
def show(*, run: str, step: int | None, as_json: bool) -> None:
    """Show what a checkpoint of RUN holds."""
    from datastore.checkpoint.inspect import inspect_step
    from datastore.storage.resolve import open_storage
    from datastore.units import format_bytes

    report = inspect_step(open_storage(run), saved_steps(run, step)[-1])
    if as_json:
        say_json(report)
        return
    summary = report.summary
    fields(
        {
            "step": summary.step,
            "saved": f"{moment(summary.time)} by {report.writer}",
            "ranks": summary.world,
            "state": format_bytes(summary.state_bytes),
            "written": f"{format_bytes(summary.written_bytes)} in {len(report.parts)} parts",
            "after step": report.parent,
            **(summary.metrics or {}),
        }
    )
    say()
    table(
        ("item", "tensors", "size"), [(item.name, item.tensors, format_bytes(item.size_bytes)) for item in report.items]
    )


@checkpoint.command(short_help="Read and check checkpoints.", epilog=example("datastore checkpoint verify runs/first"))
@RUN
@click.option("--step", type=click.IntRange(min=0), help="Only this step; all of them if left out.")
@progress_option
@json_option
def verify(*, run: str, step: int | None, as_json: bool) -> int:
    """Read every byte of the checkpoints of RUN and name what is damaged; exit with 1 if anything is."""
    from datastore.checkpoint.inspect import verify_step
    from datastore.storage.resolve import open_storage
    from datastore.units import format_bytes

    storage = open_storage(run)
    reports = [
        with_progress(f"step {each}", verify_step, storage=storage, step=each) for each in saved_steps(run, step)
    ]
    damaged = any(report.bad for report in reports)
    if as_json:
        say_json(reports)
        return 1 if damaged else 0
    for report in reports:
        result = "damaged" if report.bad else "sound"
        say(f"step {report.step}: {result} ({report.chunks:,} chunks, {format_bytes(report.size_bytes)})")
        for bad in report.bad:
            place = f", bytes {bad.start:,} to {bad.stop:,}" if bad.stop else ""
            say(f"  bad: {bad.key}{place}{f' ({bad.tensor})' if bad.tensor else ''}: {bad.reason}")
    return 1 if damaged else 0


@checkpoint.command(
    short_help="Remove what need not be kept.", epilog=example("datastore checkpoint gc runs/first --last 2 --dry-run")
)
@RUN
@click.option("--last", type=click.IntRange(min=1), default=3, help="Keep the newest LAST steps that can be read.")
@click.option("--every", type=click.IntRange(min=0), default=0, help="Keep steps that are a multiple of this, too.")
@click.option(
    "--within", metavar="TIME", default="", help="Keep steps saved so short before the newest, too: 12h, 30d, 8w."
)
@click.option(
    "--best", metavar="METRIC", default="", help="Keep the step with the least METRIC, too; with -METRIC the largest."
)
@click.option("--best-count", type=click.IntRange(min=1), default=1, help="How many of the best.")
@click.option("--budget", metavar="SIZE", default="", help="What all may take, such as '40 GiB', a next save included.")
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@progress_option
@json_option
def gc(*, run: str, within: str, budget: str, dry_run: bool, as_json: bool, **rules: Any) -> None:
    """Remove old checkpoints of RUN, and files that no checkpoint needs. Training does this by itself. Pinned ones stay."""
    from datastore.checkpoint.keeping import Keep, check_metric, collect
    from datastore.storage.resolve import open_storage
    from datastore.units import format_bytes, parse_bytes, parse_seconds

    saved_steps(run, None)
    keep = Keep(
        **rules,
        within_s=math.ceil(parse_seconds(within)) if within else 0,
        budget_bytes=parse_bytes(budget) if budget else 0,
    )
    with waiting("gc"):
        storage = open_storage(run)
        check_metric(storage, keep)
        removed = collect(storage, keep, dry_run=dry_run)
    if as_json:
        say_json(removed)
        return
    verb = "would remove" if dry_run else "removed"
    steps = ", ".join(map(str, removed.steps)) or "none"
    say(f"{verb} steps: {steps}; {len(removed.keys):,} other files, {format_bytes(removed.size_bytes)}")


@checkpoint.command(
    short_help="Show what differs between two checkpoints.",
    epilog=example("datastore checkpoint diff runs/first@12 runs/first --item model"),
)
@click.argument("before")
@click.argument("after")
@click.option("--item", default="", help="Only this item, such as model.")
@click.option("--limit", type=click.IntRange(min=1), default=20, help="Tensors that are shown, the most changed first.")
@progress_option
@json_option
def diff(*, before: str, after: str, item: str, limit: int, as_json: bool) -> None:
    """Show which tensors changed between two checkpoints, and by how much. BEFORE and AFTER are RUN@STEP, or RUN for its newest."""
    from datastore.checkpoint.difference import difference

    sides = {"before": _side(before), "after": _side(after)}
    found = with_progress("compare", difference, unit="tensors", item=item, **sides)
    if as_json:
        say_json(found)
        return
    fields(
        {
            "before": found.before,
            "after": found.after,
            "tensors": f"{found.same:,} the same, {len(found.changed):,} changed, "
            f"{len(found.only_before):,} only before, {len(found.only_after):,} only after",
        }
    )
    changed = sorted(found.changed, key=lambda each: -(each.relative or 0.0))
    if changed:
        say()
        table(("tensor", "is", "elements", "largest", "relative"), [_change(each) for each in changed[:limit]])
        if len(changed) > limit:
            say(f"and {len(changed) - limit:,} more: raise --limit, or --json")
    for title, names in (("only before", found.only_before), ("only after", found.only_after)):
        if names:
            say(f"{title}: {', '.join(names[:limit])}")
    metrics = {} if item else {f"metrics/{key}": pair for key, pair in found.metrics.items()}
    others = {**metrics, **found.values}
    if others:
        say()
        table(("value", "before", "after"), [(key, *map(str, pair)) for key, pair in list(others.items())[:limit]])


def _side(named: str) -> "tuple[Storage, int]":
    """Return the run and the step that RUN@STEP, or RUN for its newest, names."""
    from datastore.checkpoint.steps import StepLog
    from datastore.dataset.snapshot import split_reference
    from datastore.errors import ConfigError
    from datastore.storage.resolve import open_storage

    run, name = split_reference(named)
    if name and not name.isdecimal():
        raise ConfigError("not a step", step=name, hint="Write RUN@12, or RUN for the newest step.")
    saved_steps(run, None)
    storage = open_storage(run)
    return storage, int(name) if name else StepLog(storage).steps()[-1]


def _change(change: "TensorChange") -> tuple[str, ...]:
    is_ = change.before if change.before == change.after else f"{change.before} -> {change.after}"
    numbers = (
        "" if change.changed is None else f"{change.changed:.1%}",
        "" if change.largest is None else f"{change.largest:.3g}",
        "" if change.relative is None else f"{change.relative:.3g}",
    )
    return (change.name, is_, *numbers)


@checkpoint.command(
    short_help="Keep a step for good, or no longer.",
    epilog=example("datastore checkpoint pin runs/first --step 16"),
)
@RUN
@click.option("--step", type=click.IntRange(min=0), required=True, help="Which step.")
@click.option("--remove", is_flag=True, help="Let it go by the rules again.")
@json_option
def pin(*, run: str, step: int, remove: bool, as_json: bool) -> None:
    """Keep a checkpoint of RUN whatever the rules say, which `--remove` ends."""
    from datastore.checkpoint.keeping import pin as pin_step
    from datastore.checkpoint.keeping import pinned_steps, unpin
    from datastore.storage.resolve import open_storage

    saved_steps(run, None)
    storage = open_storage(run)
    (unpin if remove else pin_step)(storage, step)
    pinned = pinned_steps(storage)
    if as_json:
        say_json({"pinned": pinned})
        return
    say(f"pinned: {', '.join(map(str, pinned)) or 'none'}")


@checkpoint.command(
    short_help="Drop the steps after one.",
    epilog=example("datastore checkpoint rewind runs/first --step 16 --dry-run"),
)
@RUN
@click.option("--step", type=click.IntRange(min=0), required=True, help="The step to go on from.")
@click.option("--dry-run", is_flag=True, help="Only say what would be dropped.")
@json_option
def rewind(*, run: str, step: int, dry_run: bool, as_json: bool) -> None:
    """Drop every checkpoint of RUN after a step, so that training goes on from there. They cannot be brought back."""
    from datastore.checkpoint.inspect import verify_step
    from datastore.checkpoint.keeping import drop_after
    from datastore.errors import CorruptError
    from datastore.storage.resolve import open_storage
    from datastore.training.run.lock import RunLock

    saved_steps(run, None)
    storage = open_storage(run)
    report = verify_step(storage, step)
    if report.bad:
        hint = "Name another step; `datastore checkpoint verify` says which are sound."
        raise CorruptError("this step is damaged", step=step, reason=report.bad[0].reason, hint=hint)
    with nullcontext() if dry_run else RunLock(storage, session="rewind"):
        dropped = drop_after(storage, step, dry_run=dry_run)
    if as_json:
        say_json({"step": step, "dropped": dropped})
        return
    verb = "would drop" if dry_run else "dropped"
    say(f"{verb} steps: {', '.join(map(str, dropped)) or 'none'}; the newest is {step}")


@checkpoint.command(
    short_help="Take an item out of old steps.",
    epilog=example("datastore checkpoint drop runs/first --item optim --before 20"),
)
@RUN
@click.option("--item", required=True, help="What goes, such as optim.")
@click.option(
    "--step", "steps", type=click.IntRange(min=0), multiple=True, help="At this step; give it again for more."
)
@click.option("--before", type=click.IntRange(min=0), help="At all steps before this one.")
@json_option
def drop(*, run: str, item: str, steps: tuple[int, ...], before: int | None, as_json: bool) -> None:
    """Take an item, such as the state of the optimizer, out of old checkpoints of RUN; what is left of them stays. The newest keeps all."""
    from datastore.checkpoint.dropping import drop_item
    from datastore.errors import ConfigError
    from datastore.storage.resolve import open_storage
    from datastore.units import format_bytes

    there = saved_steps(run, None)
    wanted = {*steps, *(step for step in there[:-1] if before is not None and step < before)}
    if not steps and before is None:
        raise ConfigError("no step is named", steps=there, hint="Name some with --step, or --before.")
    done = drop_item(open_storage(run), item, steps=wanted)
    if as_json:
        say_json(done)
        return
    say(
        f"{item} has gone from steps: {', '.join(map(str, done.steps)) or 'none'}; {format_bytes(done.size_bytes)} less"
    )


@checkpoint.command(
    short_help="Begin another run with a checkpoint.",
    epilog=example("datastore checkpoint fork runs/first --step 16 --to runs/branch"),
)
@RUN
@STEP
@click.option("--to", required=True, metavar="URL", help="The new run: an empty place.")
@progress_option
@json_option
def fork(*, run: str, step: int | None, to: str, as_json: bool) -> None:
    """Begin another run with a checkpoint of RUN, all of its state: `datastore resume` goes on from it, and RUN stays as it is.

    On one file system its files get a second name, and no bytes are copied. `datastore fork` begins anew with the weights alone.
    """
    from datastore.checkpoint.replica import fork_step
    from datastore.units import format_bytes

    chosen = saved_steps(run, step)[-1]
    done = with_progress("fork", fork_step, source=run, target=to, step=chosen)
    if as_json:
        say_json(done)
        return
    say(f"step {done.step}: {format_bytes(done.shared_bytes)} shared, {format_bytes(done.copied_bytes)} copied")


def saved_steps(run: str, step: int | None) -> list[int]:
    """Return `step`, or all steps of the run.

    Raises:
        MissingError: it has none.
    """
    from datastore.checkpoint.steps import StepLog
    from datastore.errors import MissingError
    from datastore.storage.resolve import open_storage

    steps = StepLog(open_storage(run)).steps()
    if not steps:
        raise MissingError("there is no checkpoint", run=run, hint="Name the folder of a run that has saved one.")
    return steps if step is None else [step]
