"""`datastore trace`: from a step back to files, byte offsets and text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from datastore.cli.output import json_option, say, say_json
from datastore.cli.shell import example

if TYPE_CHECKING:  # pyarrow takes longer to load than a wrong option takes to find.
    from datastore.train.trace import StepTrace

__all__ = ["trace"]

_SHOWN_LINES = 8
_SHOWN_COLUMNS = 110


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of one document in a sample, with its text."""

    document: str
    source: str
    offset: int
    """Where the document starts in its source, in bytes."""

    length: int
    tokens: tuple[int, int]
    """Which tokens of the document."""

    text_bytes: tuple[int, int] | None
    """Which bytes of the document's text; in a text file, the source's bytes from `offset` on."""

    text: str | None


@dataclass(frozen=True, slots=True)
class TracedSample:
    """One sample of the step."""

    position: int
    sample: int
    passages: tuple[Passage, ...]


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
    from datastore.train.trace import trace as trace_run

    found = trace_run(run, step, rank=rank)
    shown = list(_samples(run, found, limit or len(found.samples)))
    if as_json:
        facts = {"step": found.step, "cursor": found.cursor, "world": found.world, "session": found.session}
        say_json(facts | {"rank": found.rank, "fingerprint": found.fingerprint, "samples": shown})
        return
    who = f"rank {found.rank} of {found.world}" if rank is not None else f"{found.world} rank(s)"
    say(f"step {found.step}: {len(found.samples):,} samples from position {found.cursor:,} on, seen by {who}")
    for sample in shown:
        _tell(sample)
    if len(shown) < len(found.samples):
        say(f"... and {len(found.samples) - len(shown):,} more samples; --limit 0 shows all")


def _samples(run: str, found: "StepTrace", limit: int) -> Iterator[TracedSample]:
    from datastore.loader.trace import Tracer
    from datastore.train.run import RunFolder, open_split

    config = RunFolder.open(run).config()
    dataset = open_split(config).training
    tracer = Tracer(dataset, seq_len=config.settings.data.seq_len)
    readable = dataset.commit.tokenizer is not None
    for position, origin in list(zip(found.positions, found.samples, strict=True))[:limit]:
        passages = tuple(
            Passage(
                document=span.document,
                source=span.source,
                offset=span.offset,
                length=span.length,
                tokens=span.document_tokens,
                text_bytes=tracer.text_range(span),
                text=tracer.text(span) if readable else None,
            )
            for span in origin.spans
        )
        yield TracedSample(position=position, sample=origin.sample, passages=passages)


def _tell(sample: TracedSample) -> None:
    say()
    say(f"position {sample.position:,}, sample {sample.sample:,}")
    for passage in sample.passages:
        named = "" if passage.document == passage.source else f" document {passage.document}"
        if passage.text_bytes is None:
            place = f"document at byte {passage.offset:,}, tokens {passage.tokens[0]:,} to {passage.tokens[1]:,}"
        elif passage.offset:
            place = (
                f"document at byte {passage.offset:,}, its bytes {passage.text_bytes[0]:,} to {passage.text_bytes[1]:,}"
            )
        else:
            place = f"bytes {passage.text_bytes[0]:,} to {passage.text_bytes[1]:,}"
        say(f"  {passage.source}{named}: {place}")
        lines = (passage.text or "").splitlines()
        for line in lines[:_SHOWN_LINES]:
            say(f"  | {line[:_SHOWN_COLUMNS]}")
        if len(lines) > _SHOWN_LINES:
            say(f"  | ... {len(lines) - _SHOWN_LINES} more lines")
