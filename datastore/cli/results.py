"""The commands about what runs have come to: which there are, what differs, their numbers as a picture; and their models in use."""

from pathlib import Path
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
from datastore.cli.shell import CommandGroup, example, given_options
from datastore.display import short_names

if TYPE_CHECKING:
    from datastore.training.metrics import StepProfile
    from datastore.training.run.history import RunSummary
    from datastore.training.session.rehearsal import Needs
    from datastore.training.validation import Evaluation

__all__ = ["COMMANDS", "tell_needs", "tell_profile"]


@click.group(cls=CommandGroup, short_help="List runs, show one, compare some.")
def runs() -> None:
    """List runs, show how one stands, compare some. Works while they go on."""


@runs.command(short_help="List the runs in a folder.", epilog=example("datastore runs ls runs"))
@click.argument("url", default="runs")
@json_option
def ls(*, url: str, as_json: bool) -> None:
    """List the runs at URL, or up to three folders below it."""
    from datastore.storage.resolve import open_storage
    from datastore.training.run.history import runs_below, summary_of

    root = open_storage(url).url
    found = [summary_of(each) for each in runs_below(url)]
    if as_json:
        say_json(found)
        return
    if not found:
        say(f"no runs in {url}")
        return
    rows = [
        (
            one.url.removeprefix(root).strip("/") or one.url.rsplit("/", 1)[-1],
            moment(one.created) if one.created else "",
            f"{one.step:,} of {one.steps:,}",
            _number(one.loss),
            _number(one.validation_loss),
            "" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}",
            one.problem or _state(one),
        )
        for one in found
    ]
    table(("run", "begun", "step", "loss", "validation", "tokens/s", ""), rows)


@runs.command(short_help="Show how a run stands.", epilog=example("datastore runs show runs/first"))
@click.argument("run")
@json_option
def show(*, run: str, as_json: bool) -> None:
    """Show how RUN stands: its data, its steps, its numbers, who writes to it."""
    from datastore.training.run.history import summary_of
    from datastore.units import format_count

    found = summary_of(run)
    if as_json:
        say_json(found)
        return
    if found.problem:
        say(f"{found.url}: {found.problem}")
        raise SystemExit(1)
    fields(
        {
            "run": found.url,
            "begun": moment(found.created),
            **{f"source {name}" if name != "data" else "data": url for name, url in found.data.items()},
            "step": f"{found.step:,} of {found.steps:,}, {format_count(found.tokens)} tokens",
            "loss": _number(found.loss),
            "validation": _number(found.validation_loss),
            "rate": None if found.tokens_per_s is None else f"{found.tokens_per_s:,.0f} tokens/s",
            "sessions": f"{found.sessions:,}, the last with {found.world} rank{'s' if found.world != 1 else ''}",
            "state": _state(found),
        }
    )


@runs.command(
    short_help="Show what differs between runs.", epilog=example("datastore runs compare runs/first runs/second")
)
@click.argument("which", metavar="RUN...", nargs=-1, required=True)
@json_option
def compare(*, which: tuple[str, ...], as_json: bool) -> None:
    """Show which settings of two RUNs or more differ, and their losses at the same steps."""
    from datastore.training.run.history import compare as compare_runs

    found = compare_runs(which)
    if as_json:
        say_json(found)
        return
    names = short_names(found.runs)
    if found.settings:
        table(("setting", *names), [(key, *map(str, values)) for key, values in found.settings.items()])
    else:
        say("all settings are the same")
    say()
    if found.losses:
        table(("loss at step", *names), [(f"{step:,}", *map(_number, losses)) for step, losses in found.losses])
    else:
        say("there is no step that all of them have taken")


@click.command(
    short_help="Draw the numbers of runs.",
    epilog=example("datastore plot runs/first runs/second --to losses.svg --number loss"),
)
@click.argument("which", metavar="RUN...", nargs=-1, required=True)
@click.option(
    "--to", "path", type=click.Path(path_type=Path), default="plot.png", help="The picture: .png, .svg or .pdf."
)
@click.option(
    "--number",
    "numbers",
    multiple=True,
    metavar="NAME",
    default=("loss", "validation_loss", "tokens_per_s", "lr"),
    help="A number of the metrics; may be repeated.",
)
@click.option("--against", type=click.Choice(["step", "tokens", "hours"]), default="step", help="The axis.")
@progress_option
@json_option
def plot(*, which: tuple[str, ...], path: Path, numbers: tuple[str, ...], against: str, as_json: bool) -> None:
    """Draw numbers of RUNs, a panel for each number and a line for each run."""
    from datastore.training.run.history import plot as plot_runs

    with waiting("plot"):
        plot_runs(which, path, numbers=numbers, against=against)
    if as_json:
        say_json({"path": str(path)})
        return
    say(f"picture     {path}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _state(found: "RunSummary") -> str:
    from datastore.training.run.history import ending_of

    if found.writer is not None:
        return f"going on: {found.writer}"
    return ending_of(found.step, steps=found.steps, saved=found.saved)


STEP = click.option("--step", type=click.IntRange(min=1), help="The checkpoint of this step; the newest if left out.")


@click.command(short_help="Measure a validation loss.", epilog=example("datastore evaluate runs/first"))
@click.argument("model")
@click.option("--run", help="The run whose held-out samples to use, if MODEL is a folder.")
@click.option("--data", help="A dataset to measure on instead, all of it held out; made with the tokenizer of the run.")
@STEP
@click.option("--samples", type=click.IntRange(min=0), default=0, help="How many samples; 0: as many as the run uses.")
@progress_option
@json_option
def evaluate(*, model: str, run: str | None, data: str | None, step: int | None, samples: int, as_json: bool) -> None:
    """Measure the validation loss of MODEL, a run or an exported folder."""
    from msgspec.structs import replace

    from datastore.training.export.inference import evaluate as evaluate_model

    found = with_progress(
        "evaluate",
        evaluate_model,
        unit="samples",
        source=model,
        run=run or "",
        data=data or "",
        step=step,
        samples=samples,
    )
    if as_json:
        say_json(found)
        return
    at = "" if found.step is None else f" at step {found.step:,}"
    say(f"validation loss {_with_perplexity(found)} on {found.tokens:,} {found.unit}{at}")
    for name, loss in found.sources.items():
        say(f"  {name}: {_with_perplexity(replace(found, loss=loss))}")
    for reason in found.passed_over:
        say(f"not used: {reason}")


def _with_perplexity(found: "Evaluation") -> str:
    """Return a loss, and the perplexity where it is that of one thing after the other."""
    one_of_many = found.unit in {"tokens", "items"}
    return f"{found.loss:.4f} (perplexity {found.perplexity:,.1f})" if one_of_many else f"{found.loss:.4f}"


@click.command(
    short_help="Let a model write.", epilog=example('datastore generate runs/first --prompt "def " --tokens 20')
)
@click.argument("model")
@click.option("--prompt", help="What the text begins with.")
@click.option("--tokens", type=int, default=128, help="At most so many new tokens.")
@click.option("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time.")
@click.option("--top-k", type=int, default=50, help="Draw from the likeliest K only; 0: from all.")
@click.option("--seed", type=int, default=0, help="The same seed gives the same text.")
@click.option("--cache-bits", type=int, default=0, help="Bits of the keys and values that are kept: 8, or 0 for all.")
@STEP
@progress_option
@json_option
def generate(*, model: str, prompt: str | None, step: int | None, as_json: bool, **sampling: Any) -> None:
    """Let MODEL, a run or an exported folder, go on with a text; what is printed begins with that text."""
    from datastore.document import convert
    from datastore.training.export.inference import Sampling
    from datastore.training.export.inference import generate as generate_text

    given, origins = given_options(sampling)
    how = convert(Sampling, given, where="the options", origins=origins)
    with waiting("generate"):
        text = generate_text(model, prompt or "", sampling=how, step=step)
    if as_json:
        prompt = prompt or ""
        say_json({"prompt": prompt, "completion": text.removeprefix(prompt), "text": text})
        return
    say(text)


@click.command(
    short_help="Compare sizes, rates and losses of models.",
    epilog=example("datastore report runs/first runs/smaller --plot sizes.png"),
)
@click.argument("models", metavar="RUN|FOLDER...", nargs=-1, required=True)
@click.option(
    "--run", default="", help="The run whose held-out samples to use; the first one that is named if left out."
)
@click.option("--data", default="", metavar="URL", help="A dataset to measure losses on instead.")
@click.option("--plot", "path", type=click.Path(path_type=Path), help="A picture of loss against size.")
@progress_option
@json_option
def report(*, models: tuple[str, ...], run: str, data: str, path: Path | None, as_json: bool) -> None:
    """Show of each model its size, its bits per weight, its non-zeros, what reading a token costs, and its loss."""
    from datastore.training.export.report import draw
    from datastore.training.export.report import report as report_models
    from datastore.units import format_bytes, format_count

    found = with_progress("report", report_models, unit="models", models=models, run=run, data=data)
    if path is not None:
        draw(found, path)
    if as_json:
        say_json(found)
        return
    sources = sorted({name for one in found for name in one.sources if len(one.sources) > 1})
    rows = [
        (
            name,
            format_bytes(one.size_bytes),
            f"{one.bits:.2f}",
            f"{one.nonzero:,} of {one.parameters:,}",
            format_count(one.flops_per_token),
            *(f"{rate:,.0f}" for rate in one.tokens_per_s.values()),
            _number(one.loss),
            *(_number(one.sources.get(name)) for name in sources),
        )
        for name, one in zip(short_names([each.model for each in found]), found, strict=True)
    ]
    names = ("model", "size", "bits", "not zero", "FLOPs/token", "tokens/s, 1 row", "32 rows", "loss", *sources)
    table(names, rows)


def tell_profile(found: "StepProfile") -> None:
    """Print where steps went."""
    from datastore.units import format_seconds

    shown = sorted(found.parts.items(), key=lambda one: -one[1])
    table(
        ("part", "a step", "share"),
        [(name, format_seconds(each), f"{each / found.step_s:.1%}") for name, each in shown],
    )
    say(f"steps {found.first:,} to {found.last:,}, {format_seconds(found.step_s)} each without evaluations and saves")
    if found.messages_s:
        say(
            f"sync: messages between ranks were under way for {format_seconds(found.messages_s)} of each, beside the parts"
        )
    say(f"trace       {found.trace} in the run, for https://ui.perfetto.dev")


def tell_needs(needs: "Needs") -> None:
    """Print what a run would need."""
    from msgspec.structs import asdict

    from datastore.units import format_bytes, format_count, format_seconds

    memory = needs.memory
    at_once = {name.removesuffix("_bytes"): size for name, size in asdict(memory).items() if name != "peak_bytes"}
    start = at_once.pop("start")
    disk = "" if needs.disk_free_bytes is None else f", {format_bytes(needs.disk_free_bytes)} free"
    here = f"{needs.ranks_here} of {needs.ranks}" if needs.ranks_here != needs.ranks else f"{needs.ranks}"
    fields(
        {
            "parameters": f"{format_count(needs.parameters)}, {format_count(needs.parameters_per_rank)} on each rank",
            "ranks": f"{here} here, on a {needs.device} in {needs.precision}",
            "memory": f"{format_bytes(memory.peak_bytes)} of each rank, of {format_bytes(needs.memory_here_bytes)} here",
            **{f"  {name}": format_bytes(size) for name, size in at_once.items() if size},
            "  at the start": f"{format_bytes(start)}, for the whole model on each rank",
            "a step": f"{needs.tokens_per_step:,} tokens",
            "all steps": f"{needs.steps:,}, {format_count(needs.tokens)} tokens, {needs.epochs:.2f} epochs",
            "data": f"{format_bytes(needs.data_bytes)}, read in {format_seconds(needs.data_s)} or more",
            "computing": f"{format_seconds(needs.compute_s)} or more",
            "checkpoint": f"{format_bytes(needs.checkpoint_bytes)}, at once {format_bytes(needs.checkpoints_bytes)}{disk}",
        }
    )
    for note in needs.notes:
        say(f"note: {note}")


COMMANDS = (runs, plot, evaluate, generate, report)
