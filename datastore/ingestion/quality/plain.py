"""Plain rules: how long a text is, how long its lines are, what it is made of, and what a pattern finds in it."""

import re
from functools import cache
from typing import Annotated, Literal

import msgspec
from typing_extensions import override

from datastore.errors import ConfigError
from datastore.ingestion.quality.filter import Count, Filter, Share
from datastore.ingestion.quality.text import Dropped, Text, Verdict

__all__ = ["Length", "Lines", "Pattern", "Symbols"]

_LARGEST = 2**31


class Length(Filter, frozen=True, kw_only=True, tag="length"):
    """Drops what is too short or too long."""

    min_characters: Count = 0
    max_characters: Count = _LARGEST
    min_words: Count = 0
    """Words here are what stands between white space."""

    max_words: Count = _LARGEST

    @override
    def apply(self, text: Text) -> Verdict:
        size = len(text.text)
        if not self.min_characters <= size <= self.max_characters:
            return Dropped("too_few_characters" if size < self.min_characters else "too_many_characters")
        if self.min_words == 0 and self.max_words == _LARGEST:
            return text
        words = len(text.words("spaces").words)
        if not self.min_words <= words <= self.max_words:
            return Dropped("too_few_words" if words < self.min_words else "too_many_words")
        return text


class Lines(Filter, frozen=True, kw_only=True, tag="lines"):
    """Drops what has lines that nobody wrote, such as data and minified code.

    Source: the numbers are those of Codex, https://arxiv.org/abs/2107.03374, section 3.1.
    """

    min_lines: Count = 0
    max_line: Count = 1000
    """Characters of the longest line."""

    max_mean_line: Share = 100
    """Characters of a line, in the mean."""

    @override
    def apply(self, text: Text) -> Verdict:
        lengths = list(map(len, text.text.splitlines()))
        if len(lengths) < self.min_lines:
            return Dropped("too_few_lines")
        if max(lengths, default=0) > self.max_line:
            return Dropped("long_line")
        return Dropped("long_lines") if sum(lengths) > self.max_mean_line * len(lengths) else text


class Symbols(Filter, frozen=True, kw_only=True, tag="symbols"):
    """Drops what has few letters and digits, or many digits.

    Source: the share of letters and digits is that of Codex, as above.
    """

    min_alphanumeric: Share = 0.25
    """Share of the characters that are letters or digits."""

    max_digits: Share = 1.0
    """Share of the characters that are digits."""

    @override
    def apply(self, text: Text) -> Verdict:
        size = len(text.text)
        others = len(_NEITHER.sub("", text.text))
        if others < self.min_alphanumeric * size:
            return Dropped("few_letters_and_digits")
        digits = size - len(_DIGITS.sub("", text.text)) if self.max_digits < 1 else 0
        return Dropped("many_digits") if digits > self.max_digits * size else text


_NEITHER = re.compile(r"[\W_]+")
_DIGITS = re.compile(r"\d+")


class Pattern(Filter, frozen=True, kw_only=True, tag="regex"):
    """Drops what a regular expression finds something in, or what it does not."""

    pattern: Annotated[str, msgspec.Meta(min_length=1)]
    """A regular expression of Python; `(?i)` at its beginning takes no notice of case, `(?m)` lets `^` match at each line."""

    drop: Literal["matching", "others"] = "matching"
    min_matches: Annotated[int, msgspec.Meta(ge=1)] = 1
    """So many times it must be found."""

    @override
    def apply(self, text: Text) -> Verdict:
        found = 0
        for found, _ in enumerate(_compiled(self.pattern).finditer(text.text), start=1):
            if found == self.min_matches:
                break
        matching = found >= self.min_matches
        return Dropped(self.drop) if matching == (self.drop == "matching") else text

    @override
    def identity(self) -> str:
        _compiled(self.pattern)
        return ""


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"not a regular expression: {error.msg}", pattern=pattern, position=error.pos, hint="Correct it."
        ) from None
