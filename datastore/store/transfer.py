"""Files on their way from one place to another, each checked against its digest before it is written there."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from datastore.dataset.durability.parity import load_groups, parity_table_key
from datastore.dataset.log.identity import require_free
from datastore.dataset.log.manifest import Commit, DatasetInfo, ParityRef, SegmentRef, tokenizer_key
from datastore.dataset.roots import open_roots
from datastore.dataset.shards.deletions import deletions_key
from datastore.dataset.shards.segment_file import segment_key
from datastore.dataset.shards.segments import load_segment
from datastore.errors import FormatError, MissingError, StorageError
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.verified import read_checked
from datastore.store.parallel import in_parallel
from datastore.store.tokenizers import read_tokenizer

__all__ = [
    "File",
    "Progress",
    "Transferred",
    "copy_tokenizers",
    "data_files",
    "manifest_files",
    "open_target",
    "transfer",
]

_PASSES = 3
"""How often to look for what is missing: the last look finds everything there, unless somebody removes it."""

_COLUMNS = ["path", "size_bytes", "digest", "docs_path", "docs_bytes", "docs_digest"]

Progress = Callable[[int, int], None]
"""Called with the bytes that are there, and that are to be there."""


@dataclass(frozen=True, slots=True)
class File:
    """A file that a manifest names, and what it is called in the other place."""

    key: str
    size_bytes: int
    digest: bytes | str
    to: str


@dataclass(slots=True)
class Transferred:
    """What was copied, and what was there."""

    files: int = 0
    bytes: int = 0
    present: int = 0


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


def transfer(
    source: Storage, target: Storage, files: Sequence[File], *, progress: Progress | None = None
) -> Transferred:
    """Copy those of `files` that are not there.

    One that is there with the right size is taken for whole: writes are atomic. Memory: as many files as threads, and
    the names of all that are there.

    Raises:
        MissingError, CorruptError: a file of the source is gone or damaged.
        StorageError: the target cannot be written, or somebody removes from it what was copied.
    """
    folders = {file.to.partition("/")[0] for file in files}
    total = sum(file.size_bytes for file in files)
    done: Transferred | None = None

    def bring(file: File) -> int:
        target.put(file.to, read_checked(source, file.key, size_bytes=file.size_bytes, digest=file.digest))
        return file.size_bytes

    for _ in range(_PASSES):
        sizes = {stat.key: stat.size_bytes for folder in folders for stat in target.list(folder)}
        wanted = [file for file in files if sizes.get(file.to) != file.size_bytes]
        done = done or Transferred(present=len(files) - len(wanted))
        if not wanted:
            return done
        at = total - sum(file.size_bytes for file in wanted)
        for size_bytes in in_parallel(bring, wanted):
            done.files, done.bytes, at = done.files + 1, done.bytes + size_bytes, at + size_bytes
            if progress is not None:
                progress(at, total)
    raise StorageError(
        "what was copied does not stay", url=target.url, hint="Stop whoever removes it, then run the same again."
    )


def open_target(place: str | os.PathLike[str] | Storage) -> tuple[Storage, DatasetInfo | None]:
    """Return the storage of a place to write a dataset to, and the identity of the one that is there, if one is.

    Raises:
        ConfigError: the place holds something else.
        FormatError, CorruptError: the dataset that is there is not readable.
    """
    try:
        return open_roots(place)
    except (MissingError, FormatError):
        storage = place if isinstance(place, Storage) else open_storage(place)
        return storage, require_free(storage)


def copy_tokenizers(source: Storage, target: Storage, commits: Iterable[Commit]) -> None:
    """Copy the tokenizers that `commits` name, each checked against its sha256."""
    for ref in {commit.tokenizer for commit in commits if commit.tokenizer is not None}:
        target.put(tokenizer_key(ref.sha256), read_tokenizer(source, ref))


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
