"""Which files a version needs: what its commit names, and what its segments and parity groups name in turn."""

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
from datastore.dataset.shards.segments import load_segment
from datastore.storage.base import Storage
from datastore.threads import in_parallel

__all__ = [
    "File",
    "KeySet",
    "commit_files",
    "data_files",
    "data_paths",
    "files_of",
    "index_keys",
    "manifest_files",
    "parity_files",
    "shard_files",
    "version_files",
]

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


def files_of(shards: Iterable[ShardInfo]) -> list[str]:
    """Return the files of `shards`."""
    return [path for shard in shards for path in (shard.path, shard.docs_path) if path]


def data_paths(storage: Storage, refs: Iterable[SegmentRef]) -> Any:
    """Return the paths of all shards, and of their documents files, that the segments `refs` name."""
    return pa.chunked_array(list(in_parallel(lambda ref: paths_of(storage, ref), refs)), pa.string())


def paths_of(storage: Storage, ref: SegmentRef) -> Any:
    """Return the paths in a segment that lie in its dataset."""
    batch = load_segment(storage, ref)
    both: Any = pa.concat_arrays([batch.column("path"), batch.column("docs_path")])
    none_or_elsewhere: Any = pc.match_substring_regex(both, "^$|^/|://")
    return both.filter(pc.invert(none_or_elsewhere))


def index_keys(commit: Commit) -> Iterator[str]:
    """Yield the keys of the segments and tables of deletions that a version names."""
    yield from (segment_key(ref.digest) for ref in commit.segments)
    yield from (deletions_key(ref.digest) for ref in commit.deletions)


_COLUMNS = ["path", "size_bytes", "digest", "docs_path", "docs_bytes", "docs_digest"]


@dataclass(frozen=True, slots=True)
class File:
    """A file that a manifest names, and what it is called in the other place."""

    key: str
    size_bytes: int
    digest: bytes | str
    to: str


def data_files(storage: Storage, commits: Iterable[Commit]) -> Iterator[File]:
    """Yield every shard, documents file and parity file of `commits` once, and what the parity files protect."""
    segments, parity = dict[str, SegmentRef](), dict[str, ParityRef]()
    for commit in commits:
        segments |= {ref.digest: ref for ref in commit.segments}
        parity |= {ref.digest: ref for ref in commit.parity}
    seen = set[str]()
    for found in in_parallel(lambda ref: _shards(storage, ref), segments.values()):
        yield from _fresh(found, seen)
    for found in in_parallel(lambda ref: _groups(storage, ref), parity.values()):
        yield from _fresh(found, seen)


def manifest_files(commits: Iterable[Commit]) -> list[File]:
    """Return the tables that `commits` name, each once."""
    files = dict[str, File]()
    for commit in commits:
        named = {segment_key(ref.digest): (ref.file_bytes, ref.digest) for ref in commit.segments}
        named |= {deletions_key(ref.digest): (ref.file_bytes, ref.digest) for ref in commit.deletions}
        named |= {parity_table_key(ref.digest): (ref.file_bytes, ref.digest) for ref in commit.parity}
        files |= {key: File(key, size_bytes, digest, key) for key, (size_bytes, digest) in named.items()}
    return list(files.values())


def _fresh(files: Iterable[File], seen: set[str]) -> Iterator[File]:
    for file in files:
        if file.key not in seen:
            seen.add(file.key)
            yield file


def _shards(storage: Storage, ref: SegmentRef) -> list[File]:
    """Return the files that one segment names."""
    files = []
    for row in load_segment(storage, ref).select(_COLUMNS).to_pylist():
        files.append(File(row["path"], row["size_bytes"], row["digest"], row["path"]))
        if row["docs_path"]:
            files.append(File(row["docs_path"], row["docs_bytes"], row["docs_digest"], row["docs_path"]))
    return files


def _groups(storage: Storage, ref: ParityRef) -> list[File]:
    """Return the parity files of one table, and their members: what has left the version still helps to save the rest."""
    files = []
    for group in load_groups(storage, ref):
        files.append(File(group.path, group.size_bytes, group.digest, group.path))
        files += [File(member.path, member.size_bytes, member.digest, member.path) for member in group.members]
    return files
