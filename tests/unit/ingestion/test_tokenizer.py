"""Training a tokenizer: the same sources, the same bytes; everything can be encoded and decoded again."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from datastore.errors import ConfigError, MissingError
from datastore.ingestion.encoding.encoder import TextEncoder
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.settings import IngestSettings

PROGRAM = """
import hashlib, sys
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer  # noqa: E402
raw = train_tokenizer([sys.argv[1]], settings=TokenizerSettings(vocab_size=600, model=sys.argv[2]))
print(hashlib.sha256(raw).hexdigest())
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(30):
        words = (hashlib.sha256(f"{number} {i % 40}".encode()).hexdigest()[: 3 + i % 5] for i in range(300))
        (folder / f"{number}.txt").write_text(" ".join(words))
    (folder / "bad.txt").write_bytes(b"\xff\xfe")
    return folder


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def trained(corpus: Path, request: pytest.FixtureRequest) -> tuple[str, bytes]:
    settings = TokenizerSettings(vocab_size=600, model=request.param)
    return request.param, train_tokenizer([str(corpus)], settings=settings)


@pytest.fixture(scope="module")
def raw(trained: tuple[str, bytes]) -> bytes:
    return trained[1]


def test_the_same_sources_give_the_same_bytes_in_any_process(corpus: Path, trained: tuple[str, bytes]) -> None:
    model, raw = trained
    command = [sys.executable, "-c", PROGRAM, str(corpus), model]
    found = {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for _ in range(2)}
    assert found == {hashlib.sha256(raw).hexdigest()}


def test_the_vocabulary_has_the_size_asked_for_and_the_end_of_text_first(raw: bytes) -> None:
    tokenizer = Tokenizer.from_buffer(raw)
    # The sample has not so many pieces that a unigram model would keep.
    assert tokenizer.get_vocab_size() == 600 or (b'"Unigram"' in raw and 580 < tokenizer.get_vocab_size() < 600)
    assert tokenizer.token_to_id("<|endoftext|>") == 0


@settings(deadline=None)
@given(st.text())
def test_any_text_can_be_encoded_and_decoded_again(raw: bytes, text: str) -> None:
    tokenizer = Tokenizer.from_buffer(raw)
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_special_token_never_comes_out_of_a_text(corpus: Path) -> None:
    settings = TokenizerSettings(vocab_size=600, model="unigram", end_of_text="word", special_tokens=("other",))
    raw = train_tokenizer([str(corpus)], settings=settings)
    encoder = TextEncoder(raw, IngestSettings(end_of_text="word"))
    encoded = encoder.encode(["word and other words, ein Wort, 言葉"])
    assert not encoded.faults
    assert encoded.values.tolist().count(0) == 1
    assert encoded.values[-1] == 0
    tokenizer = Tokenizer.from_buffer(raw)
    assert tokenizer.decode(encoded.values[:-1].tolist()) == "word and other words, ein Wort, 言葉"


def test_a_unigram_vocabulary_is_made_of_the_likeliest_pieces(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcabc abcabc xyz " * 200)
    raw = train_tokenizer([str(tmp_path)], settings=TokenizerSettings(vocab_size=300, model="unigram"))
    tokenizer = Tokenizer.from_buffer(raw)
    assert len(tokenizer.encode(" abcabc xyz").tokens) <= 4
    assert tokenizer.get_vocab_size() <= 300


def test_a_unigram_vocabulary_has_room_for_all_bytes(corpus: Path) -> None:
    settings = TokenizerSettings(vocab_size=257, model="unigram", special_tokens=("<|a|>",))
    with pytest.raises(ConfigError, match="no room for the bytes"):
        train_tokenizer([str(corpus)], settings=settings)


def test_a_small_sample_is_drawn_from_all_over_the_sources(corpus: Path, trained: tuple[str, bytes]) -> None:
    model, raw = trained
    half = TokenizerSettings(vocab_size=600, sample_bytes=20_000, model=model)
    found = train_tokenizer([str(corpus)], settings=half)
    assert found == train_tokenizer([str(corpus)], settings=half)
    assert found != raw


def test_globs_choose_what_is_trained_on(corpus: Path) -> None:
    raw = train_tokenizer([str(corpus)], settings=TokenizerSettings(vocab_size=600))
    reading = IngestSettings(include=("1*.txt",))
    assert train_tokenizer([str(corpus)], settings=TokenizerSettings(vocab_size=600), reading=reading) != raw


def test_sources_without_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="no text to train on"):
        train_tokenizer([str(tmp_path)])
    with pytest.raises(MissingError, match="does not exist"):
        train_tokenizer([str(tmp_path / "nowhere")])


def test_a_special_token_has_one_name(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="special tokens must differ"):
        train_tokenizer([str(corpus)], settings=TokenizerSettings(special_tokens=("<|endoftext|>",)))
