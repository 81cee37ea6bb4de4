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
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer
from datastore.ingestion.settings import IngestSettings

PROGRAM = """
import hashlib, sys
from datastore.ingestion.encoding.tokenizer import TokenizerSettings, train_tokenizer  # noqa: E402
raw = train_tokenizer([sys.argv[1]], settings=TokenizerSettings(vocab_size=600))
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


@pytest.fixture(scope="module")
def raw(corpus: Path) -> bytes:
    return train_tokenizer([str(corpus)], settings=TokenizerSettings(vocab_size=600))


def test_the_same_sources_give_the_same_bytes_in_any_process(corpus: Path, raw: bytes) -> None:
    command = [sys.executable, "-c", PROGRAM, str(corpus)]
    found = {subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for _ in range(2)}
    assert found == {hashlib.sha256(raw).hexdigest()}


def test_the_vocabulary_has_the_size_asked_for_and_the_end_of_text_first(raw: bytes) -> None:
    tokenizer = Tokenizer.from_buffer(raw)
    assert tokenizer.get_vocab_size() == 600
    assert tokenizer.token_to_id("<|endoftext|>") == 0


@settings(deadline=None)
@given(st.text())
def test_any_text_can_be_encoded_and_decoded_again(raw: bytes, text: str) -> None:
    tokenizer = Tokenizer.from_buffer(raw)
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_small_sample_is_drawn_from_all_over_the_sources(corpus: Path, raw: bytes) -> None:
    half = TokenizerSettings(vocab_size=600, sample_bytes=20_000)
    found = train_tokenizer([str(corpus)], settings=half)
    assert found == train_tokenizer([str(corpus)], settings=half)
    assert found != raw


def test_globs_choose_what_is_trained_on(corpus: Path, raw: bytes) -> None:
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
