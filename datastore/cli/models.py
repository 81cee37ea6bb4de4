"""The commands that use a trained model: measure its loss, let it write."""

import math
from typing import Any

import click

from datastore.cli.output import json_option, progress_option, say, say_json, with_progress
from datastore.cli.shell import example, given_options

__all__ = ["COMMANDS"]

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
    say(f"validation loss {found.loss:.4f} (perplexity {found.perplexity:.1f}) on {found.tokens:,} tokens{at}")
    for name, loss in found.sources.items():
        say(f"  {name}: {loss:.4f} (perplexity {math.exp(loss):.1f})")
    for reason in found.passed_over:
        say(f"not used: {reason}")


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
    """Let MODEL, a run or an exported folder, go on with a text; what is printed begins with that text."""
    from datastore.document import convert
    from datastore.training.export.inference import Sampling
    from datastore.training.export.inference import generate as generate_text

    given, origins = given_options(sampling)
    text = generate_text(
        model, prompt or "", sampling=convert(Sampling, given, where="the options", origins=origins), step=step
    )
    if as_json:
        prompt = prompt or ""
        say_json({"prompt": prompt, "completion": text.removeprefix(prompt), "text": text})
        return
    say(text)


COMMANDS = (evaluate, generate)
