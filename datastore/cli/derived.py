"""The commands that make a dataset out of another one: with another tokenizer, or with what a teacher thinks of its tokens."""

from typing import Any

import click

from datastore.cli.ingest import ADDRESS, ENGINE, SET, WORKERS, engine_of, in_source_bytes, tell_ingest
from datastore.cli.output import json_option, progress_option, say_json, with_progress
from datastore.cli.shell import example, given_options

__all__ = ["COMMANDS"]


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


COMMANDS = (retokenize,)
