"""Small token datasets for tests of whatever reads one: every token and document follows from a few numbers."""

import os
from collections.abc import Sequence

import msgspec
import numpy as np
import pyarrow as pa

from datastore.dataset.operations.append import commit_shards
from datastore.dataset.shards.files import shard_uid, write_token_shard
from datastore.dataset.shards.segment_file import BLOCK_BYTES, ShardInfo
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import block_digests, digest_bytes
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage

__all__ = ["documents_of", "make_dataset", "make_shard"]


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
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    generator = np.random.Generator(np.random.PCG64(int(uid, 16)))
    values = generator.integers(0, np.iinfo(dtype).max, size=int(offsets[-1]), dtype=dtype, endpoint=True)
    info = write_token_shard(storage, uid=uid, values=values, offsets=offsets, documents=documents_of(uid, lengths))
    digests = block_digests(storage.get(info.path), block_bytes)
    return msgspec.structs.replace(info, block_bytes=block_bytes, block_digests=digests)


def documents_of(uid: str, lengths: Sequence[int]) -> pa.Table:
    """Return documents that lie end to end in one source; each is four bytes per token."""
    tokens = np.asarray(lengths, dtype=np.int64)
    names = [f"{uid[:8]}-{index}" for index in range(tokens.size)]
    return pa.table(
        {
            "id": names,
            "source": [f"source-{uid[:8]}.txt"] * tokens.size,
            "offset": np.cumsum(4 * tokens) - 4 * tokens,
            "length": 4 * tokens,
            "tokens": tokens,
            "digest": pa.array([digest_bytes(name.encode()) for name in names], pa.binary(16)),
        },
        schema=DOCUMENTS_SCHEMA,
    )
