"""The rules of Gopher: documents that are no prose, and documents that repeat themselves.

The numbers are those of the paper, and the names of what was dropped say which rule it was. Where the paper is silent we
follow datatrove, so that a corpus that was filtered by it comes out alike.

Source: Rae et al., "Scaling Language Models: Methods, Analysis & Insights from Training Gopher", 2021, appendix A,
https://arxiv.org/abs/2112.11446; datatrove 0.10.1, `gopher_quality_filter.py` and `gopher_repetition_filter.py`.
"""

import re

from typing_extensions import override

from datastore.ingestion.quality.filter import Count, Filter, Share
from datastore.ingestion.quality.repetition import duplicates, repeated_characters, top_characters
from datastore.ingestion.quality.text import PUNCTUATION, Dropped, Text, Verdict, WordKind

__all__ = ["GopherQuality", "GopherRepetition"]

_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")


class GopherQuality(Filter, frozen=True, kw_only=True, tag="gopher_quality"):
    """Drops what does not look like prose."""

    min_words: Count = 50
    """Words that are not only signs."""

    max_words: Count = 100_000
    min_mean_word: Share = 3
    """Characters of a word, in the mean."""

    max_mean_word: Share = 10
    max_symbols: Share = 0.1
    """`#` for each word, and likewise ellipses."""

    max_bullet_lines: Share = 0.9
    """Share of the lines that begin with a bullet."""

    max_ellipsis_lines: Share = 0.3
    """Share of the lines that end with an ellipsis."""

    min_alphabetic: Share = 0.8
    """Share of the words that have a letter; with `words = "signs"` a comma is a word, too."""

    min_stop_words: Count = 2
    """How many different ones of `stop_words` there must be."""

    stop_words: tuple[str, ...] = _STOP_WORDS

    words: WordKind = "signs"
    """Whether signs are words of their own, as in datatrove, or words are what stands between spaces, as in the paper."""

    @override
    def apply(self, text: Text) -> Verdict:
        reason = self._words_reason(text) or self._lines_reason(text.text) or self._letters_reason(text)
        return Dropped(reason) if reason else text

    def _words_reason(self, text: Text) -> str:
        """Return what is wrong with number and length of the words, or with signs among them."""
        words = text.words(self.words).words
        signs = [word for word in words if not word.isalnum() and PUNCTUATION.issuperset(word)]
        counted = len(words) - len(signs)
        if counted < self.min_words:
            return "too_few_words"
        if counted > self.max_words:
            return "too_many_words"
        mean = (int(text.words(self.words).ends[-1]) - sum(map(len, signs))) / max(1, counted)
        if not self.min_mean_word <= mean <= self.max_mean_word:
            return "short_words" if mean < self.min_mean_word else "long_words"
        most = self.max_symbols * max(1, len(words))
        if text.text.count("#") > most:
            return "hashes"
        return "ellipses" if text.text.count("...") + text.text.count("…") > most else ""

    def _lines_reason(self, text: str) -> str:
        lines = text.splitlines()
        if sum(line.lstrip().startswith(("•", "-")) for line in lines) > self.max_bullet_lines * len(lines):
            return "bullets"
        if sum(line.rstrip().endswith(("...", "…")) for line in lines) > self.max_ellipsis_lines * len(lines):
            return "lines_end_in_ellipses"
        return ""

    def _letters_reason(self, text: Text) -> str:
        words = text.words(self.words).words
        others = [word for word in words if not word.isalpha()]
        alphabetic = len(words) - len(others) + sum(any(map(str.isalpha, word)) for word in others)
        if alphabetic < self.min_alphabetic * len(words):
            return "few_letters"
        return "few_stop_words" if len({*self.stop_words}.intersection(words)) < self.min_stop_words else ""


class GopherRepetition(Filter, frozen=True, kw_only=True, tag="gopher_repetition"):
    """Drops what repeats lines, paragraphs or runs of words."""

    max_paragraphs: Share = 0.3
    """Share of the paragraphs that an earlier one equals."""

    max_paragraph_characters: Share = 0.2
    """Share of the characters that are in them."""

    max_lines: Share = 0.3
    max_line_characters: Share = 0.2
    top: tuple[tuple[int, float], ...] = ((2, 0.2), (3, 0.18), (4, 0.16))
    """Share of the characters that are in the most frequent run of so many words."""

    repeated: tuple[tuple[int, float], ...] = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    """Share of the characters that are in runs of so many words that were there before."""

    words: WordKind = "signs"
    """As in `gopher_quality`."""

    @override
    def apply(self, text: Text) -> Verdict:
        reason = self._lines_reason(text.text) or self._runs_reason(text)
        return Dropped(reason) if reason else text

    def _lines_reason(self, text: str) -> str:
        rules = (
            (_PARAGRAPHS.split(text.strip()), self.max_paragraphs, self.max_paragraph_characters, "paragraph"),
            (_LINES.split(text), self.max_lines, self.max_line_characters, "line"),
        )
        for parts, most, most_characters, name in rules:
            found, characters = duplicates(parts)
            if found / len(parts) > most:
                return f"repeated_{name}s"
            if characters / max(1, len(text)) > most_characters:
                return f"characters_of_repeated_{name}s"
        return ""

    def _runs_reason(self, text: Text) -> str:
        words, size = text.words(self.words), max(1, len(text.text))
        for length, most in self.top:
            if top_characters(words, length) / size > most:
                return f"top_{length}_words"
        for length, most in self.repeated:
            if repeated_characters(words, length, least=most * size) / size > most:
                return f"repeated_{length}_words"
        return ""
