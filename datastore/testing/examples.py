"""Small datasets and runs for tests of whatever reads one: every token and document follows from a few numbers.

A run takes seconds: a small language, and settings under which a tiny GPT learns it. Each of its 60 words is followed by one of two others, so a model that has learned it has a loss of about ln 2 = 0.69, and
one that has not of about ln 61 = 4.1. For tests of hooks, of the trainer, and of what reads runs.
"""

import os
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from datastore.config import settings_from
from datastore.dataset.operations.append import commit_shards
from datastore.dataset.shards.files import put_tokenizer, shard_uid, write_token_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.segment_file import BLOCK_BYTES
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import block_digests, digest_bytes
from datastore.formats.arrow import table_of
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.tokens import offsets_of
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.training.settings import Settings

__all__ = ["WORDS", "documents_of", "make_dataset", "make_language", "make_shard", "tiny_settings"]


def make_dataset(
    url: str | os.PathLike[str] | Storage,
    shards: Sequence[Sequence[int]],
    *,
    dtype: str = "uint16",
    name: str = "made",
    block_bytes: int = BLOCK_BYTES,
) -> Dataset:
    """Append one commit to the dataset at `url` and return it: shard `i` has documents of `shards[i]` tokens each.

    Another `name` makes other shards; the same one makes the same, byte by byte. Small `block_bytes` give even a tiny
    shard several blocks.
    """
    storage = url if isinstance(url, Storage) else open_storage(url)
    infos = [
        make_shard(storage, shard_uid(name, index), lengths=lengths, dtype=dtype, block_bytes=block_bytes)
        for index, lengths in enumerate(shards)
    ]
    commit_shards(storage, infos)
    return open_dataset(storage)


def make_shard(
    storage: Storage, uid: str, *, lengths: Sequence[int], dtype: str = "uint16", block_bytes: int = BLOCK_BYTES
) -> ShardInfo:
    """Store a shard of random tokens, drawn from its uid, in documents of `lengths` tokens."""
    offsets = offsets_of(lengths)
    generator = np.random.Generator(np.random.PCG64(int(uid, 16)))
    values = generator.integers(0, np.iinfo(dtype).max, size=int(offsets[-1]), dtype=dtype, endpoint=True)
    info = write_token_shard(storage, uid=uid, values=values, offsets=offsets, documents=documents_of(uid, lengths))
    digests = block_digests(storage.get(info.path), block_bytes)
    return msgspec.structs.replace(info, block_bytes=block_bytes, block_digests=digests)


def documents_of(uid: str, lengths: Sequence[int]) -> pa.Table:
    """Return documents that lie end to end in one source; each is four bytes per token."""
    tokens = np.asarray(lengths, dtype=np.int64)
    names = [f"{uid[:8]}-{index}" for index in range(tokens.size)]
    return table_of(
        [
            names,
            [f"source-{uid[:8]}.txt"] * tokens.size,
            np.cumsum(4 * tokens) - 4 * tokens,
            4 * tokens,
            tokens,
            [digest_bytes(name.encode()) for name in names],
        ],
        schema=DOCUMENTS_SCHEMA,
    )


WORDS = 60

END_OF_TEXT = 0


def make_language(url: str | os.PathLike[str], *, shards: int = 4, documents: int = 40, seed: int = 0) -> Dataset:
    """Return a new dataset of sentences in the small language, some 100 words each."""
    storage = open_storage(url)
    rng = np.random.Generator(np.random.PCG64(seed))
    infos = []
    for index in range(shards):
        texts = [_sentence(rng, int(length)) for length in rng.integers(60, 140, documents)]
        lengths = [len(text) for text in texts]
        uid = shard_uid(f"language {seed}", index)
        offsets = offsets_of(lengths)
        values = np.concatenate(texts).astype(np.uint16)
        infos.append(
            write_token_shard(storage, uid=uid, values=values, offsets=offsets, documents=documents_of(uid, lengths))
        )
    tokenizer = put_tokenizer(storage, _tokenizer(), vocab_size=WORDS + 1, end_of_text=END_OF_TEXT)
    commit_shards(storage, infos, tokenizer=tokenizer)
    return open_dataset(storage)


def tiny_settings(url: str | os.PathLike[str], *overrides: str, hooks: tuple[dict[str, Any], ...] = ()) -> Settings:
    """Return settings for a run on `make_language(url)`, changed by `overrides` such as `train.steps=4`."""
    table = {
        "data": {"url": os.fspath(url), "seq_len": 32, "global_batch": 12, "holdout": 0.1},
        "model": {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2},
        "optim": {"lr": 0.01, "warmup": 5},
        "train": {"steps": 20, "precision": "fp32", "threads": 1, "device": "cpu", "timeout_s": 60},
        "checkpoint": {"every": 5},
        "eval": {"every": 10, "samples": 16},
        "loader": {"lanes": 8, "window": 8},
        "hooks": list(hooks),
    }
    return settings_from(Settings, table, overrides=overrides, where="tiny settings")


def _sentence(rng: np.random.Generator, words: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    choices = rng.integers(0, 2, words)
    text = np.empty(words, np.int64)
    word = int(rng.integers(0, WORDS))
    for place, choice in enumerate(choices):
        text[place] = word + 1
        word = (7 * word + 11 * int(choice) + 3) % WORDS
    text[-1] = END_OF_TEXT
    return text


def _tokenizer() -> bytes:
    vocabulary = {"<end>": END_OF_TEXT} | {f"w{word}": word for word in range(1, WORDS + 1)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<end>"))  # noqa: S106 - a token, no password
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tokenizer.to_str().encode()
