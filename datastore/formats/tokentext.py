"""The text of tokens, to the byte where the tokenizer allows it.

A byte-level tokenizer writes each byte of the text as one character of a token, so tokens have lengths in bytes, and a
stretch of tokens is a stretch of its document. Other tokenizers can only be asked to decode.

Source: A. Radford et al., GPT-2, `bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py
"""

import json
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["TokenText"]


def _byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level token stands for."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


class TokenText:
    """Decodes with the tokenizer in `raw` (a tokenizer.json); the id `end_of_text` has no text."""

    def __init__(self, raw: bytes, *, end_of_text: int) -> None:
        self._raw = raw
        self._end_of_text = end_of_text
        self._json: dict[str, Any] = json.loads(raw)
        self.exact = _is_byte_level(self._json)
        """Whether every token has a length in bytes."""

    def decode(self, tokens: npt.NDArray[np.integer]) -> str:
        """Return the text of `tokens`; bytes that are only part of a character become U+FFFD."""
        if self.exact:
            pieces = self._pieces
            return b"".join(pieces[token] for token in tokens.tolist()).decode("utf-8", "replace")
        kept = [token for token in tokens.tolist() if token != self._end_of_text]
        return str(self._tokenizer.decode(kept, skip_special_tokens=False))

    def ends_only(self, tokens: npt.NDArray[np.integer]) -> bool:
        """Return whether the end of text is nowhere but at the end of `tokens`."""
        return not (tokens[:-1] == self._end_of_text).any()

    def bytes_in(self, tokens: npt.NDArray[np.integer]) -> int:
        """Return how many bytes of UTF-8 text `tokens` are; only if `exact`."""
        return int(self._lengths[tokens].sum())

    @cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes of each id."""
        model, added = self._json["model"]["vocab"], self._json.get("added_tokens", [])
        size = 1 + max([*model.values(), *(token["id"] for token in added), self._end_of_text])
        byte_of = _byte_of_character()
        pieces = [b""] * size
        for text, token in model.items():
            pieces[token] = bytes(byte_of[character] for character in text if character in byte_of)
        for token in added:
            pieces[token["id"]] = str(token["content"]).encode()
        pieces[self._end_of_text] = b""
        return pieces

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        return np.array([len(piece) for piece in self._pieces], np.int64)

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer  # noqa: PLC0415 - only needed for tokenizers that are not byte-level

        return Tokenizer.from_str(self._raw.decode())


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the bytes of a text's tokens, end to end, are the bytes of the text."""
    parts = ("pre_tokenizer", "model", "decoder")
    if not isinstance(tokenizer, dict) or any(not isinstance(tokenizer.get(part) or {}, dict) for part in parts):
        return False
    before = tokenizer.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    return (
        (tokenizer.get("model") or {}).get("type") == "BPE"
        and (tokenizer.get("decoder") or {}).get("type") == "ByteLevel"
        and not tokenizer.get("normalizer")
        and len(levels) == 1
        and not levels[0].get("add_prefix_space", True)
    )
