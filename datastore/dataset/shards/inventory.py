"""Every file that a shard, a parity group or a version names: one record for a file, and one list of each kind.

What damage is looked for in, what is copied, what is purged and what a vacuum keeps are all taken from here. Where
millions of files are compared by name alone, their names come as Arrow columns or hashes instead of records.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from datastore.dataset.log.keys import deletions_key, parity_table_key, segment_key, tokenizer_key
from datastore.dataset.log.manifest import Commit, ParityRef, SegmentRef
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.parity_groups import Group, load_groups
from datastore.dataset.shards.segment_file import BLOCK_BYTES
from datastore.dataset.shards.segments import Segments, load_segment
from datastore.digest import DIGEST_BYTES
from datastore.storage.base import Storage
from datastore.storage.wrappers import is_link
from datastore.threads import in_parallel

__all__ = [
    "KeySet",
    "StoredFile",
    "data_paths",
    "files_of",
    "files_of_group",
    "files_of_versions",
    "keys_of_versions",
    "parity_file",
    "paths_in",
    "tables_of",
]

Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that a manifest names: where it is, how long it is, and the digests that its bytes must have."""

    key: str
    size_bytes: int
    digest: bytes
    """xxh3_128 of all bytes."""

    block_bytes: int
    """The file's own size where it has one digest only."""

    block_digests: bytes
    """xxh3_128 of each block, end to end; the last block may be shorter."""

    def __len__(self) -> int:
        """Return the number of blocks."""
        return (self.size_bytes + self.block_bytes - 1) // self.block_bytes

    @property
    def sound(self) -> bool:
        """Whether there is a digest for each block."""
        return len(self.block_digests) == DIGEST_BYTES * len(self)

    def digest_of(self, block: int) -> bytes:
        """Return the digest of a block."""
        return self.block_digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]

    def end_of(self, block: int) -> int:
        """Return where a block ends."""
        return min((block + 1) * self.block_bytes, self.size_bytes)

    def bytes_in(self, chosen: Sequence[int]) -> int:
        """Return how many bytes the blocks `chosen` have."""
        return sum(self.end_of(block) - block * self.block_bytes for block in chosen)


def files_of(shards: Iterable[ShardInfo], *, linked: bool = False) -> Iterator[StoredFile]:
    """Yield the files of `shards`, data before documents; with `linked`, also those that lie in another dataset."""
    for shard in shards:
        if linked or not is_link(shard.path):
            yield StoredFile(shard.path, shard.size_bytes, shard.digest, shard.block_bytes, shard.block_digests)
        if shard.docs_path and (linked or not is_link(shard.docs_path)):
            yield _one_block(shard.docs_path, shard.docs_bytes, shard.docs_digest)


def parity_file(group: Group) -> StoredFile:
    """Return the parity file of `group`."""
    return StoredFile(group.path, group.size_bytes, group.digest, BLOCK_BYTES, group.block_digests)


def files_of_group(group: Group) -> Iterator[StoredFile]:
    """Yield the parity file of `group` and its members; the blocks of a member are known to its shard alone."""
    yield parity_file(group)
    yield from (_one_block(member.path, member.size_bytes, member.digest) for member in group.members)


def tables_of(commit: Commit) -> Iterator[StoredFile]:
    """Yield the tables that `commit` names: segments, deletions, parity groups."""
    named = [(segment_key(ref.digest), ref.file_bytes, ref.digest) for ref in commit.segments]
    named += [(deletions_key(ref.digest), ref.file_bytes, ref.digest) for ref in commit.deletions]
    named += [(parity_table_key(ref.digest), ref.file_bytes, ref.digest) for ref in commit.parity]
    yield from (_one_block(key, size_bytes, bytes.fromhex(digest)) for key, size_bytes, digest in named)


def files_of_versions(storage: Storage, commits: Iterable[Commit]) -> Iterator[StoredFile]:
    """Yield every shard, documents file and parity file of `commits` once, and what the parity files protect.

    Each segment is read once. The members of a group are needed even by a version that has them no more: without them
    it saves nothing.

    Raises:
        MissingError, CorruptError: a segment or a table of parity groups is gone or damaged.
    """
    segments, parity = _refs(commits)
    seen = set[str]()
    for found in in_parallel(lambda ref: list(_files_in(storage, ref)), segments):
        yield from _fresh(found, seen)
    for groups in in_parallel(lambda ref: load_groups(storage, ref), parity):
        yield from _fresh((file for group in groups for file in files_of_group(group)), seen)


def keys_of_versions(storage: Storage, commits: Sequence[Commit]) -> Iterator[Sequence[str]]:
    """Yield, in parts, the keys of all files that `commits` need, the tokenizer included; otherwise as `files_of_versions`.

    These are names only, some 0.3 us each: a vacuum looks up millions.
    """
    for commit in commits:
        yield [file.key for file in tables_of(commit)]
        yield [tokenizer_key(commit.tokenizer.sha256)] if commit.tokenizer else []
    segments, parity = _refs(commits)
    yield from in_parallel(lambda ref: paths_in(load_segment(storage, ref)).to_pylist(), segments)
    yield from in_parallel(lambda ref: [path for group in load_groups(storage, ref) for path in group.paths], parity)


def data_paths(storage: Storage, refs: Iterable[SegmentRef]) -> Any:
    """Return the paths that the segments `refs` name, those of links excepted, as one chunked array of strings."""
    return pa.chunked_array(list(in_parallel(lambda ref: paths_in(load_segment(storage, ref)), refs)), pa.string())


def paths_in(batch: pa.RecordBatch) -> Any:
    """Return the paths in a segment that lie in its dataset, of shards and of their documents, as an array of strings."""
    both: Any = pa.concat_arrays([batch.column("path"), batch.column("docs_path")])
    none_or_elsewhere: Any = pc.match_substring_regex(both, "^$|^/|://")
    return both.filter(pc.invert(none_or_elsewhere))


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


def _one_block(key: str, size_bytes: int, digest: bytes) -> StoredFile:
    return StoredFile(key, size_bytes, digest, max(1, size_bytes), digest if size_bytes else b"")


def _refs(commits: Iterable[Commit]) -> tuple[list[SegmentRef], list[ParityRef]]:
    """Return the segments and tables of parity groups that `commits` name, each once."""
    segments, parity = dict[str, SegmentRef](), dict[str, ParityRef]()
    for commit in commits:
        segments |= {ref.digest: ref for ref in commit.segments}
        parity |= {ref.digest: ref for ref in commit.parity}
    return list(segments.values()), list(parity.values())


def _files_in(storage: Storage, ref: SegmentRef) -> Iterator[StoredFile]:
    return files_of(Segments([load_segment(storage, ref)]), linked=True)


def _fresh(files: Iterable[StoredFile], seen: set[str]) -> Iterator[StoredFile]:
    for file in files:
        if file.key not in seen:
            seen.add(file.key)
            yield file


def _hashes(keys: Iterable[str]) -> Hashes:
    return np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in keys), np.uint64)
