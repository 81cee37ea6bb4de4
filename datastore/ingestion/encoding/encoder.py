"""From texts to one flat array of token ids, each document ended by the end-of-text id.

The ids are those that `tokenizers` gives; a faster encoder may stand in where it is known to give the same (`fast.py`).
A special token spelled out in a text is data, not an instruction: by default it becomes ordinary tokens, or any web
page could end a document, or open a system prompt, in the middle of the training data.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.formats.tokens import Tokens, narrow_tokens, token_dtype
from datastore.ingestion.encoding.fast import open_fast
from datastore.ingestion.encoding.reference import (
    Encoder,
    Ids,
    ReferenceEncoder,
    facts_of,
    load_tokenizer,
    special_tokens,
)
from datastore.ingestion.reading.documents import Reason
from datastore.ingestion.settings import IngestSettings

__all__ = ["Counts", "Encoded", "TextEncoder"]

Counts = npt.NDArray[np.int64]


_FEW = 8
"""So many special tokens are compared one by one."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Documents as tokens."""

    values: Tokens
    """The ids of all documents end to end, each with its end-of-text id."""

    counts: Counts
    """Tokens of each document that was encoded."""

    faults: dict[int, Reason]
    """Index of each text that was not, and why; it has no entry in `counts`."""


class TextEncoder:
    """A tokenizer ready for use, by one thread at a time.

    `parallel` lets it use all cores where the encoder can; it is for a process that has the machine to itself.

    Raises:
        ConfigError: not a `tokenizer.json`, or it has no such end-of-text token.
        DependencyError: an encoder is asked for that is not installed.
    """

    def __init__(self, raw: bytes, settings: IngestSettings, *, parallel: bool = False) -> None:
        tokenizer = load_tokenizer(raw)
        facts = facts_of(raw, tokenizer, end_of_text=settings.end_of_text)
        self.end_of_text = facts.end_of_text
        self.vocab_size = facts.vocab_size
        self.dtype = token_dtype(self.vocab_size)
        never = {*special_tokens(tokenizer), self.end_of_text} if settings.special_tokens != "allow" else set[int]()
        self._special = np.array(sorted(never), dtype=np.uint32)
        tokenizer.encode_special_tokens = settings.special_tokens == "escape"
        self._encoder: Encoder = ReferenceEncoder(tokenizer, parallel=parallel)
        if settings.special_tokens != "allow" and settings.encoder != "tokenizers":
            fast = open_fast(
                raw,
                self._encoder,
                escape=settings.special_tokens == "escape",
                required="" if settings.encoder == "auto" else settings.encoder,
            )
            self._encoder = fast or self._encoder

    @property
    def name(self) -> str:
        """Who encodes: `tokenizers`, `gigatoken` or `fastokens`."""
        return self._encoder.name

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the tokens of `texts`; a text whose tokens cannot be used has a fault instead.

        Escaped or not, no special id may come out of a text (unless allowed): a tokenizer that looks whole words up
        in its vocabulary can still give one.
        """
        found = self._encoder.encode(texts)
        values, counts = self._end_to_end(found)
        faults = self._faults(values, counts)
        if faults:
            values, counts = self._end_to_end([ids for i, ids in enumerate(found) if i not in faults])
        return Encoded(narrow_tokens(values, self.dtype), counts, faults)

    def _end_to_end(self, found: Sequence[Ids]) -> tuple[Ids, Counts]:
        end = np.array([self.end_of_text], dtype=np.uint32)
        parts = [end] * (2 * len(found))
        parts[::2] = found
        counts = np.fromiter(map(len, found), dtype=np.int64, count=len(found)) + 1
        return (np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)), counts

    def _faults(self, values: Ids, counts: Counts) -> dict[int, Reason]:
        ends = np.cumsum(counts)
        found: dict[int, Reason] = dict.fromkeys(np.flatnonzero(counts == 1).tolist(), "no_tokens")
        special = self._is_special(values)
        special[ends - 1] = False
        if special.any():
            found.update(dict.fromkeys(_holders(ends, special), "special_token"))
        if int(values.max(initial=0)) >= self.vocab_size:
            found.update(dict.fromkeys(_holders(ends, values >= self.vocab_size), "token_out_of_range"))
        return found

    def _is_special(self, values: Ids) -> npt.NDArray[np.bool_]:
        """Return which of `values` are of no text. One comparison each takes a tenth of a lookup."""
        if self._special.size > _FEW:
            return np.isin(values, self._special, kind="table")
        found = np.zeros(values.shape, np.bool_)
        for each in self._special:
            found |= values == each
        return found


def _holders(ends: Counts, marked: npt.NDArray[np.bool_]) -> list[int]:
    """Return the indices of the documents that hold a marked token; document `i` ends before token `ends[i]`."""
    found = np.unique(np.searchsorted(ends, np.flatnonzero(marked), side="right"))
    return [int(i) for i in found]
