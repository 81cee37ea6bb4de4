"""The filters of Gopher, C4 and FineWeb decide as datatrove's do, on real texts (`filters_reference.py` made what is expected)."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datastore.ingestion.quality.filter import Filter
from datastore.ingestion.quality.gopher import GopherQuality, GopherRepetition
from datastore.ingestion.quality.text import Dropped, Text, WordKind
from datastore.ingestion.quality.web import C4, FineWeb

EXPECTED = Path(__file__).parent / "filters_expected.jsonl.gz"
FILTERS: dict[str, Callable[[WordKind], Filter]] = {
    "gopher_quality": lambda words: GopherQuality(words=words),
    "gopher_repetition": lambda words: GopherRepetition(words=words),
    "fineweb": lambda words: FineWeb(words=words),
    "c4": lambda _: C4(),
}
THEIRS = {
    "gopher_short_doc": "too_few_words",
    "gopher_long_doc": "too_many_words",
    "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words",
    "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses",
    "gopher_too_many_bullets": "bullets",
    "gopher_too_many_end_ellipsis": "lines_end_in_ellipses",
    "gopher_below_alpha_threshold": "few_letters",
    "gopher_enough_stop_words": "few_stop_words",
    "dup_para_frac": "repeated_paragraphs",
    "dup_para_char_frac": "characters_of_repeated_paragraphs",
    "dup_line_frac": "repeated_lines",
    "dup_line_char_frac": "characters_of_repeated_lines",
    "line_punct_ratio": "unfinished_lines",
    "short_line_ratio": "short_lines",
    "char_dup_ratio": "repeated_lines",
    "list_ratio": "list",
    **{f"top_{length}_gram": f"top_{length}_words" for length in (2, 3, 4)},
    **{f"duplicated_{length}_n_grams": f"repeated_{length}_words" for length in range(5, 11)},
}
"""What datatrove calls our reasons."""


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(EXPECTED.read_bytes()).splitlines()]


def verdicts(rows: list[dict[str, Any]], name: str, words: WordKind) -> list[tuple[str, str]]:
    """Return of each text what datatrove says and what we say: a reason, or nothing if it is kept."""
    own = FILTERS[name](words)
    found = [own.apply(Text(row["text"])) for row in rows]
    return [
        (THEIRS.get(row[words][name], row[words][name]), verdict.reason if isinstance(verdict, Dropped) else "")
        for row, verdict in zip(rows, found, strict=True)
    ]


@pytest.mark.parametrize("name", ["gopher_quality", "gopher_repetition", "fineweb"])
def test_with_the_same_words_every_decision_and_its_reason_is_that_of_datatrove(
    rows: list[dict[str, Any]], name: str
) -> None:
    pairs = verdicts(rows, name, "spaces")
    assert [pair for pair in pairs if pair[0] != pair[1]] == []
    assert len({theirs for theirs, _ in pairs}) > 2, "the texts try more than one rule"


@pytest.mark.parametrize(
    ("name", "differences"), [("gopher_quality", 2), ("gopher_repetition", 0), ("fineweb", 0), ("c4", 2)]
)
def test_with_our_words_for_those_of_spacy_few_decisions_differ(
    rows: list[dict[str, Any]], name: str, differences: int
) -> None:
    pairs = verdicts(rows, name, "signs")
    outcomes = Counter((bool(theirs), bool(ours)) for theirs, ours in pairs)
    assert outcomes[True, False] + outcomes[False, True] == differences, (outcomes, len(rows))
    assert outcomes[True, True] > 10
    assert outcomes[False, False] > 10


def test_c4_leaves_the_lines_that_datatrove_leaves(rows: list[dict[str, Any]]) -> None:
    own = C4()
    both = 0
    for row in rows:
        verdict = own.apply(Text(row["text"]))
        if isinstance(verdict, Text) and "c4_text" in row["signs"]:
            assert verdict.text == row["signs"]["c4_text"], row["name"]
            both += 1
    assert both > 50
