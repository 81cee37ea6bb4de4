"""The same ids in a fraction of the time: a faster encoder, where one is installed and can be trusted to agree.

`gigatoken` first, and `fastokens` for tokenizers whose pattern gigatoken does not know. Shard bytes must not depend on who
encodes, so one is used only where it is known to give what `tokenizers` gives:

- byte-level BPE as `tokenizer.json` spells it out: merges of bytes without prefix, suffix or dropout, split by a pattern that
  the encoder knows; added tokens that are found wherever they stand (gigatoken 0.10.0 finds those of `single_word` inside of
  words);
- no normalizer, or, for ASCII texts, a Unicode one, which leaves those alone;
- texts whose characters had their place in Unicode long ago. Each library has its own tables: gigatoken 0.10.0 and
  tokenizers 0.23.3 differ on 4,699 code points, all of them assigned after Unicode 16. Other texts go to fastokens, in those versions
  that agree with `tokenizers` on every code point, and are half of what encoding costs otherwise, or to `tokenizers`.

All else goes to `tokenizers`. What is trusted is still compared: at the start on awkward texts and on random rows of the
tokenizer's own tokens, where a difference means the next encoder; then on a sample of every batch, where it ends the
ingest, for what was written before is in doubt. Measured on the Python standard library, in MB per CPU-second: gigatoken 143
(37 MB), fastokens 50 (1.5 MB, a pattern of its own), tokenizers 2.4.

Source: https://github.com/marcelroed/gigatoken (and its issue 37 on Unicode versions), https://github.com/crusoecloud/fastokens
"""

import logging
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from random import Random
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import orjson
from tokenizers.pre_tokenizers import ByteLevel
from typing_extensions import override

from datastore.errors import ConfigError, DatastoreError, DependencyError
from datastore.ingestion.encoding.reference import Encoder, Ids

__all__ = ["FastEncoder", "open_fast", "settled"]

_LOGGER = logging.getLogger(__name__)

_UNICODE_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}

_SAMPLE_CHARACTERS = 2048

_ROWS = 200
"""Random rows of tokens that are compared at the start."""

_FULL_RANGES = (
    (0x00A0, 0x0300),  # Latin; the signs for section and paragraph changed from symbols to punctuation in 2012
    (0x2600, 0x27C0),  # signs and dingbats
    (0x1D400, 0x1D800),  # mathematical letters
    (0x1F1E6, 0x1F200),  # flags
    (0x1F300, 0x1F650),  # emoji
    (0x1F680, 0x1F6C6),
    (0x1F900, 0x1FA00),
    (0x20000, 0x2A6D7),  # CJK Extension B
)

_AWKWARD = (
    "The quick brown fox's 3,141 dogs can't jump; we'll see!",
    "def f(x):\n\tif x:\r\n        return x  \n\n\n    # done   ",
    "    \n   \t  \n",
    "0123456789 12 345 6.78e-9 0xFFaa",
    "naïve Ärger, ça ira; ΑΒγδ, Привет, שלום, مرحبا",
    "日本語のテキスト、한국어 텍스트, 中文文本。",
    "🙂🎉 a🙂b",
    "=" * 70 + "a" * 300 + " " * 100,
    "I'M WE'LL 'tis 's 't 're",
    "\x00\x01\x7f\u00a0\u2028\ufeff",
)


def open_fast(raw: bytes, reference: Encoder, *, escape: bool, required: str = "") -> "FastEncoder | None":
    """Return a fast encoder for the `tokenizer.json` in `raw`, or None if none is installed or can be trusted.

    With `escape`, special tokens spelled out in a text are ordinary text. Only the one that is `required` is tried, if any.

    Raises:
        DependencyError: it is not installed.
        ConfigError: it does not know this kind of tokenizer, or gives other ids.
    """
    config = orjson.loads(raw)
    for name in (required,) if required else tuple(_OPENERS):
        fast = _open(name, config, reference, escape=escape)
        if isinstance(fast, FastEncoder):
            return fast
        if required:
            raise fast
        if fast.values:
            _LOGGER.warning("%s, so it is not used: %s", fast.fact, fast.values)
    return None


def _open(name: str, config: dict[str, Any], reference: Encoder, *, escape: bool) -> "FastEncoder | DatastoreError":
    """Return the encoder called `name`, or why it cannot be used; an error with values is of one that gives other ids."""
    backend = _load(name, _without_special(config) if escape else config)
    if isinstance(backend, DatastoreError):
        return backend
    fast = FastEncoder(name, backend, reference, trusts=_trust(name, config))
    difference = fast.difference(_probes(config))
    if difference is None:
        if name == "gigatoken" and _trust("fastokens", config) is _all:
            fast.others = _Others(lambda: _open("fastokens", config, reference, escape=escape), reference)
        return fast
    hint = "Give `encoder=auto` or `encoder=tokenizers`."
    return ConfigError(f"{name} gives other ids than tokenizers", hint=hint, **difference)


_AGREED = {("0.3.5", "0.23.3")}
"""Versions of fastokens and tokenizers that give the same for every code point there is; held by a test."""


def _trust(name: str, config: dict[str, Any]) -> Callable[[str], bool]:
    """Return which texts the encoder called `name` gives the same for."""
    if config.get("normalizer") is not None:
        return str.isascii
    return _all if name == "fastokens" and _versions() in _AGREED else settled


def _all(_text: str) -> bool:
    return True


def _versions() -> tuple[str, ...]:
    try:
        return version("fastokens"), version("tokenizers")
    except PackageNotFoundError:
        return ()


Encode: TypeAlias = Callable[[str], Ids]


def _load(name: str, config: dict[str, Any]) -> Encode | DatastoreError:
    """Return what encodes by `config`, or the reason why the encoder called `name` cannot."""
    if find_spec(name) is None:
        return DependencyError(f"{name} is not installed", hint="pip install 'llm-datastore[fast]'.")
    reason = "not byte-level BPE with at most a Unicode normalizer"
    if _is_plain_bpe(config, split=name == "gigatoken"):
        try:
            return _OPENERS[name](orjson.dumps(config).decode())
        except (RuntimeError, ValueError) as error:  # The classes that they raise for a tokenizer they do not know.
            reason = str(error).splitlines()[0]
    return ConfigError(f"{name} cannot stand in for this tokenizer: {reason}", hint="Give `encoder=auto`.")


def _open_gigatoken(config: str) -> Encode:
    # Not the package's own facade: that imports awkward arrays, which take half a second.
    encode: Encode = import_module("gigatoken.gigatoken_rs").load_hf_json(config).encode
    return encode


def _open_fastokens(config: str) -> Encode:
    missing = set(ByteLevel.alphabet()) - orjson.loads(config)["model"]["vocab"].keys()
    if missing:  # It raises at such a byte, which `tokenizers` leaves out.
        raise ValueError(f"{len(missing)} of 256 bytes have no token")
    encode = import_module("fastokens").Tokenizer.from_json_str(config).encode
    return lambda text: np.array(encode(text).ids, dtype=np.uint32)


_OPENERS: dict[str, Callable[[str], Encode]] = {"gigatoken": _open_gigatoken, "fastokens": _open_fastokens}
"""The fastest first."""


class FastEncoder(Encoder):
    """`encode` for the texts that it `trusts`, `others` for all others; a sample is held against `reference`."""

    def __init__(self, name: str, encode: Encode, reference: Encoder, *, trusts: Callable[[str], bool]) -> None:
        self.name = name
        self.others: Encoder = reference
        self._encode = encode
        self._reference = reference
        self._trusts = trusts
        self._batches = 0

    @override
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        trusted = [self._trusts(text) for text in texts]
        others = iter(self.others.encode([text for text, fast in zip(texts, trusted, strict=True) if not fast]))
        found = [self._encode(text) if fast else next(others) for text, fast in zip(texts, trusted, strict=True)]
        if texts:
            self._batches += 1
            # Knuth's multiplicative hash: a different place each time, the same one in each run.
            text = texts[self._batches * 2_654_435_761 % len(texts)]
            start = self._batches * 40_503 % max(1, len(text) - _SAMPLE_CHARACTERS)
            difference = self.difference([text[start : start + _SAMPLE_CHARACTERS]])
            if difference is not None:
                raise DatastoreError(
                    f"{self.name} and tokenizers disagree, so what {self.name} encoded cannot be trusted",
                    hint="Give `encoder=tokenizers`, and ingest into a new dataset; please report the text.",
                    **difference,
                )
        return found

    def difference(self, texts: Sequence[str]) -> dict[str, Any] | None:
        """Return the first of `texts` on which the two encoders differ, and what they say; None if there is none."""
        trusted = [text for text in texts if self._trusts(text)]
        for text, slow in zip(trusted, self._reference.encode(trusted), strict=True):
            fast = self._encode(text)
            if not np.array_equal(fast, slow):
                return {"text": text[:200], self.name: fast[:20].tolist(), "tokenizers": slow[:20].tolist()}
        return None


class _Others(Encoder):
    """An encoder that is opened when it has something to do, which with most texts is never; `reference` if it cannot be used."""

    def __init__(self, open_it: Callable[[], "FastEncoder | DatastoreError"], reference: Encoder) -> None:
        self.name = "fastokens"
        self._open_it = open_it
        self._reference = reference

    @cached_property
    def _opened(self) -> Encoder:
        found = self._open_it()
        return found if isinstance(found, FastEncoder) else self._reference

    @override
    def encode(self, texts: Sequence[str]) -> list[Ids]:
        return self._opened.encode(texts) if texts else []


def settled(text: str) -> bool:
    """Return whether every character of `text` means the same in all Unicode tables in use. 2 ns per character."""
    if text.isascii():
        return True
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return bool(_settled_codes()[codes].all())


@cache
def _settled_codes() -> npt.NDArray[np.bool_]:
    """Return for each code point whether all Unicode tables in use have it in the same place.

    So it is if Unicode 3.2 (2002) and this Python's Unicode agree on its category; and in ranges that have been full,
    and at peace, for a decade.
    """
    found = np.zeros(0x110000, dtype=bool)
    old = unicodedata.ucd_3_2_0
    for code in range(0x10000):
        category = unicodedata.category(chr(code))
        found[code] = category not in {"Cn", "Co", "Cs"} and old.category(chr(code)) == category
    for start, stop in _FULL_RANGES:
        found[start:stop] = [unicodedata.category(chr(code)) != "Cn" for code in range(start, stop)]
    return found


def _is_plain_bpe(config: dict[str, Any], *, split: bool) -> bool:
    """Return whether this is byte-level BPE; with `split`, of text that is split as GPT-2 does, or by one pattern."""
    model, normalizer = config["model"], config.get("normalizer")
    odd = ("dropout", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    return (
        model.get("type", "BPE") == "BPE"
        and not any(model.get(key) for key in odd)
        and (normalizer is None or normalizer["type"] in _UNICODE_NORMALIZERS)
        and (_splits_bytes if split else _ends_in_bytes)(config.get("pre_tokenizer"))
        and not any(token.get(key) for token in config.get("added_tokens", ()) for key in _CONDITIONS)
    )


_CONDITIONS = ("single_word", "lstrip", "rstrip")
"""What makes a place where an added token is spelled out one where it is not meant, or not alone."""


def _splits_bytes(steps: dict[str, Any] | None) -> bool:
    """Return whether text is split as GPT-2 does, or by one pattern, and then taken as bytes; no space is added."""
    if steps is None:
        return False
    if steps["type"] == "Sequence":
        split, *rest = steps["pretokenizers"]
        known = split["type"] == "Split" and split.get("behavior") == "Isolated" and not split.get("invert")
        return known and len(rest) == 1 and _is_byte_level(rest[0], use_regex=False)
    return _is_byte_level(steps, use_regex=True)


def _ends_in_bytes(steps: dict[str, Any] | None) -> bool:
    """Return whether text is split by patterns and between digits, in any order, and then taken as bytes."""
    if steps is None:
        return False
    *cuts, last = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    return last["type"] == "ByteLevel" and all(step["type"] in {"Split", "Digits"} for step in cuts)


def _is_byte_level(step: dict[str, Any], *, use_regex: bool) -> bool:
    return (
        step["type"] == "ByteLevel"
        and not step.get("add_prefix_space", True)
        and bool(step.get("use_regex", True)) is use_regex
    )


def _without_special(config: dict[str, Any]) -> dict[str, Any]:
    """Return `config` with no special token to look for; their ids stay taken."""
    return config | {"added_tokens": [token for token in config.get("added_tokens", ()) if not token["special"]]}


def _probes(config: dict[str, Any]) -> tuple[str, ...]:
    """Return awkward texts, and rows of random tokens of this tokenizer, the added ones among them; 10 ms to compare."""
    added = [token["content"] for token in config.get("added_tokens", ())]
    words = [str(word).replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t") for word in config["model"]["vocab"]]
    draw = Random(0)  # noqa: S311 - the same probes each time
    rows = ["".join(draw.choices(words, k=12) + draw.choices(added or words, k=2)) for _ in range(_ROWS)]
    return (*_AWKWARD, *(f"a{content}b {content} " for content in added), *rows)
