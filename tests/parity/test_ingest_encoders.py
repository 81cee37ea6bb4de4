"""The fast encoders against tokenizers on every character there is, where it matters most: at the borders of words.

The vocabulary is made so that borders show: any byte of a character merges with the letters, digits, spaces and
signs around it, but only if the two lie in one word.
"""

import json
import unicodedata
from typing import Any

import pytest
from tokenizers import pre_tokenizers

from datastore.ingestion.encoding.fast import _load, _trust
from datastore.ingestion.encoding.reference import ReferenceEncoder, load_tokenizer

pytestmark = pytest.mark.slow

GPT4 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SURROUNDINGS = "s{0}s 1{0}1 .{0}. {0} {0}{0}\n{0}s's{0} S{0}S \n{0}\n/{0} s"


def byte_names() -> dict[int, str]:
    """The printable stand-in of each byte, as in GPT-2."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in plain}
    others = [byte for byte in range(256) if byte not in names]
    return names | {byte: chr(256 + number) for number, byte in enumerate(others)}


def config_of(pattern: str | None) -> dict[str, Any]:
    names = byte_names()
    pairs = [pair for near in b"s1. \n/'S" for high in range(128, 256) for pair in ((near, high), (high, near))]
    pairs += [(low, high) for low in range(128, 192) for high in range(192, 248)]
    words = ["<|endoftext|>", *names.values(), *dict.fromkeys(names[a] + names[b] for a, b in pairs)]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": by_bytes if pattern is None else {"type": "Sequence", "pretokenizers": [split, by_bytes]},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: number for number, word in enumerate(words)},
            "merges": [[names[a], names[b]] for a, b in dict.fromkeys(pairs)],
        },
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize("pattern", [None, GPT4], ids=["gpt2", "gpt4"])
@pytest.mark.parametrize("encoder", ["gigatoken", "fastokens"])
def test_on_every_trusted_character_both_find_the_same_borders(encoder: str, pattern: str | None) -> None:
    pytest.importorskip(encoder)
    raw = json.dumps(config_of(pattern)).encode()
    fast, reference = _load(encoder, json.loads(raw)), ReferenceEncoder(load_tokenizer(raw), parallel=True)
    assert callable(fast)
    trusts = _trust(encoder, json.loads(raw))  # Of fastokens, every one, where the versions are known to agree.
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    characters = [character for character in characters if trusts(character)]
    assert len(characters) > 90_000
    different = []
    for start in range(0, len(characters), 4096):
        texts = [SURROUNDINGS.format(character) for character in characters[start : start + 4096]]
        for text, ids in zip(texts, reference.encode(texts), strict=True):
            if fast(text).tolist() != ids.tolist():
                different.append(f"U+{ord(text[1]):04X} {unicodedata.category(text[1])}")
    assert different == []


def test_the_test_would_see_a_border_that_moves() -> None:
    raw = json.dumps(config_of(None)).encode()
    tokenizer = load_tokenizer(raw)
    inside = tokenizer.encode("s\u00e9s").ids
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\u00e9", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert tokenizer.encode("s\u00e9s").ids != inside
