"""Write docs/troubleshooting.md, the page of error codes, from what `datastore explain` says.

`python tools/troubleshooting.py` writes it; with `--check` it exits with 1 if the page is not what would be written.
"""

import sys
from pathlib import Path

from datastore.reasons import LEFT_OUT, REJECTED
from datastore.troubleshooting import EXPLANATIONS, Explanation

PAGE = Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md"
HEAD = """\
# Errors by their code

A command that fails ends with one line:

```text
error[corrupt]: the file is damaged (where='data/code/shards/7f/...'). Restore it from a copy. See: datastore explain corrupt
```

The word in brackets says what kind of thing went wrong, the rest what exactly, with the values that it rests on, and what to do. Each
code has a section below. `datastore explain CODE` prints the same where there is no browser, `--debug` adds the traceback, and
[handle errors](howto/errors.md) shows how a program tells them apart. What a command had committed before it failed is whole, and
the same command, given again, goes on from there.

An ingest has reasons of its own for [records that it rejects](#rejected-records) and [files that it leaves out](#what-is-left-out).

| code | means |
|---|---|
"""


def page() -> str:
    """Return the page."""
    rows = [f"| [`{each.code}`](#{each.code}) | {each.means} |" for each in EXPLANATIONS]
    return HEAD + "\n".join([*rows, "", *map(section, EXPLANATIONS), *reasons()])


def reasons() -> list[str]:
    """Return the lines about the reasons of an ingest."""
    lines = []
    for name, told, of in (
        (
            "Rejected records",
            "They are counted against `--max-reject-ratio`; `datastore rejects URL` lists them.",
            REJECTED,
        ),
        ("What is left out", "It is counted in what the ingest reports, and no error.", LEFT_OUT),
    ):
        lines += [f"## {name}", "", told, "", "| reason | means |", "|---|---|"]
        lines += [*(f"| `{reason}` | {means} |" for reason, means in of.items()), ""]
    return lines


def section(told: Explanation) -> str:
    """Return the part of the page about one code."""
    place = f"In Python `ds.{told.error}`; exit code {told.status}." if told.error else f"Exit code {told.status}."
    pages = ", ".join(f"[{title(name)}]({name})" for name in told.pages)
    rows = [f"| {case} | {way_out} |" for case, way_out in told.cases]
    table = ["| how it comes about | what to do |", "|---|---|", *rows]
    return "\n".join([f"## {told.code}", "", f"{told.means} {place}", "", *table, "", f"More: {pages}.", ""])


def title(name: str) -> str:
    """Return the title of a page of the documentation, small at the beginning as it stands in a sentence."""
    text = (PAGE.parent / name).read_text(encoding="utf-8")
    first = next(line for line in text.splitlines() if line.startswith("# ")).removeprefix("# ")
    return first[0].lower() + first[1:]


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/troubleshooting.md is not what `datastore explain` says: run python tools/troubleshooting.py")
