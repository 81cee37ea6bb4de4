"""Encoding: the ids are those of `tokenizers`, special tokens in a text are only text, and nothing is cut off."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from datastore.errors import ConfigError, DatastoreError
from datastore.ingestion.encoding.encoder import TextEncoder
from datastore.ingestion.encoding.fast import FastEncoder, open_fast, settled
from datastore.ingestion.encoding.reference import Encoder, Ids, ReferenceEncoder, load_tokenizer
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.settings import IngestSettings
from datastore.storage.backends.memory import MemoryStorage

END = "<|endoftext|>"
TEXT = "the cat sat on the mat; naïve café über, 日本語 text 🙂 123 456\n\tdef f(x): return x\n" * 20

with_gigatoken = pytest.mark.skipif(importlib.util.find_spec("gigatoken") is None, reason="gigatoken is not installed")
with_fastokens = pytest.mark.skipif(importlib.util.find_spec("fastokens") is None, reason="fastokens is not installed")
FAST = [pytest.param("gigatoken", marks=with_gigatoken), pytest.param("fastokens", marks=with_fastokens)]
encoders = pytest.mark.parametrize("encoder", ["tokenizers", *FAST])


@pytest.fixture(scope="module")
def raw() -> bytes:
    MemoryStorage("tokens-corpus").put("a.txt", TEXT.encode())
    return train_tokenizer(
        ["memory://tokens-corpus"], settings=TokenizerSettings(vocab_size=400, special_tokens=("<|user|>", "<|pad|>"))
    )


def changed(raw: bytes, **fields: Any) -> bytes:
    return json.dumps(json.loads(raw) | fields).encode()


@encoders
def test_each_document_ends_with_the_end_of_text(raw: bytes, encoder: str) -> None:
    found = TextEncoder(raw, IngestSettings(encoder=encoder)).encode(["the cat", "sat on"])  # type: ignore[arg-type]
    plain = Tokenizer.from_buffer(raw)
    ids = [plain.encode(text).ids for text in ("the cat", "sat on")]
    assert found.values.tolist() == [*ids[0], 0, *ids[1], 0]
    assert found.counts.tolist() == [len(ids[0]) + 1, len(ids[1]) + 1]
    assert found.values.dtype == np.uint16
    assert found.faults == {}


@encoders
def test_a_special_token_in_a_text_is_escaped_by_default(raw: bytes, encoder: str) -> None:
    text = f"the {END} cat <|user|>"
    found = TextEncoder(raw, IngestSettings(encoder=encoder)).encode([text])  # type: ignore[arg-type]
    assert found.values.tolist().count(0) == 1
    assert not np.isin(found.values[:-1], [0, 1, 2]).any()
    assert Tokenizer.from_buffer(raw).decode(found.values[:-1].tolist(), skip_special_tokens=False) == text


@encoders
def test_a_special_token_in_a_text_can_be_a_reason_to_reject(raw: bytes, encoder: str) -> None:
    settings = IngestSettings(encoder=encoder, special_tokens="reject")  # type: ignore[arg-type]
    found = TextEncoder(raw, settings).encode(["the cat", f"a{END}b", "sat", "<|user|>"])
    assert found.faults == {1: "special_token", 3: "special_token"}
    assert found.counts.size == 2
    assert found.values.tolist() == TextEncoder(raw, settings).encode(["the cat", "sat"]).values.tolist()


def test_special_tokens_are_taken_for_real_only_if_allowed(raw: bytes) -> None:
    found = TextEncoder(raw, IngestSettings(special_tokens="allow")).encode([f"a{END}<|user|>"])
    assert found.values.tolist()[1:] == [0, 1, 0]


def test_a_tokenizer_that_would_shorten_or_pad_documents_does_not(raw: bytes) -> None:
    cutting = changed(
        raw,
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "<|pad|>",
        },
    )
    expected = TextEncoder(raw, IngestSettings()).encode([TEXT]).values
    assert np.array_equal(TextEncoder(cutting, IngestSettings()).encode([TEXT]).values, expected)


def test_what_a_post_processor_adds_is_left_out(raw: bytes) -> None:
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|user|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|user|>": {"id": "<|user|>", "ids": [1], "tokens": ["<|user|>"]}},
    }
    found = TextEncoder(changed(raw, post_processor=template), IngestSettings()).encode(["the cat"])
    assert 1 not in found.values


def test_a_vocabulary_beyond_65536_takes_four_bytes(raw: bytes) -> None:
    config = json.loads(raw)
    added = [*config["added_tokens"], config["added_tokens"][0] | {"id": 70_000, "content": "<|far|>"}]
    model = config["model"] | {"vocab": config["model"]["vocab"] | {"<|far|>": 70_000}}
    encoder = TextEncoder(changed(raw, added_tokens=added, model=model), IngestSettings(encoder="tokenizers"))
    assert encoder.vocab_size == 70_001
    assert encoder.encode(["the cat"]).values.dtype == np.uint32


def test_an_id_past_the_vocabulary_and_a_text_without_tokens_are_faults(raw: bytes) -> None:
    class Wrong(Encoder):
        name = "wrong"

        def encode(self, texts: Sequence[str]) -> list[Ids]:
            return [np.array([10] * (text != "none") + [10**6] * (text == "far"), dtype=np.uint32) for text in texts]

    encoder = TextEncoder(raw, IngestSettings())
    encoder._encoder = Wrong()
    found = encoder.encode(["a", "far", "none", "b"])
    assert found.faults == {1: "token_out_of_range", 2: "no_tokens"}
    assert found.values.tolist() == [10, 0, 10, 0]


def test_nothing_gives_nothing(raw: bytes) -> None:
    found = TextEncoder(raw, IngestSettings()).encode([])
    assert found.values.size == found.counts.size == 0


def test_another_end_of_text_must_be_in_the_vocabulary(raw: bytes) -> None:
    assert TextEncoder(raw, IngestSettings(end_of_text="<|pad|>")).end_of_text == 2
    with pytest.raises(ConfigError, match=r"no such end-of-text.*<\|user\|>"):
        TextEncoder(raw, IngestSettings(end_of_text="</s>"))


@pytest.mark.parametrize("wrong", [b"", b"{}", b"hello", b'{"model": {}}', b"\xff"])
def test_what_is_no_tokenizer_is_refused(wrong: bytes) -> None:
    with pytest.raises(ConfigError, match=r"not a tokenizer\.json"):
        TextEncoder(wrong, IngestSettings())


@pytest.mark.parametrize("encoder", FAST)
def test_a_fast_encoder_gives_the_same_and_leaves_new_characters_to_tokenizers(raw: bytes, encoder: Any) -> None:
    texts = [
        TEXT,
        f"x{END}y",
        "a\U0001fae8b 1\u0cf3 \U0001f6dc",
        "\U00011b00s",
        "é\u0301",
        "日本",
        " " * 500,
        "=" * 3000,
    ]
    fast = TextEncoder(raw, IngestSettings(encoder=encoder))
    slow = TextEncoder(raw, IngestSettings(encoder="tokenizers"))
    assert (fast.name, slow.name) == (encoder, "tokenizers")
    assert np.array_equal(fast.encode(texts).values, slow.encode(texts).values)


@pytest.mark.parametrize("encoder", FAST)
@pytest.mark.parametrize(
    "fields",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"model": {"type": "WordLevel", "vocab": {END: 0, "a": 1}, "unk_token": "a"}},
    ],
)
def test_one_stands_in_only_where_it_is_known_to_agree(raw: bytes, encoder: Any, fields: dict[str, Any]) -> None:
    config = changed(raw, **fields)
    assert TextEncoder(config, IngestSettings()).name == "tokenizers"
    with pytest.raises(ConfigError, match=f"{encoder} cannot stand in"):
        TextEncoder(config, IngestSettings(encoder=encoder))


OWN_PATTERN = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\s?\p{L}+|[\r\n]+"}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ],
}


@with_gigatoken
@with_fastokens
def test_a_pattern_that_one_does_not_know_goes_to_the_next(raw: bytes) -> None:
    config = changed(raw, pre_tokenizer=OWN_PATTERN)
    fast, slow = TextEncoder(config, IngestSettings()), TextEncoder(config, IngestSettings(encoder="tokenizers"))
    assert (TextEncoder(raw, IngestSettings()).name, fast.name) == ("gigatoken", "fastokens")
    texts = [TEXT, "über 1234\r\n\n\tabc", f"x{END}y", "日本語 42", " " * 500, "\u00a0a\u2028b"]
    assert np.array_equal(fast.encode(texts).values, slow.encode(texts).values)


@with_gigatoken
@with_fastokens
def test_what_gigatoken_is_not_trusted_with_goes_to_fastokens_in_a_version_that_agrees(
    raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["plain", "new \U0001fae8 \u088f", "none \U000e0fff"]
    slow = ReferenceEncoder(escaping(raw), parallel=False)
    fast = open_fast(raw, slow, escape=True)
    assert fast is not None
    assert (fast.name, fast.others.name) == ("gigatoken", "fastokens")
    assert [ids.tolist() for ids in fast.encode(texts)] == [ids.tolist() for ids in slow.encode(texts)]
    monkeypatch.setattr("datastore.ingestion.encoding.fast._AGREED", set())
    careful = open_fast(raw, slow, escape=True)
    assert careful is not None
    assert careful.others is slow


@with_fastokens
def test_a_vocabulary_that_lacks_bytes_is_left_to_the_reference(raw: bytes) -> None:
    """As one trained without all 256 of them: fastokens raises at such a byte, which `tokenizers` leaves out."""
    table = json.loads(changed(raw, pre_tokenizer=OWN_PATTERN))
    for pair in [[first, second] for first, second in table["model"]["merges"] if "ĉ" in first + second]:
        table["model"]["merges"].remove(pair)
    for token in [token for token in table["model"]["vocab"] if "ĉ" in token]:
        del table["model"]["vocab"][token]
    config = json.dumps(table).encode()
    found = TextEncoder(config, IngestSettings())
    assert found.name != "fastokens"
    slow = TextEncoder(config, IngestSettings(encoder="tokenizers")).encode(["a\tcat"])
    assert found.encode(["a\tcat"]).values.tolist() == slow.values.tolist()


@pytest.mark.parametrize("encoder", FAST)
def test_with_a_unicode_normalizer_it_gets_ascii_only(raw: bytes, encoder: Any) -> None:
    config = changed(raw, normalizer={"type": "NFC"})
    texts = ["the cat", "e\u0301 cafe\u0301", "日本"]
    fast, slow = (TextEncoder(config, IngestSettings(encoder=name)) for name in (encoder, "tokenizers"))
    assert fast.name == encoder
    assert np.array_equal(fast.encode(texts).values, slow.encode(texts).values)


@pytest.mark.parametrize("ascii_only", [True, False])
def test_only_texts_of_settled_characters_reach_the_fast_encoder(raw: bytes, *, ascii_only: bool) -> None:
    honest = ReferenceEncoder(load_tokenizer(raw), parallel=False)
    seen: list[str] = []

    def noting(text: str) -> Ids:
        seen.append(text)
        return honest.encode([text])[0]

    fast = FastEncoder("noting", noting, honest, trusts=str.isascii if ascii_only else settled)
    seen.clear()
    texts = ["plain", "naïve 🙂", "new \U0001fae8", "none \U000e0fff", "plain again"]
    assert [ids.tolist() for ids in fast.encode(texts)] == [ids.tolist() for ids in honest.encode(texts)]
    assert set(seen) == {"plain", "plain again"} | (set() if ascii_only else {"naïve 🙂"})


def lying(honest: Encoder, about: str) -> Callable[[str], Ids]:
    """Return what agrees on everything but one word."""

    def encode(text: str) -> Ids:
        ids = honest.encode([text])[0]
        return ids[::-1] if about in text else ids

    return encode


def test_a_fast_encoder_that_disagrees_at_the_start_is_not_used(
    raw: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = ReferenceEncoder(escaping(raw), parallel=False)
    module = "datastore.ingestion.encoding.fast"
    monkeypatch.setattr(f"{module}._load", lambda *_: lying(honest, "quick brown"))
    assert open_fast(raw, honest, escape=True) is None
    assert "gigatoken gives other ids" in caplog.text
    assert "fastokens gives other ids" in caplog.text
    with pytest.raises(ConfigError, match="gigatoken gives other ids"):
        open_fast(raw, honest, escape=True, required="gigatoken")


def escaping(raw: bytes) -> Any:
    tokenizer = load_tokenizer(raw)
    tokenizer.encode_special_tokens = True
    return tokenizer


ODD: dict[str, Callable[[dict[str, Any]], None]] = {
    "an added token of single_word": lambda found: found["added_tokens"].append(added(single_word=True)),
    "an added token that takes the space before it": lambda found: found["added_tokens"].append(added(lstrip=True)),
    "a suffix at the end of words": lambda found: found["model"].update(end_of_word_suffix="</w>"),
    "a prefix within words": lambda found: found["model"].update(continuing_subword_prefix="##"),
    "dropout": lambda found: found["model"].update(dropout=0.1),
    "no pre-tokenizer": lambda found: found.update(pre_tokenizer=None),
}
FOR_GIGATOKEN = {
    **ODD,
    "a space before the text": lambda found: found["pre_tokenizer"].update(add_prefix_space=True),
    "no split": lambda found: found["pre_tokenizer"].update(use_regex=False),
}


def added(**conditions: bool) -> dict[str, Any]:
    plain = {"id": 9999, "content": "foo", "single_word": False, "lstrip": False, "rstrip": False}
    return plain | {"normalized": False, "special": False} | conditions


@pytest.mark.parametrize(
    ("encoder", "name"),
    [
        *(pytest.param("gigatoken", name, marks=with_gigatoken) for name in FOR_GIGATOKEN),
        *(pytest.param("fastokens", name, marks=with_fastokens) for name in ODD),
    ],
)
def test_what_the_tokenizer_says_decides_who_encodes_not_a_sample(raw: bytes, encoder: str, name: str) -> None:
    config = json.loads(raw)
    reference = ReferenceEncoder(escaping(raw), parallel=False)
    assert open_fast(json.dumps(config).encode(), reference, escape=True, required=encoder) is not None
    FOR_GIGATOKEN[name](config)
    found = open_fast(json.dumps(config).encode(), reference, escape=True)
    assert found is None if name in ODD else found is None or found.name != "gigatoken"
    with pytest.raises(ConfigError, match=f"{encoder} cannot stand in"):
        open_fast(json.dumps(config).encode(), reference, escape=True, required=encoder)


def test_a_fast_encoder_that_disagrees_later_is_caught_by_the_sample(raw: bytes) -> None:
    honest = ReferenceEncoder(load_tokenizer(raw), parallel=False)
    fast = FastEncoder("lying", lying(honest, "zebra"), honest, trusts=settled)
    fast.encode(["the cat"] * 50)

    def encode_much() -> None:
        for _ in range(20):
            fast.encode(["a zebra ran"] * 10 + ["the cat"] * 10)

    with pytest.raises(DatastoreError, match="lying and tokenizers disagree"):
        encode_much()


def test_where_it_is_not_installed_asking_for_it_names_the_extra(raw: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.ingestion.encoding.fast.find_spec", lambda _: None)
    reference = ReferenceEncoder(load_tokenizer(raw), parallel=False)
    assert open_fast(raw, reference, escape=True) is None
    with pytest.raises(ImportError, match=r"datastore\[fast\]"):
        open_fast(raw, reference, escape=True, required="fastokens")


def test_characters_are_settled_if_unicode_has_long_had_them() -> None:
    assert settled("plain")
    assert settled("naïve §¶ Привет 日本語 🙂 ✨ 🇫🇷 \U0001d518 \U00020000")
    for new in ("\U0001fae8", "\u0cf3", "\ue000", "\U000f0000", "\U00011b00"):
        assert not settled(f"a {new}")


def test_threads_change_nothing(raw: bytes) -> None:
    texts = [TEXT[i : i + 50] for i in range(0, 1000, 7)]
    one, many = (ReferenceEncoder(load_tokenizer(raw), parallel=parallel).encode(texts) for parallel in (False, True))
    assert all(np.array_equal(a, b) for a, b in zip(one, many, strict=True))
