"""A text as filters look at it: its words and its lines, each found once however many filters ask.

Filters of this field count words as a tokenizer of natural language gives them, signs included. Ours is one regular
expression after spaCy's English rules: a run of letters and digits is a word, with the signs inside it but for those that
join two words (`well-known`, `and/or`); any other sign is a word of its own. `tests/parity` holds what filters decide by it
against datatrove, which asks spaCy. With `spaces`, words are what stands between white space, as in the papers.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["PUNCTUATION", "TERMINAL", "Dropped", "Ids", "Text", "Verdict", "WordKind", "Words"]

WordKind = Literal["signs", "spaces"]

Ids = npt.NDArray[np.int64]

_FIND = re.compile(
    r"\w+(?:(?!(?<=[^\W\d])(?:[-–—,~]|--)(?=[^\W\d])|(?<=\w)[:<>=/](?=[^\W\d]))[^\w\s]+\w+)*|[-/\\|@^~+.]+|[^\w\s]"  # noqa: RUF001 - signs of texts
).findall

TERMINAL = frozenset(
    ".?!‼‽⁇⁈⁉⸮⸼⹓⹔。．！？｡﹒﹖﹗։؝؞؟۔܀܁܂߹࠷࠹࠽࠾।॥၊။።፧፨᙮᜵᜶។៕៖៙៚᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᭽᭾᰻᰼᱾᱿꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫"  # noqa: RUF001
    "𐩖𐩗𐽕𐽖𐽗𐽘𐽙𐾆𐾇𐾈𐾉𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼𑊩𑑋𑑌𑗂𑗃𑗉𑗊𑗋𑗌𑗍𑗎𑗏𑗐𑗑𑗒𑗓𑗔𑗕𑗖𑗗𑙁𑙂𑜼𑜽𑜾𑥄𑥆𑩂𑩃𑪛𑪜𑱁𑱂𑻷𑻸𑽃𑽄𖩮𖩯𖫵𖬷𖬸𖭄𖺘𛲟𝪈"
)
"""Signs that end a sentence in some script. Source: `TERMINAL_PUNCTUATION` of datatrove 0.10.1."""

_CONTROLS = "".join(map(chr, (*range(9), *range(11, 32), *range(127, 160))))
_SIGNS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"  # noqa: RUF001
PUNCTUATION = frozenset(_SIGNS + _CONTROLS) | TERMINAL
"""Words of nothing else are symbols. Source: `PUNCTUATION_SET` of datatrove 0.10.1."""


class Dropped(NamedTuple):
    """A document is to be left out."""

    reason: str


class Words:
    """The words of a text."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    @cached_property
    def ids(self) -> Ids:
        """A number for each word; equal words have the same."""
        numbers = {word: number for number, word in enumerate(dict.fromkeys(self.words), start=1)}
        return np.fromiter(map(numbers.__getitem__, self.words), dtype=np.int64, count=len(self.words))

    @cached_property
    def ends(self) -> Ids:
        """The characters of all words before each, and at last of all."""
        ends = np.zeros(len(self.words) + 1, dtype=np.int64)
        np.cumsum(np.fromiter(map(len, self.words), dtype=np.int64, count=len(self.words)), out=ends[1:])
        return ends


class Text:
    """One text, who it is of, and what was changed in it."""

    def __init__(
        self, text: str, *, about: Mapping[str, Any] | None = None, changes: Mapping[str, int] | None = None
    ) -> None:
        self.text = text
        self.about = about or {}
        """`id`, `source` and `offset`, for functions of the user."""

        self.changes = changes or {}
        """What the filter that made it has changed, counted."""

        self._words: dict[WordKind, Words] = {}

    def changed(self, text: str, changes: Mapping[str, int]) -> "Text":
        """Return the document with another text."""
        return Text(text, about=self.about, changes=changes)

    def words(self, kind: WordKind) -> Words:
        """Return its words."""
        found = self._words.get(kind)
        if found is None:
            words = _FIND(self.text) if kind == "signs" else self.text.split()
            found = self._words[kind] = Words(words)
        return found


Verdict = Text | Dropped
"""The text to go on with, which may be the same, or why there is none."""
