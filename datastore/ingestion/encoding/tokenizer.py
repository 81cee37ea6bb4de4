"""Train a byte-level tokenizer, BPE or unigram, from the sources themselves.

The same sources give the same bytes, on any machine: the sample is chosen by the digest of each part's place, the
alphabet is sorted, and ties between merges are broken by the library by their ids. Byte-level means that any text can
be encoded and nothing is ever unknown.

Source: R. Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units", ACL 2016; bytes as in GPT-2.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from datastore.digest import digest_bytes
from datastore.document import SettingsDocument
from datastore.errors import ConfigError
from datastore.ingestion.encoding.unigram import train_unigram
from datastore.ingestion.plan import make_plan, work_items
from datastore.ingestion.reading.documents import TextRecord, read_part
from datastore.ingestion.reading.sources import list_sources
from datastore.ingestion.settings import IngestSettings
from datastore.storage.resolve import open_storage
from datastore.units import Progress

__all__ = ["SMALLEST_VOCABULARY", "TokenizerSettings", "train_tokenizer"]

SMALLEST_VOCABULARY = 257
"""All bytes, and the end of text."""

_PART_BYTES = 2**20
"""The sample is made of parts of about this size, or of whole files."""


class TokenizerSettings(SettingsDocument, frozen=True, kw_only=True):
    """How a tokenizer is trained."""

    model: Literal["bpe", "unigram"] = "bpe"
    """Pairs merged by how often they are seen, or pieces chosen by how likely they make the text. `unigram` takes the extra of
    the same name, and texts are encoded by `tokenizers`, which is slower."""

    vocab_size: Annotated[int, msgspec.Meta(ge=SMALLEST_VOCABULARY, le=2**24)] = 16_384
    """Ids, the special ones included. Up to 65,536 a token takes two bytes."""

    end_of_text: Annotated[str, msgspec.Meta(min_length=1)] = "<|endoftext|>"
    """The special token that ends a document; its id is 0."""

    special_tokens: tuple[str, ...] = ()
    """More special tokens; they get the ids after the end of text."""

    sample_bytes: Annotated[int, msgspec.Meta(ge=1)] = 256 * 2**20
    """How much text to look at, at most."""

    min_frequency: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Pairs seen less often are not merged; for `bpe`."""


def train_tokenizer(
    sources: Sequence[str | os.PathLike[str]],
    *,
    settings: TokenizerSettings | None = None,
    reading: IngestSettings | None = None,
    progress: Progress | None = None,
) -> bytes:
    """Return the `tokenizer.json` trained on a sample of `sources`.

    `settings` say which kind it is and how large; by default `TokenizerSettings()`. `reading` says how the sources are read (globs, keys, separator); what is bad in them is left out. The vocabulary
    is smaller than asked for if the sample has no more pairs to merge. `progress` gets the bytes of the sample that were
    read, and all; merging, which follows, tells nothing.

    Raises:
        ConfigError: a special token is named twice, or the sources have no text.
        DependencyError: `model="unigram"` without sentencepiece.
        MissingError: a source does not exist.
        StorageError: a source cannot be read.
    """
    names = [os.fspath(source) for source in sources]
    settings = settings or TokenizerSettings()
    special = [settings.end_of_text, *settings.special_tokens]
    if len(set(special)) != len(special) or "" in special:
        raise ConfigError("special tokens must differ and have a name", special_tokens=special, hint="Rename one.")
    texts = _Counted(_sample(names, reading or IngestSettings(), settings.sample_bytes, progress))
    if settings.model == "unigram":
        tokenizer = train_unigram(texts, vocab_size=settings.vocab_size, special=special)
    else:
        tokenizer = _train_bpe(texts, settings, special)
    if not texts.count:
        raise ConfigError("the sources have no text to train on", sources=names, hint="Check their format.")
    return str(tokenizer.to_str(pretty=True)).encode()


def _train_bpe(texts: Iterable[str], settings: TokenizerSettings, special: list[str]) -> Any:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class _Counted:
    """An iterator that counts, for the library does not say what it got."""

    def __init__(self, texts: Iterator[str]) -> None:
        self.count = 0
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.count += 1
            yield text


def _sample(
    sources: Sequence[str], reading: IngestSettings, sample_bytes: int, progress: Progress | None
) -> Iterator[str]:
    """Yield the texts of parts drawn by the digest of their place, until they are `sample_bytes` together."""
    reading = msgspec.structs.replace(reading, task_bytes=_PART_BYTES)
    listing, roots = list_sources(sources, reading)
    plan = make_plan(listing, settings=reading, kind="records", reading_digest="")
    parts = [part for order in work_items(plan) for part in order.parts]
    parts.sort(key=lambda part: digest_bytes(f"{part[0].path} {part[1]}".encode()))
    left = sample_bytes
    total = min(sample_bytes, sum(stop - start for _, start, stop in parts))
    for file, start, stop in parts:
        if progress is not None:
            progress(min(sample_bytes - left, total), total)
        if left <= 0:
            return
        url, key = roots.locate(file.path)
        for found in read_part(open_storage(url), key, file=file, span=(start, stop), settings=reading):
            if isinstance(found, TextRecord):
                left -= found.length
                yield found.text
