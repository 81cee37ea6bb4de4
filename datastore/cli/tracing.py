"""`datastore trace`: from a step back to files, byte offsets and text."""

from typing import TYPE_CHECKING

import click

from datastore.cli.output import json_option, say, say_json
from datastore.cli.shell import example

if TYPE_CHECKING:  # torch and pyarrow take longer to load than a wrong option takes to find.
    from datastore.training.run.audit import TracedSpan

__all__ = ["trace"]

_LINES = 8
_COLUMNS = 110


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
    for sample in found.samples:
        say()
        say(f"position {sample.position:,}: sample {sample.sample:,}")
        for span in sample.spans:
            _tell(span)
    if len(found.samples) < found.rows:
        say()
        say(f"... and {found.rows - len(found.samples):,} more samples; --limit 0 shows all")


def _tell(span: "TracedSpan") -> None:
    named = "" if span.document == span.source else f", document {span.document}"
    say(f"  {span.source}{named}, bytes {span.start:,} to {span.stop:,} ({span.tokens:,} tokens)")
    lines = span.text.splitlines()
    for line in lines[:_LINES]:
        say(f"  | {line if len(line) <= _COLUMNS else f'{line[: _COLUMNS - 3]}...'}")
    if len(lines) > _LINES:
        say(f"  | ... {len(lines) - _LINES} more lines")
