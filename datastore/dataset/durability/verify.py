"""Read everything that a version refers to, and name each block whose bytes are not what was written.

Damage never stops the reading. It is collected; what cannot be looked at because of it (the shards that only a
damaged segment names) is said by that segment's line. Shards are read block by block, so a bad sector in a file of
64 MiB is named to 2 MiB. Memory: one block per reading thread; one shard per reading thread where shards are decoded.

A sample reads all of the manifest and a share of the blocks: one run finds widespread damage, many runs find any.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

from datastore.dataset.durability.blocks import BadBlock, Draw, Room, check_copies
from datastore.dataset.durability.decode_check import DeepCheck
from datastore.dataset.elsewhere import Crew, crew_of, received, sent
from datastore.dataset.journals import damaged_documents
from datastore.dataset.log.commits import CommitLog, check_chain
from datastore.dataset.log.identity import read_info
from datastore.dataset.log.keys import (
    INFO_KEY,
    LOG_FOLDER,
    commit_key,
    deletions_key,
    parity_table_key,
    segment_key,
    tag_key,
    tokenizer_key,
    version_of_key,
)
from datastore.dataset.log.manifest import Commit, ParityRef, SegmentRef, sum_refs
from datastore.dataset.log.tags import list_tags, read_tagged
from datastore.dataset.shards.deletions import load_deletion
from datastore.dataset.shards.files import read_tokenizer
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.inventory import StoredFile, files_of, parity_file
from datastore.dataset.shards.parity_groups import Group, load_groups
from datastore.dataset.shards.segment_file import segment_ref
from datastore.dataset.shards.segments import Segments, load_segment
from datastore.dataset.snapshot import Dataset
from datastore.engines.engine import Engine, Tell
from datastore.errors import ConfigError, CorruptError, DatastoreError
from datastore.storage.base import Storage
from datastore.threads import THREADS, in_parallel
from datastore.units import Progress

__all__ = ["VerifyReport", "check_parts", "verify"]

_PIECE_BYTES = 256 * 2**20
"""About what another process reads before it answers."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read, and what was bad."""

    files: int
    bytes: int
    """Of shards, documents and parity files."""

    bad: tuple[BadBlock, ...]
    blocks: int = 0
    """How many of their blocks were read; a documents file is one block."""

    of_blocks: int = 0
    seed: int | None = None
    """What drew the blocks; None if all were read."""

    @property
    def ok(self) -> bool:
        """Whether every byte that was read is what was written."""
        return not self.bad


@dataclass(frozen=True, slots=True)
class _Found:
    files: int
    size_bytes: int
    bad: list[BadBlock]


def verify(
    dataset: Dataset,
    *,
    sample: float = 1.0,
    seed: int | None = None,
    deep: bool = False,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Read and check every file that the open version of `dataset` refers to, its history and all tags included.

    `sample` is the share of blocks to read; `seed` draws them (None: another seed each time, see the report). `deep`
    also decodes each shard and its documents, and checks that they are what the manifest says: see `DeepCheck`.
    With an `engine` other processes read the shards and parity files; what names them is checked here.
    Files that no reader depends on (README.md, the hint in the log, rejects) are not looked at. `progress` gets the bytes
    read, and about how many there are.

    Raises:
        ConfigError: `sample` is not above 0 and at most 1, or is less than 1 where `deep` needs whole files.
        StorageError: a folder could not be listed. A file that cannot be read is reported like a damaged one.
    """
    if not 0 < sample <= 1 or (deep and sample < 1):
        raise ConfigError(
            "the share of blocks does not fit",
            sample=sample,
            deep=deep,
            hint="Choose a `sample` above 0 and at most 1; with `deep`, all of it.",
        )
    seed = secrets.randbits(32) if seed is None else seed
    draw = Draw(1 / sample, seed=seed)
    run = partial(_here, dataset) if engine is None else partial(_elsewhere, crew_of(dataset, dataset, engine))
    report = _verify(dataset, draw, DeepCheck(dataset) if deep else None, run, progress)
    if draw.seen and not draw.drawn:  # So small a dataset that the share is less than a block.
        draw = Draw(draw.seen, seed=seed)
        report = _verify(dataset, draw, None, run, progress)
    return replace(report, blocks=draw.drawn, of_blocks=draw.seen, seed=seed if sample < 1 else None)


def _verify(
    dataset: Dataset, draw: Draw, look: DeepCheck | None, run: "_Run", progress: Progress | None
) -> VerifyReport:
    files, size_bytes, bad = 0, 0, list[BadBlock]()
    for found in run(_checks(dataset, draw), look):
        files += found.files
        size_bytes += found.size_bytes
        bad += found.bad
        if progress is not None:
            progress(size_bytes, max(size_bytes, int(dataset.totals.size_bytes / draw.every)))
    if look is not None and not bad:
        bad = look.rest()
    return VerifyReport(files=files, bytes=size_bytes, bad=tuple(bad))


@dataclass(frozen=True, slots=True)
class _Part:
    """Files, and which of their blocks to read: those of a shard, or of a parity group."""

    files: tuple[tuple[StoredFile, tuple[int, ...]], ...]
    shard: ShardInfo | None = None
    group: Group | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file.bytes_in(chosen) for file, chosen in self.files)


_Check = Callable[[], _Found] | _Part

_Run = Callable[[Iterator[_Check], DeepCheck | None], Iterator[_Found]]
"""Makes checks, here or elsewhere."""


def _here(dataset: Dataset, checks: Iterator[_Check], look: DeepCheck | None) -> Iterator[_Found]:
    room = Room()

    def made(check: _Check) -> _Found:
        return _check_part(dataset.storage, check, room, look) if isinstance(check, _Part) else check()

    return iter(in_parallel(made, checks, threads=_threads(dataset.storage)))


def _elsewhere(crew: Crew, checks: Iterator[_Check], look: DeepCheck | None) -> Iterator[_Found]:
    own: list[_Found] = []

    def items() -> Iterator[tuple[tuple[bool, list[_Part]], Mapping[str, str]]]:
        parts: list[_Part] = []
        size = 0
        for check in checks:
            if not isinstance(check, _Part):
                own.append(check())
                continue
            if look is not None and check.shard is not None:
                look.seen(check.shard)
            parts.append(check)
            size += check.size_bytes
            if size >= _PIECE_BYTES:
                yield (look is not None, parts), {"first_file": parts[0].files[0][0].key}
                parts, size = [], 0
        if parts:
            yield (look is not None, parts), {"first_file": parts[0].files[0][0].key}

    for _, found in crew.spread(check_parts, items(), answer=_Found):
        yield found
    yield from own


def check_parts(order: bytes, _: Tell) -> bytes:
    """Check the ordered files, in any process."""
    dataset, (deep, parts) = received(order, tuple[bool, list[_Part]])
    look = DeepCheck(dataset) if deep else None
    room = Room()
    found = [_check_part(dataset.storage, part, room, look) for part in parts]
    bad = [each for one in found for each in one.bad]
    return sent(_Found(sum(one.files for one in found), sum(one.size_bytes for one in found), bad))


def _threads(storage: Storage) -> int:
    """Return how many readers to use: for files of this machine one for each core, for others, which wait, more.

    On two cores and cached files, eight threads took 0.68 of a bare read's CPU time and two 0.83 (2026-11-25,
    tools/bench/store): they wait for each other's interpreter lock.
    """
    if storage.local_path(INFO_KEY) is None:
        return THREADS
    return min(THREADS, os.cpu_count() or 1)


def _checks(dataset: Dataset, draw: Draw) -> Iterator[_Check]:
    storage, commit = dataset.storage, dataset.commit
    yield partial(_one, INFO_KEY, partial(_check_info, dataset))
    yield partial(_check_history, storage, commit)
    for name in list_tags(storage):
        yield partial(_one, tag_key(name), partial(read_tagged, storage, name))
    yield partial(_check_journals, storage)
    if commit.tokenizer is not None:
        key = tokenizer_key(commit.tokenizer.sha256)
        yield partial(_one, key, partial(read_tokenizer, storage, commit.tokenizer))
    for deletion in commit.deletions:
        yield partial(_one, deletions_key(deletion.digest), partial(load_deletion, storage, deletion))
    yield from _parity_checks(dataset, draw)
    for ref in commit.segments:
        segments: list[Segments] = []
        found = _one(segment_key(ref.digest), partial(_check_segment, storage, ref, segments))
        yield partial(_Found, found.files, found.size_bytes, found.bad)
        unread: list[BadBlock] = []
        for shard in _rows(segments, segment_key(ref.digest), unread):
            yield from _drawn(files_of([shard], linked=True), draw, shard=shard)
        yield partial(_Found, 0, 0, unread)


def _drawn(
    files: Iterable[StoredFile], draw: Draw, *, shard: ShardInfo | None = None, group: Group | None = None
) -> Iterator[_Part]:
    """Yield what is to be read of `files`, if anything is."""
    drawn = [(file, tuple(draw.of(len(file))) if file.sound else ()) for file in files]
    wanted = tuple((file, chosen) for file, chosen in drawn if chosen or not file.sound)
    if wanted:
        yield _Part(wanted, shard, group)


def _parity_checks(dataset: Dataset, draw: Draw) -> Iterator[_Check]:
    storage = dataset.storage
    for table in dataset.commit.parity:
        groups: list[Group] = []
        found = _one(parity_table_key(table.digest), partial(_take_groups, storage, table, groups))
        yield partial(_Found, found.files, found.size_bytes, found.bad)
        for group in groups:
            yield from _drawn([parity_file(group)], draw, group=group)


def _take_groups(storage: Storage, table: ParityRef, into: list[Group]) -> None:
    into += load_groups(storage, table)


def _rows(segments: Iterable[Segments], key: str, unread: list[BadBlock]) -> Iterator[ShardInfo]:
    """Yield the shards of `segments` up to the first that makes no sense; say so in `unread`."""
    for segment in segments:
        try:
            yield from segment
        except DatastoreError as error:
            unread.append(BadBlock(key, None, error.fact))


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


def _check_journals(storage: Storage) -> _Found:
    """Check what the journals of ingests say that others rely on: which files the dataset knows, and which are its own."""
    bad: list[BadBlock] = []
    with suppress(ConfigError):  # A web server lists nothing.
        bad = [BadBlock(key, None, reason) for key, reason in damaged_documents(storage)]
    return _Found(0, 0, bad)


def _check_part(storage: Storage, part: _Part, room: Room, look: DeepCheck | None) -> _Found:
    """Check blocks of some files; if they are sound, `look` at what they hold."""
    bad: list[BadBlock] = []
    for file, chosen in part.files:
        bad += check_copies(storage, file, chosen=chosen, room=room)
    if look is not None and not bad:
        bad += look.shard(part.shard) if part.shard is not None else []
        bad += look.group(part.group) if part.group is not None else []
    return _Found(len(part.files), part.size_bytes, bad)


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
        try:
            check_chain(version, found.sha256, expected=expected)
        except CorruptError as error:
            bad.append(BadBlock(commit_key(version), None, error.fact))
        if version == newest.version and found.commit != newest:
            bad.append(BadBlock(commit_key(version), None, "not the commit that was opened"))
        expected = found.commit.parent_sha256
    if sum_refs(newest.segments, newest.deletions) != newest.totals:
        bad.append(BadBlock(commit_key(newest.version), None, "its totals are not the sums over its segments"))
    later: set[str] = set()
    with suppress(ConfigError):  # A web server lists nothing.
        keys = (stat.key for stat in storage.list(LOG_FOLDER))
        later = {key for key in keys if (version_of_key(key) or 0) > newest.version}
    gaps = [commit_key(newest.version + 1 + index) for index in range(len(later))]
    bad += [BadBlock(key, None, "the commit is missing, later ones are there") for key in gaps if key not in later]
    return _Found(newest.version, 0, bad)
