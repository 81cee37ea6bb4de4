"""The commands about a run: start it, go on with it, look into what it saw.

This is the only place in the package that reads the environment (`ranks` knows what it means). The line that shows how training goes
is redrawn in place on a terminal; elsewhere it is printed every ten seconds. What must not be missed is printed in any case.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

from datastore.cli.output import PlainLines, json_option, progress_kind, progress_option, say, say_json, with_progress
from datastore.cli.ranks import launched_by
from datastore.cli.results import tell_needs, tell_profile
from datastore.cli.shell import example
from datastore.units import format_seconds

if TYPE_CHECKING:
    from datastore.training.metrics import Result, TrainingProgress
    from datastore.training.run.audit import TracedSpan

__all__ = ["COMMANDS", "TrainingLine", "line_of", "trace"]

RUN = click.argument("run")

STEP = click.option("--step", type=click.IntRange(min=1), help="The checkpoint of this step; the newest if left out.")

SET = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a setting (all are in docs/settings.md); may be repeated.",
)

PROCESSES = click.option("--processes", type=int, default=1, help="Ranks to start on this machine.")

RESTARTS = click.option(
    "--restarts",
    type=click.IntRange(min=0),
    help="How often to start all ranks again after one has died; as faults.restarts.",
)

PROFILE = click.option(
    "--profile", metavar="FIRST:LAST", help="Say where these steps go, and keep a trace of them; as metrics.profile."
)

TAKE_OVER = click.option("--take-over", is_flag=True, help="Write to a run whose other writer is surely gone.")


@click.command(
    short_help="Train a model as a TOML file says.",
    epilog=example("datastore train run.toml --to runs/second --set train.steps=4", "datastore resume runs/second"),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--to", "run", help="The run: a new folder or URL. `runs/` and the name of CONFIG if left out.")
@SET
@PROCESSES
@RESTARTS
@PROFILE
@TAKE_OVER
@click.option(
    "--dry-run", is_flag=True, help="Say what the run would need of memory, disk and time, and begin nothing."
)
@progress_option
@json_option
def train(
    *,
    config: Path,
    run: str | None,
    overrides: tuple[str, ...],
    processes: int,
    restarts: int | None,
    profile: str | None,
    take_over: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train a model as the TOML file CONFIG says. If the run is there already, it goes on."""
    from datastore.config import load_settings
    from datastore.training.launcher import Launch
    from datastore.training.settings import Settings
    from datastore.training.start import dry_run as rehearse
    from datastore.training.start import train as train_run

    settings = load_settings(Settings, config, _with_options(overrides, restarts, profile))
    where = run or f"runs/{config.stem}"
    if dry_run:
        needs = rehearse(settings, where, processes=processes, launch=Launch(**(launched_by(os.environ) or {})))
        say_json(needs) if as_json else tell_needs(needs)
        return
    _train(
        lambda **options: train_run(settings, where, processes=processes, take_over=take_over, **options),
        as_json=as_json,
    )


@click.command(
    short_help="Go on with a run.", epilog=example("datastore resume runs/first --set train.steps=20 --processes 2")
)
@RUN
@SET
@PROCESSES
@RESTARTS
@PROFILE
@TAKE_OVER
@progress_option
@json_option
def resume(
    *,
    run: str,
    overrides: tuple[str, ...],
    processes: int,
    restarts: int | None,
    profile: str | None,
    take_over: bool,
    as_json: bool,
) -> None:
    """Go on with RUN from its newest checkpoint, with any number of processes."""
    from datastore.training.start import resume as resume_run

    overrides = _with_options(overrides, restarts, profile)
    _train(
        lambda **options: resume_run(run, overrides=overrides, processes=processes, take_over=take_over, **options),
        as_json=as_json,
    )


@click.command(
    short_help="Begin another run with the weights of a run.",
    epilog=example("datastore fork runs/first --to runs/tuned --set train.steps=4 --set optim.lr=0.0001"),
)
@RUN
@click.option("--to", "target", required=True, help="The new run: a new folder or URL.")
@STEP
@SET
@PROCESSES
@progress_option
@json_option
def fork(*, run: str, target: str, step: int | None, overrides: tuple[str, ...], processes: int, as_json: bool) -> None:
    """Begin another run with the weights of RUN, and its settings but for those that are set.

    Optimizer, schedule and order begin anew. To go on with a run as it is, `datastore resume`.
    """
    from datastore.training.start import fork as fork_run

    named = run if step is None else f"{run}@{step}"
    _train(
        lambda **options: fork_run(named, target, overrides=overrides, processes=processes, **options),
        as_json=as_json,
    )


def _with_options(overrides: tuple[str, ...], restarts: int | None, profile: str | None) -> tuple[str, ...]:
    given = {"faults.restarts": restarts, "metrics.profile": profile}
    return (*overrides, *(f"{key}={value}" for key, value in given.items() if value is not None))


def _train(start: Callable[..., "Result"], *, as_json: bool) -> None:
    """Call `start` with who this process is and what shows progress, and print how the session ended."""
    from datastore.training.launcher import LOST_PEER, Launch, LostPeerError

    launch = Launch(**(launched_by(os.environ) or {}))
    with TrainingLine(shown=launch.rank == 0) as line:
        try:
            result = start(launch=launch, on_progress=line.update)
        except LostPeerError:
            raise click.exceptions.Exit(LOST_PEER) from None  # The rank that went says why: one line for one mistake.
    if launch.rank:
        return
    if as_json:
        say_json(result)
        return
    say(
        f"{'stopped at' if result.stopped else 'finished'} step {result.step:,} of {result.steps:,}: {_numbers(result)}"
    )
    if result.profile is not None:
        tell_profile(result.profile)
    if result.stopped:
        say(f"Everything is saved. Go on with: datastore resume {result.run}")


def _numbers(result: "Result") -> str:
    from datastore.units import format_count

    parts = [
        None if result.loss is None else f"loss {result.loss:.4f}",
        None if result.validation_loss is None else f"validation {result.validation_loss:.4f}",
        None if result.tokens_per_s is None else f"{result.tokens_per_s:,.0f} tokens/s",
        None if result.data_wait is None else f"waiting for data {result.data_wait:.2%}",
        f"{format_count(result.parameters)} parameters",
        f"{result.world} rank{'s' if result.world > 1 else ''}",
        format_seconds(result.seconds),
    ]
    return ", ".join(part for part in parts if part)


@click.command(short_help="Prove that each sample was consumed once.", epilog=example("datastore prove runs/first"))
@RUN
@progress_option
@json_option
def prove(*, run: str, as_json: bool) -> int:
    """Prove from the record of RUN that its order was consumed, each sample exactly once.

    Reads the dataset again, computes which samples every step must have consumed, and compares; exits with 1 if
    anything differs.
    """
    from datastore.training.run.proof import prove as prove_run

    proof = with_progress("prove", prove_run, unit="steps", run=run)
    if as_json:
        say_json(proof)
        return 0 if proof.holds else 1
    worlds = ", then ".join(f"{world} rank{'s' if world > 1 else ''}" for world in proof.worlds)
    say(f"{proof.steps:,} steps, up to the checkpoint of step {proof.steps:,}, taken by {worlds}")
    epochs = proof.samples / proof.epoch_samples
    say(f"{proof.samples:,} samples consumed, {proof.distinct:,} different ones; an epoch has {proof.epoch_samples:,}")
    if proof.skipped or proof.rewound:
        say(
            f"moved nothing, as their gradient was bad: {proof.skipped:,} steps, and {proof.rewound:,} that ended in a rewind"
        )
    if proof.purged:
        say(f"purged since: tokens of {proof.purged:,} steps; their samples are known, their tokens no longer")
    for problem in proof.problems:
        say(f"differs: {problem}")
    if proof.holds:
        once = (
            "every sample of the planned order" if epochs <= 1 else "in each epoch, every sample of the planned order"
        )
        say(f"proven: {once} was consumed exactly once")
    return 0 if proof.holds else 1


@click.command(
    short_help="Show what one step consumed.", epilog=example("datastore trace runs/first --step 5 --limit 2")
)
@click.argument("run")
@click.option("--step", type=click.IntRange(min=1), required=True, help="Which step; 1 is the first.")
@click.option("--rank", type=click.IntRange(min=0), help="Only what this rank saw; all ranks if left out.")
@click.option("--limit", type=click.IntRange(min=0), default=4, help="How many samples; 0 for all.")
@json_option
def trace(*, run: str, step: int, rank: int | None, limit: int, as_json: bool) -> None:
    """Show what one step of RUN consumed: document, source file, byte offset, text."""
    from datastore.training.run.audit import trace as trace_run

    found = trace_run(run, step, rank=rank, limit=limit)
    if as_json:
        say_json(found)
        return
    ranks = f"{found.world} rank{'s' if found.world > 1 else ''}"
    who = f"by {ranks}" if rank is None else f"by rank {rank} of {ranks}"
    say(f"step {found.step}, from position {found.cursor:,} on: {found.rows:,} samples seen {who}")
    if found.fault:
        back = "" if found.rewound_to is None else f"; the weights became those of step {found.rewound_to} again"
        say(f"it moved nothing: its gradient was bad{back}")
    for sample in found.samples:
        say()
        of = f" of {sample.dataset}" if sample.dataset else ""
        say(f"position {sample.position:,}: sample {sample.sample:,}{of}")
        for span in sample.spans:
            _tell(span)
        for column, value in sample.row.items():
            say(f"  {column}: {_cut(str(value))}")
    if len(found.samples) < found.rows:
        say()
        say(f"... and {found.rows - len(found.samples):,} more samples; --limit 0 shows all")


COMMANDS = (train, resume, fork, prove, trace)


_LINES = 8

_COLUMNS = 110


def _tell(span: "TracedSpan") -> None:
    named = "" if span.document == span.source else f", document {span.document}"
    say(f"  {span.source}{named}, bytes {span.start:,} to {span.stop:,} ({span.tokens:,} tokens)")
    lines = span.text.splitlines()
    for line in lines[:_LINES]:
        say(f"  | {_cut(line)}")
    if len(lines) > _LINES:
        say(f"  | ... {len(lines) - _LINES} more lines")


def _cut(line: str) -> str:
    return line if len(line) <= _COLUMNS else f"{line[: _COLUMNS - 3]}..."


_CLEAR = "\r\x1b[K"


class TrainingLine:
    """Shows the progress of a run on stderr; use it as a context."""

    def __init__(self, *, shown: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        kind = progress_kind() if shown else "none"
        self._shown = shown
        self._terminal = kind == "bar"
        self._lines = PlainLines(clock=clock) if kind == "plain" else None
        self._validation_loss: float | None = None

    def update(self, progress: "TrainingProgress") -> None:
        """Show `progress`; notes, and each new validation loss, stay on a line of their own."""
        if not self._shown:
            return
        if progress.note:
            self._keep(progress.note)
        if self._lines is not None:
            self._lines.say(lambda: line_of(progress))
        if not self._terminal:
            return
        if progress.validation_loss != self._validation_loss:
            self._validation_loss = progress.validation_loss
            self._keep(line_of(progress))
        sys.stderr.write(_CLEAR + line_of(progress))
        sys.stderr.flush()

    def _keep(self, text: str) -> None:
        sys.stderr.write(f"{_CLEAR if self._terminal else ''}{text}\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal:
            sys.stderr.write(_CLEAR)


def line_of(progress: "TrainingProgress") -> str:
    """Return one line about a run; what is not known yet is left out."""
    parts = [
        f"step {progress.step:,}/{progress.steps:,}",
        None if progress.loss is None else f"loss {progress.loss:.4f}",
        None if progress.validation_loss is None else f"validation {progress.validation_loss:.4f}",
        None if progress.tokens_per_s is None else f"{progress.tokens_per_s:,.0f} tokens/s",
        None if progress.data_wait is None else f"waiting for data {progress.data_wait:.1%}",
        None if progress.eta_s is None else f"{format_seconds(progress.eta_s)} left",
    ]
    return "  ".join(part for part in parts if part)
