"""The commands that make one thing out of another: a tokenizer, other tokens, what a teacher thinks of them, a smaller model."""

from pathlib import Path
from typing import Any

import click

from datastore.cli.ingest import (
    ADDRESS,
    ENGINE,
    EXCLUDE,
    INCLUDE,
    SET,
    SOURCES,
    WORKERS,
    engine_of,
    in_source_bytes,
    tell_ingest,
)
from datastore.cli.output import json_option, progress_option, say, say_json, with_progress
from datastore.cli.runs import TrainingLine
from datastore.cli.shell import CommandGroup, example, given_options

__all__ = ["COMMANDS"]


@click.group(cls=CommandGroup, short_help="Make a tokenizer.")
def tokenizer() -> None:
    """Make a tokenizer from text."""


@tokenizer.command(
    short_help="Train a byte-level tokenizer.",
    epilog=example("datastore tokenizer train src/ --vocab 1024 --to tok.json"),
)
@SOURCES
@click.option("--vocab", "vocab_size", type=int, default=16_384, help="Size of the vocabulary.")
@click.option(
    "--model", type=click.Choice(["bpe", "unigram"]), default="bpe", help="Merged pairs, or the likeliest pieces."
)
@click.option("--to", required=True, metavar="FILE", help="The tokenizer.json to write: a path or URL.")
@INCLUDE
@EXCLUDE
@click.option("--text-key", help="Key of the text in a line of JSON.  [default: text]")
@progress_option
@json_option
def train(*, sources: tuple[str, ...], vocab_size: int, model: str, to: str, as_json: bool, **options: Any) -> None:
    """Train a byte-level tokenizer from the text of each SOURCE, read as `ingest` reads it."""
    from datastore.config import settings_from
    from datastore.digest import sha256_hex
    from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
    from datastore.ingestion.settings import IngestSettings
    from datastore.storage.resolve import open_storage
    from datastore.units import format_bytes

    given, origins = given_options(options)
    reading = settings_from(IngestSettings, given, where="the options", origins=origins)
    settings = settings_from(
        TokenizerSettings,
        {"vocab_size": vocab_size, "model": model},
        where="the options",
        origins={"vocab_size": f"--vocab {vocab_size}"},
    )
    folder, slash, name = to.rpartition("/")
    target = open_storage(folder or slash or ".")
    raw = with_progress("tokenizer train", train_tokenizer, sources=sources, settings=settings, reading=reading)
    target.put(name, raw)
    if as_json:
        say_json({"url": to, "sha256": sha256_hex(raw), "size_bytes": len(raw)})
        return
    say(f"{to}: up to {vocab_size:,} ids, {format_bytes(len(raw))}, sha256 {sha256_hex(raw)[:16]}...")


@click.command(
    short_help="Encode a dataset with another tokenizer.",
    epilog=example("datastore retokenize data/code --to data/code-small --tokenizer tok.json"),
)
@click.argument("source", metavar="SOURCE")
@click.option("--to", required=True, metavar="URL", help="The dataset; it is made if it is not there.")
@click.option("--tokenizer", "new_tokenizer", required=True, metavar="FILE", help="A tokenizer.json or its folder.")
@WORKERS
@ENGINE
@ADDRESS
@click.option("--max-reject-ratio", type=float, help="Above this share of lost texts nothing is committed.")
@SET
@progress_option
@json_option
def retokenize(
    *,
    source: str,
    to: str,
    new_tokenizer: str,
    engine: str,
    address: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Add the documents of the dataset SOURCE to another one, encoded with another tokenizer.

    Each keeps its id, and what is said of where it comes from. A killed one goes on when the same command is given again;
    given once more, it adds what SOURCE has got since. A document whose tokens do not give its text back is rejected.
    """
    from datastore.config import settings_from
    from datastore.ingestion.importing import retokenize as encode_anew
    from datastore.ingestion.settings import IngestSettings

    given, origins = given_options(options)
    report = with_progress(
        "retokenize",
        in_source_bytes(encode_anew),
        source=source,
        to=to,
        tokenizer=new_tokenizer,
        settings=settings_from(IngestSettings, given, overrides=overrides, where="the options", origins=origins),
        engine=engine_of(engine, address),
    )
    say_json(report) if as_json else tell_ingest(report)


@click.command(
    short_help="Write what a teacher expects beside the tokens.",
    epilog=example("datastore teach data/code --model runs/first --top 8 --to data/taught"),
)
@click.argument("source", metavar="SOURCE")
@click.option("--model", required=True, metavar="RUN|FOLDER", help="The teacher: a run, or a Hugging Face folder.")
@click.option("--step", type=click.IntRange(min=1), help="The checkpoint of this step; the newest if left out.")
@click.option("--top", type=click.IntRange(min=1), default=8, help="Of each distribution, so many tokens.")
@click.option("--to", required=True, metavar="URL", help="The dataset; it is made if it is not there.")
@progress_option
@json_option
def teach(*, source: str, model: str, step: int | None, top: int, to: str, as_json: bool) -> None:
    """Add the documents of the dataset SOURCE to another one, each token with what a trained model expects after it.

    Two columns go with the tokens: teacher_tokens, the likeliest ones, and teacher_logprobs, the logarithms of their
    probabilities, for distillation. A killed one goes on when the same command is given again.
    """
    from datastore.training.export.teaching import teach as teach_tokens

    report = with_progress("teach", teach_tokens, source=source, to=to, model=model, step=step, top=top)
    if as_json:
        say_json(report)
    elif report.added:
        say(f"{report.url}, version {report.version}: {report.documents:,} documents, {report.tokens:,} tokens")
    else:
        say(f"nothing new: {report.url}, version {report.version}, has all of it")


@click.command(
    short_help="Make a finished model smaller.",
    epilog=example("datastore compress runs/first --recipe recipe.toml --to runs/smaller"),
)
@click.argument("source", metavar="RUN|FOLDER")
@click.option(
    "--recipe",
    required=True,
    type=click.Path(path_type=Path),
    help="A TOML file with [[hooks]], and [train] for recovery.",
)
@click.option("--data", default="", metavar="URL", help="The dataset to look at and learn from; a run has its own.")
@click.option("--to", required=True, metavar="RUN", help="The run to make.")
@click.option("--processes", type=int, default=1, help="Ranks to start on this machine.")
@progress_option
@json_option
def compress(*, source: str, recipe: Path, data: str, to: str, processes: int, as_json: bool) -> None:
    """Make a run that begins with a finished model, a RUN, RUN@STEP or a Hugging Face FOLDER, and does with it what a recipe says.

    Without train.steps in the recipe its hooks act in one shot and nothing is trained. The run can be gone on with
    (`datastore resume`), measured and exported as any other.
    """
    from datastore.training.start import compress as compress_model

    with TrainingLine(shown=not as_json) as line:
        done = compress_model(source, to, recipe=recipe, data=data, processes=processes, on_progress=line.update)
    if as_json:
        say_json(done)
        return
    say(
        f"{done.run}: loss {done.loss_before:.4f} before, {done.loss:.4f} after {done.steps:,} steps ({done.seconds:.0f} s)"
    )


COMMANDS = (tokenizer, retokenize, teach, compress)
