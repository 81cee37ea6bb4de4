"""Write `filters_expected.jsonl.gz`: what the filters of datatrove 0.10.1 say of real texts.

    python tests/parity/filters_reference.py        (in an environment with datatrove==0.10.1 and spacy==3.8.18)

The texts are of Python's standard library (PSF license): modules, their docstrings, and the topics of `help()`, which are
prose. Each filter is asked twice: as it is, where spaCy finds the words, and with words that stand between white space.
"""

import ast
import gzip
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    fineweb_quality_filter,
    gopher_quality_filter,
    gopher_repetition_filter,
)

EXPECTED = Path(__file__).parent / "filters_expected.jsonl.gz"
MOST = 8000


def texts() -> Iterator[tuple[str, str]]:
    yield from ((f"topic {name}", text) for name, text in sorted(topics.items()) if len(text) < MOST)
    paths = [
        path for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")) if "site-packages" not in path.parts
    ]
    for number, path in enumerate(paths):
        source = path.read_text(encoding="utf-8", errors="surrogateescape")
        if not source.isprintable() and "\udc80" <= max(source, default="") <= "\udcff":
            continue
        if number % 16 == 0 and 0 < len(source) < MOST:
            yield f"module {path.name}", source
        try:
            docstring = ast.get_docstring(ast.parse(source))
        except (SyntaxError, ValueError):
            continue
        if number % 3 == 0 and docstring and 300 < len(docstring) < MOST:
            yield f"docstring {path.name}", docstring


def judged(text: str, filters: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, each in filters.items():
        document = Document(text=text, id="")
        try:
            verdict = each.filter(document)
        except ZeroDivisionError:  # A text without a word.
            verdict = (False, "error")
        found[name] = "" if verdict is True else verdict[1]
        if name == "c4" and verdict is True:
            found["c4_text"] = document.text
    return found


def main() -> None:
    filters = {
        "gopher_quality": GopherQualityFilter(),
        "gopher_repetition": GopherRepetitionFilter(),
        "fineweb": FineWebQualityFilter(),
        "c4": C4QualityFilter(),
    }
    rows = [{"name": name, "text": text, "signs": judged(text, filters)} for name, text in texts()]
    for module in (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter):
        module.split_into_words = lambda text, _language=None: text.split()
    del filters["c4"]
    for row in rows:
        row["spaces"] = judged(row["text"], filters)
    with gzip.GzipFile(EXPECTED, "wb", mtime=0) as out:
        out.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


if __name__ == "__main__":
    main()
