"""The commands about a run: start it, go on with it, look into what it saw, let its model speak."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from datastore.cli.environment import launched_by
from datastore.cli.output import json_option, say, say_json
from datastore.cli.shell import example
from datastore.cli.tracing import trace
from datastore.cli.training import TrainingLine

if TYPE_CHECKING:  # torch and pyarrow take longer to load than a wrong option takes to find.
    from datastore.train.progress import Result

__all__ = ["COMMANDS"]

RUN = click.argument("run")
STEP = click.option("--step", type=click.IntRange(min=1), help="The checkpoint of this step; the newest if left out.")
SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; may be repeated.")
PROCESSES = click.option("--processes", type=int, default=1, help="Ranks to start on this machine.")
TAKE_OVER = click.option("--take-over", is_flag=True, help="Write to a run whose other writer is surely gone.")


@click.command(
    short_help="Train a model as a TOML file says.",
    epilog=example("datastore train run.toml --to runs/second --set train.steps=4", "datastore resume runs/second"),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--to", "run", help="The run: a new folder or URL. `runs/` and the name of CONFIG if left out.")
@SET
@PROCESSES
@TAKE_OVER
@json_option
def train(
    *, config: Path, run: str | None, overrides: tuple[str, ...], processes: int, take_over: bool, as_json: bool
) -> None:
    """Train a model as the TOML file CONFIG says. If the run is there already, it goes on."""
    from datastore.config import load_settings
    from datastore.training.settings import Settings
    from datastore.training.start import train as train_run

    settings = load_settings(Settings, config, overrides)
    where = run or f"runs/{config.stem}"
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
@TAKE_OVER
@json_option
def resume(*, run: str, overrides: tuple[str, ...], processes: int, take_over: bool, as_json: bool) -> None:
    """Go on with RUN from its newest checkpoint, with any number of processes."""
    from datastore.training.start import resume as resume_run

    _train(
        lambda **options: resume_run(run, overrides=overrides, processes=processes, take_over=take_over, **options),
        as_json=as_json,
    )


def _train(start: Callable[..., "Result"], *, as_json: bool) -> None:
    """Call `start` with who this process is and what shows progress, and print how the session ended."""
    from datastore.training.launcher import Launch

    launch = Launch(**(launched_by(os.environ) or {}))
    with TrainingLine(shown=launch.rank == 0) as line:
        result = start(launch=launch, on_progress=line.update)
    if launch.rank:
        return
    if as_json:
        say_json(result)
        return
    say(
        f"{'stopped at' if result.stopped else 'finished'} step {result.step:,} of {result.steps:,}: {_numbers(result)}"
    )
    if result.stopped:
        say(f"Everything is saved. Go on with: datastore resume {result.run}")


def _numbers(result: "Result") -> str:
    from datastore.units import format_count, format_seconds

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
@json_option
def prove(*, run: str, as_json: bool) -> int:
    """Prove from the record of RUN that its order was consumed, each sample exactly once.

    Reads the dataset again, computes which samples every step must have consumed, and compares; exits with 1 if
    anything differs.
    """
    from datastore.train.proof import prove as prove_run

    proof = prove_run(run)
    if as_json:
        say_json(proof)
        return 0 if proof.holds else 1
    worlds = ", then ".join(f"{world} rank{'s' if world > 1 else ''}" for world in proof.worlds)
    say(f"{proof.steps:,} steps, taken by {worlds}")
    epochs = proof.samples / proof.epoch_samples
    say(f"{proof.samples:,} samples consumed, {proof.distinct:,} different ones; an epoch has {proof.epoch_samples:,}")
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


@click.command(short_help="Measure a validation loss.", epilog=example("datastore evaluate runs/first"))
@click.argument("model")
@click.option("--run", help="The run whose held-out samples to use, if MODEL is a folder.")
@STEP
@click.option("--samples", type=click.IntRange(min=0), default=0, help="How many samples; 0: as many as the run uses.")
@json_option
def evaluate(*, model: str, run: str | None, step: int | None, samples: int, as_json: bool) -> None:
    """Measure the validation loss of MODEL, a run or an exported folder."""
    from datastore.train.validation import evaluate as evaluate_model

    found = evaluate_model(model, run=run or "", step=step, samples=samples)
    if as_json:
        say_json(found)
        return
    say(f"validation loss {found.loss:.4f} (perplexity {found.perplexity:.1f}) on {found.tokens:,} tokens")


@click.command(
    short_help="Let a model write.", epilog=example('datastore generate runs/first --prompt "def " --tokens 20')
)
@click.argument("model")
@click.option("--prompt", help="What the text begins with.")
@click.option("--tokens", type=int, default=128, help="At most so many new tokens.")
@click.option("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time.")
@click.option("--top-k", type=int, default=50, help="Draw from the likeliest K only; 0: from all.")
@click.option("--seed", type=int, default=0, help="The same seed gives the same text.")
@STEP
@json_option
def generate(*, model: str, prompt: str | None, step: int | None, as_json: bool, **sampling: Any) -> None:
    """Let MODEL, a run or an exported folder, go on with a text."""
    from datastore.document import convert
    from datastore.training.export.inference import Sampling
    from datastore.training.export.inference import generate as generate_text

    text = generate_text(model, prompt or "", sampling=convert(Sampling, sampling, where="the options"), step=step)
    if as_json:
        say_json({"prompt": prompt or "", "text": text})
        return
    say(text)


COMMANDS = (train, resume, prove, trace, evaluate, generate)
