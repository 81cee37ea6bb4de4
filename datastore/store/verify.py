"""Read everything that a version refers to, and name each block whose bytes are not what was written.

Damage never stops the reading. It is collected; what cannot be looked at because of it (the shards that only a
damaged segment names) is said by that segment's line. Shards are read block by block, so a bad sector in a file of
64 MiB is named to 2 MiB. Memory: one block per reading thread.
"""

import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from datastore.errors import CorruptError, DatastoreError
from datastore.storage.base import Storage
from datastore.store.blocks import BadBlock, check_blocks
from datastore.store.commits import CommitLog
from datastore.store.create import read_info
from datastore.store.dataset import Dataset
from datastore.store.deletions import deletions_key, load_deletion
from datastore.store.manifest import INFO_KEY, Commit, SegmentRef, commit_key, sum_refs, tag_key, tokenizer_key
from datastore.store.opening import load_segment
from datastore.store.segment import Segments, ShardInfo, segment_key, segment_ref
from datastore.store.tags import list_tags, read_tagged
from datastore.store.tokenizers import read_tokenizer

__all__ = ["VerifyReport", "verify"]

_THREADS = 8
_AHEAD = 4 * _THREADS
"""Checks handed to the threads before the oldest is waited for."""

_COMMIT = re.compile(r"_log/\d{20}\.json")

Progress = Callable[[int, int], None]
"""Called with the bytes of shards and documents read, and to read, from the thread that called `verify`."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read, and what was bad."""

    files: int
    bytes: int
    """Of shards and documents."""

    bad: tuple[BadBlock, ...]

    @property
    def ok(self) -> bool:
        """Whether every byte is what was written."""
        return not self.bad


@dataclass(frozen=True, slots=True)
class _Found:
    files: int
    size_bytes: int
    bad: list[BadBlock]


def verify(dataset: Dataset, *, progress: Progress | None = None) -> VerifyReport:
    """Read and check every file that the open version of `dataset` refers to, its history and all tags included.

    Files that no reader depends on (README.md, the hint in the log, unfinished ingests) are not looked at.

    Raises:
        StorageError: a folder could not be listed. A file that cannot be read is reported like a damaged one.
    """
    files, size_bytes, bad = 0, 0, list[BadBlock]()
    for found in _run(_checks(dataset)):
        files += found.files
        size_bytes += found.size_bytes
        bad += found.bad
        if progress is not None:
            progress(size_bytes, dataset.totals.size_bytes)
    return VerifyReport(files=files, bytes=size_bytes, bad=tuple(bad))


def _run(checks: Iterable[Callable[[], _Found]]) -> Iterator[_Found]:
    """Do `checks` on a few threads; yield what they find, in their order."""
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        waiting: deque[Future[_Found]] = deque()
        for check in checks:
            waiting.append(pool.submit(check))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _checks(dataset: Dataset) -> Iterator[Callable[[], _Found]]:
    storage, commit = dataset.storage, dataset.commit
    yield partial(_one, INFO_KEY, partial(_check_info, dataset))
    yield partial(_check_history, storage, commit)
    for name in list_tags(storage):
        yield partial(_one, tag_key(name), partial(read_tagged, storage, name))
    if commit.tokenizer is not None:
        key = tokenizer_key(commit.tokenizer.sha256)
        yield partial(_one, key, partial(read_tokenizer, storage, commit.tokenizer))
    for deletion in commit.deletions:
        yield partial(_one, deletions_key(deletion.digest), partial(load_deletion, storage, deletion))
    buffers = threading.local()
    for ref in commit.segments:
        segments: list[Segments] = []
        found = _one(segment_key(ref.digest), partial(_check_segment, storage, ref, segments))
        yield partial(_Found, found.files, found.size_bytes, found.bad)
        for shard in segments[0] if segments else ():
            yield partial(_check_shard, storage, shard, buffers)


def _one(path: str, check: Callable[[], object]) -> _Found:
    """Report the file `path` bad if `check` fails."""
    try:
        check()
    except DatastoreError as error:
        return _Found(1, 0, [BadBlock(path, None, error.fact)])
    return _Found(1, 0, [])


def _check_info(dataset: Dataset) -> None:
    if read_info(dataset.storage) != dataset.info:
        raise CorruptError("the dataset's identity has changed since it was opened")


def _check_segment(storage: Storage, ref: SegmentRef, into: list[Segments]) -> None:
    batch = load_segment(storage, ref)
    into.append(Segments([batch]))
    sums = segment_ref(batch, b"")
    if (sums.documents, sums.tokens, sums.size_bytes) != (ref.documents, ref.tokens, ref.size_bytes):
        raise CorruptError("the sums over its shards are not those that the commit names")


def _check_shard(storage: Storage, shard: ShardInfo, buffers: threading.local) -> _Found:
    buffer = getattr(buffers, "buffer", bytearray())
    longest = max(shard.block_bytes, shard.docs_bytes)
    if len(buffer) < longest:
        buffer = buffers.buffer = bytearray(longest)
    bad = check_blocks(
        storage,
        shard.path,
        size_bytes=shard.size_bytes,
        block_bytes=shard.block_bytes,
        digests=shard.block_digests,
        buffer=buffer,
    )
    if not shard.docs_path:
        return _Found(1, shard.size_bytes, bad)
    # The documents have one digest: a single block as long as the file.
    bad += check_blocks(
        storage,
        shard.docs_path,
        size_bytes=shard.docs_bytes,
        block_bytes=shard.docs_bytes,
        digests=shard.docs_digest,
        buffer=buffer,
    )
    return _Found(2, shard.size_bytes + shard.docs_bytes, bad)


def _check_history(storage: Storage, newest: Commit) -> _Found:
    """Check every commit up to `newest`, each against its successor, and that no later one stands after a gap."""
    log = CommitLog(storage)
    bad = []
    expected = ""
    for version in range(newest.version, 0, -1):
        try:
            found = log.stored(version)
        except DatastoreError as error:
            bad.append(BadBlock(commit_key(version), None, error.fact))
            expected = ""
            continue
        if expected not in {"", found.sha256} or (version == newest.version and found.commit != newest):
            bad.append(BadBlock(commit_key(version), None, "not the commit that the next was built on"))
        expected = found.commit.parent_sha256
    if sum_refs(newest.segments, newest.deletions) != newest.totals:
        bad.append(BadBlock(commit_key(newest.version), None, "its totals are not the sums over its segments"))
    keys = (stat.key for stat in storage.list("_log"))
    later = {key for key in keys if key > commit_key(newest.version) and _COMMIT.fullmatch(key)}
    gaps = [commit_key(newest.version + 1 + index) for index in range(len(later))]
    bad += [BadBlock(key, None, "the commit is missing, later ones are there") for key in gaps if key not in later]
    return _Found(newest.version, 0, bad)
