"""Which files a version needs: what its commit names, and what its segments and parity groups name in turn."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from datastore.dataset.durability.parity import Group, load_groups, parity_table_key
from datastore.dataset.log.manifest import Commit, ParityRef, SegmentRef, tokenizer_key
from datastore.dataset.shards.deletions import deletions_key
from datastore.dataset.shards.segment_file import segment_key
from datastore.dataset.shards.segments import load_segment
from datastore.storage.base import Storage
from datastore.store.parallel import in_parallel

__all__ = ["KeySet", "commit_files", "parity_files", "shard_files", "version_files"]

Hashes = npt.NDArray[np.uint64]


def commit_files(commit: Commit) -> list[str]:
    """Return the keys that `commit` itself names: segments, tables of deletions, the tokenizer."""
    keys = [segment_key(ref.digest) for ref in commit.segments]
    keys += [deletions_key(ref.digest) for ref in commit.deletions]
    keys += [parity_table_key(ref.digest) for ref in commit.parity]
    return keys if commit.tokenizer is None else [*keys, tokenizer_key(commit.tokenizer.sha256)]


def shard_files(batch: pa.RecordBatch) -> list[str]:
    """Return the keys that the segment `batch` names: shards, and documents where they have some."""
    return [key for name in ("path", "docs_path") for key in batch.column(name).to_pylist() if key]


def parity_files(groups: Iterable[Group]) -> list[str]:
    """Return the parity files of `groups`, and what they protect."""
    return [key for group in groups for key in (group.path, *(member.path for member in group.members))]


def version_files(storage: Storage, commits: Iterable[Commit]) -> Iterator[Sequence[str]]:
    """Yield, in parts, all keys that `commits` need; a segment that several of them name is read once.

    The members of a parity group are needed, even by a version that has them no more: without them it saves nothing.

    Raises:
        MissingError, CorruptError: a segment or a table of parity groups is gone or damaged.
    """
    segments, parity = dict[str, SegmentRef](), dict[str, ParityRef]()
    for commit in commits:
        yield commit_files(commit)
        segments |= {ref.digest: ref for ref in commit.segments}
        parity |= {ref.digest: ref for ref in commit.parity}
    yield from in_parallel(lambda ref: shard_files(load_segment(storage, ref)), segments.values())
    yield from in_parallel(lambda ref: parity_files(load_groups(storage, ref)), parity.values())


class KeySet:
    """Keys by 64-bit hashes, 8 bytes each: two million take 16 MB where a set of strings takes 300.

    A key that is in it is always found. One that is not may be found by accident, once in 10^13 among a million: fit for
    deciding what to keep, not for what to leave out.
    """

    def __init__(self, parts: Iterable[Iterable[str]]) -> None:
        hashes = [_hashes(part) for part in parts]
        self._sorted: Hashes = np.unique(np.concatenate([np.empty(0, np.uint64), *hashes]))

    def __len__(self) -> int:
        return int(self._sorted.size)

    def has(self, keys: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return which of `keys` are in the set."""
        wanted = _hashes(keys)
        if not self._sorted.size:
            return np.zeros(len(keys), np.bool_)
        places = np.minimum(np.searchsorted(self._sorted, wanted), self._sorted.size - 1)
        return np.equal(self._sorted[places], wanted)


def _hashes(keys: Iterable[str]) -> Hashes:
    return np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in keys), np.uint64)
