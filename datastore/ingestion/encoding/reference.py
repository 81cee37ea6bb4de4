"""The reference that every other encoder must agree with: `tokenizers`, and the facts of a tokenizer."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from typing_extensions import override

from datastore.dataset.log.manifest import TokenizerRef
from datastore.digest import sha256_hex
from datastore.errors import ConfigError

__all__ = ["Encoder", "Ids", "ReferenceEncoder", "facts_of", "load_tokenizer", "special_tokens"]

Ids = npt.NDArray[np.uint32]

_PARALLEL_CHARACTERS = 2**18
"""Given to the threads of `tokenizers` at once: its result takes some hundred bytes of memory per token."""


class Encoder(Protocol):
    """Something that encodes; for one thread at a time."""

    name: str

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of each text, without any that a post-processor would add."""
        ...


def load_tokenizer(raw: bytes) -> Any:
    """Return the `tokenizers.Tokenizer` in `raw`; what would shorten or pad a document is switched off.

    Raises:
        ConfigError: `raw` is not a `tokenizer.json`.
    """
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except ValueError as error:  # The one class that the library raises for all it cannot read.
        raise ConfigError(f"not a tokenizer.json: {error}", hint="Make one with `datastore tokenizer train`.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens of `tokenizer` by id."""
    added = tokenizer.get_added_tokens_decoder()
    return {i: token.content for i, token in added.items() if token.special}


def facts_of(raw: bytes, tokenizer: Any, *, end_of_text: str) -> TokenizerRef:
    """Return what a dataset notes of a tokenizer: its sha256, the size of its vocabulary, the id that ends a document.

    Raises:
        ConfigError: it has no such end-of-text token.
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    if end_of_text not in vocabulary:
        raise ConfigError(
            "the tokenizer has no such end-of-text token",
            end_of_text=end_of_text,
            special_tokens=sorted(special_tokens(tokenizer).values())[:20],
            hint="Name one of its special tokens: `end_of_text=TOKEN`.",
        )
    return TokenizerRef(
        sha256=sha256_hex(raw), vocab_size=max(vocabulary.values()) + 1, end_of_text=vocabulary[end_of_text]
    )


class ReferenceEncoder(Encoder):
    """`tokenizers` itself. `parallel` uses its threads on all cores; otherwise one thread does the work."""

    def __init__(self, tokenizer: Any, *, parallel: bool) -> None:
        self.name = "tokenizers"
        self._tokenizer = tokenizer
        self._parallel = parallel

    @override
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        encode = self._tokenizer.encode_batch_fast
        found: list[Ids] = []
        for batch in _batches(texts, _PARALLEL_CHARACTERS if self._parallel else 0):
            # Measured on source code, 2 cores: 2.4 MB per CPU-second one text at a time, 2.2 in parallel.
            found += [np.array(each.ids, dtype=np.uint32) for each in encode(batch, add_special_tokens=False)]
        return found


def _batches(texts: Sequence[str], characters: int) -> list[list[str]]:
    """Return `texts` in runs of at least `characters`, or one by one."""
    batches: list[list[str]] = [[]]
    size = 0
    for text in texts:
        batches[-1].append(text)
        size += len(text)
        if size >= characters:
            batches.append([])
            size = 0
    return batches if batches[-1] else batches[:-1]
