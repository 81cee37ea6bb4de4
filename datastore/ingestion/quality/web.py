"""The rules of C4 and of FineWeb: pages of the web whose lines are no sentences.

C4 also cleans: lines that are no sentences go, and with them the digits of citations. Where a line was cut out, the text is no
longer what the source says between the document's offset and its end; its digest is that of the text that is left.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", JMLR 2020, 2.2;
Penedo et al., "The FineWeb Datasets", 2024, https://arxiv.org/abs/2406.17557; as in `c4_filters.py` and
`fineweb_quality_filter.py` of datatrove 0.10.1.
"""

import re
from collections import Counter

from typing_extensions import override

from datastore.ingestion.quality.filter import Count, Filter, Share
from datastore.ingestion.quality.repetition import duplicates
from datastore.ingestion.quality.text import TERMINAL, Dropped, Text, Verdict, WordKind

__all__ = ["C4", "FineWeb"]

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_SENTENCE_END = re.compile(r"[.!?…。！？｡][\"'”’)\]]*(?=\s)")  # noqa: RUF001 - signs of texts
_ENDS = (".", "?", "!", '"', "'")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_TERMINAL = tuple(sorted(TERMINAL))


class C4(Filter, frozen=True, kw_only=True, tag="c4"):
    """Keeps the lines that are sentences, and drops what has too few of them."""

    min_sentences: Count = 5
    """In the lines that are kept."""

    min_line_words: Count = 3
    max_word: Count = 1000
    """Characters; a line with a longer word goes."""

    only_finished_lines: bool = True
    """Whether lines go that do not end with a point, a question or exclamation mark, or a quote."""

    drop_lorem_ipsum: bool = True
    drop_curly_brackets: bool = True
    """Whether a document goes that has `{` in a line that would be kept."""

    remove_javascript: bool = True
    """Whether lines go that speak of JavaScript."""

    remove_policies: bool = True
    """Whether lines go that speak of cookies or terms of use."""

    remove_citations: bool = True
    """Whether `[3]`, `[edit]` and the like go."""

    @override
    def apply(self, text: Text) -> Verdict:
        kept: list[str] = []
        changes: Counter[str] = Counter()
        sentences = 0
        for whole in text.text.splitlines():
            line = whole.strip()
            words = line.split()
            cleaned = _CITATION.sub("", line) if self.remove_citations and "[" in line else line
            fault = self._fault(cleaned, words)
            if fault in {"lorem_ipsum", "curly_bracket"}:
                return Dropped(fault)
            if fault:
                changes["lines removed"] += bool(line)
                continue
            changes["citations removed"] += cleaned != line
            sentences += len(_SENTENCE_END.findall(cleaned)) + 1
            kept.append(cleaned)
        if sentences < self.min_sentences:
            return Dropped("too_few_sentences")
        left = "\n".join(kept).strip()
        if not left:
            return Dropped("empty")
        return text if left == text.text else text.changed(left, +changes)

    def _fault(self, line: str, words: list[str]) -> str:
        """Return why the line, or for two of the reasons the document, is not kept."""
        if len(line) > self.max_word and any(len(word) > self.max_word for word in words):
            return "long_word"
        if self.only_finished_lines and (not line.endswith(_ENDS) or line.endswith("...")):
            return "unfinished"
        if len(words) < self.min_line_words:
            return "short"
        return self._unwanted(line)

    def _unwanted(self, line: str) -> str:
        lower = line.lower()
        if self.drop_lorem_ipsum and "lorem ipsum" in lower:
            return "lorem_ipsum"
        if self.remove_javascript and "javascript" in lower:
            return "javascript"
        if self.drop_curly_brackets and "{" in line:
            return "curly_bracket"
        return "policy" if self.remove_policies and any(each in lower for each in _POLICY) else ""


class FineWeb(Filter, frozen=True, kw_only=True, tag="fineweb"):
    """Drops lists, menus and pages that repeat lines."""

    min_finished_lines: Share = 0.12
    """Share of the lines that end with a sign that ends a sentence."""

    max_short_lines: Share = 0.67
    """Share of the lines of at most `short_line` characters."""

    short_line: Count = 30
    max_repeated_characters: Share = 0.01
    """Share of the characters that are in lines that an earlier one equals."""

    max_lines_per_word: Share = 0.3
    words: WordKind = "signs"
    """As in `gopher_quality`."""

    @override
    def apply(self, text: Text) -> Verdict:
        reason = self._reason(text)
        return Dropped(reason) if reason else text

    def _reason(self, text: Text) -> str:
        lines = [line for line in text.text.split("\n") if line and not line.isspace()]
        if not lines:
            return "empty"
        if sum(line.endswith(_TERMINAL) for line in lines) / len(lines) < self.min_finished_lines:
            return "unfinished_lines"
        if sum(len(line) <= self.short_line for line in lines) / len(lines) > self.max_short_lines:
            return "short_lines"
        breaks = text.text.count("\n")
        if duplicates(lines)[1] / (len(text.text) - breaks) > self.max_repeated_characters:
            return "repeated_lines"
        many = breaks / max(1, len(text.words(self.words).words)) > self.max_lines_per_word
        return "list" if many else ""
