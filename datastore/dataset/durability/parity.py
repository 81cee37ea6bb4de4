"""Parity: one more file for each few, from which any one of them can be made again.

The parity file of a group is the XOR of its members (shards, or their documents files), each padded with zeros to the
longest; so is any member that of all the others and the parity file, position by position. It costs 1/k of the space
where `copies` cost all of it, and saves one file per group: members lie on different roots as far as there are roots.

Groups are written once and stand in a table that the commit names. New shards are unprotected until the next `protect`;
a group that a member has left, or that is not full, is made anew when there are new files for it.

`protect` makes parity files for what has none yet, and one commit that names them.
"""

import heapq
import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from datastore.dataset.log.keys import INFO_KEY, parity_key, parity_table_key
from datastore.dataset.log.manifest import Commit, ParityRef
from datastore.dataset.operations.transaction import DatasetLike, draft_commit, open_for_change, publish
from datastore.dataset.shards.inventory import files_of
from datastore.dataset.shards.parity_groups import (
    Group,
    Member,
    load_groups,
    store_groups,
)
from datastore.dataset.shards.segment_file import BLOCK_BYTES
from datastore.dataset.snapshot import Dataset
from datastore.digest import block_digests, digest_bytes, digest_hex, require_digest
from datastore.errors import ConfigError, ConflictError, CorruptError, MissingError, StorageError
from datastore.storage.base import Storage
from datastore.threads import in_parallel
from datastore.units import Progress

__all__ = ["ProtectReport", "choose_groups", "members_of", "protect", "unprotected", "write_group", "xor_files"]

_PIECE_BYTES = 4 * 2**20
"""Read, digested and mixed in at a time: 7 to 8 GB of files per CPU-second (AMD EPYC, 2026-11-25, tools/bench/redundancy)."""

_SALTS = 64
"""Names tried for a parity file, of which the one is taken that lies on another root than its members."""

Bytes = npt.NDArray[np.uint8]


def choose_groups(files: Sequence[tuple[Member, str]], *, width: int, roots: int) -> list[tuple[Member, ...]]:
    """Return `files`, each given with the root that it lies on, in groups of `width`.

    If `width` is less than `roots`, no group has two files of one root, and has fewer files if need be; otherwise the
    roots take turns. Files of about the same size go together.
    """
    waiting: dict[str, list[Member]] = {}
    for member, root in sorted(files, key=lambda file: (file[0].size_bytes, file[0].path)):
        waiting.setdefault(root, []).append(member)
    fullest = [(-len(members), root) for root, members in waiting.items()]
    heapq.heapify(fullest)
    groups = []
    while fullest:
        group: list[Member] = []
        taken: list[str] = []
        while fullest and len(group) < width:
            _, root = heapq.heappop(fullest)
            group.append(waiting[root].pop())
            taken.append(root)
            if not fullest and width >= roots:
                _put_back(fullest, waiting, taken)
        _put_back(fullest, waiting, taken)
        groups.append(tuple(group))
    return groups


def _put_back(fullest: list[tuple[int, str]], waiting: dict[str, list[Member]], taken: list[str]) -> None:
    for root in taken:
        if waiting[root]:
            heapq.heappush(fullest, (-len(waiting[root]), root))
    taken.clear()


def write_group(storage: Storage, members: tuple[Member, ...]) -> Group:
    """Read `members`, check them, and store their parity file. Memory: the longest of them.

    Raises:
        CorruptError, MissingError: a member is damaged or gone; what is made from it would be worth nothing.
    """
    parity = xor_files(storage, members, size_bytes=max(member.size_bytes for member in members))
    path = _place_for(storage, members)
    storage.put(path, parity.data)
    return Group(
        path=path,
        size_bytes=parity.size,
        digest=digest_bytes(parity.data),
        block_digests=block_digests(parity.data, BLOCK_BYTES),
        members=members,
    )


def xor_files(storage: Storage, files: Sequence[Member], *, size_bytes: int) -> Bytes:
    """Return the XOR of `files`, all bytes of each checked, as far as `size_bytes`.

    Raises:
        CorruptError, MissingError: one is damaged or gone.
    """
    total = np.zeros(size_bytes, np.uint8)
    piece = np.empty(_PIECE_BYTES, np.uint8)
    states = [xxhash.xxh3_128() for _ in files]
    for start in range(0, max((file.size_bytes for file in files), default=0), _PIECE_BYTES):
        for file, state in zip(files, states, strict=True):
            length = min(_PIECE_BYTES, file.size_bytes - start)
            if length > 0:
                _read(storage, file.path, start, piece[:length].data)
                state.update(piece[:length].data)
                mix(total[start : start + length], piece)
    for file, state in zip(files, states, strict=True):
        require_digest(state.digest(), file.digest, where=file.path)
    return total


def _read(storage: Storage, path: str, start: int, target: memoryview) -> None:
    """Read from the first copy itself, which saves a thread and a copy in memory; by way of all roots if that fails."""
    try:
        storage.copies(path)[0].read_into(path, start, target)
    except (MissingError, StorageError):
        storage.read_into(path, start, target)


def mix(target: Bytes, source: Bytes) -> None:
    """XOR `source` into `target`, as far as `target` goes."""
    length = target.size
    even = length - length % 8
    np.bitwise_xor(target[:even].view(np.uint64), source[:even].view(np.uint64), out=target[:even].view(np.uint64))
    np.bitwise_xor(target[even:], source[even:length], out=target[even:])


def _place_for(storage: Storage, members: Sequence[Member]) -> str:
    """Return a name for the parity file by which it lies on another root than the members do, if that can be."""
    taken = [copy.url for member in members for copy in storage.copies(member.path)]
    best, fewest = "", len(taken) + 1
    for salt in range(_SALTS):
        name = digest_hex(*(member.digest for member in members), salt.to_bytes(2, "big"))
        path = parity_key(name)
        shared = sum(taken.count(copy.url) for copy in storage.copies(path))
        if shared < fewest:
            best, fewest = path, shared
        if not shared:
            break
    return best


_LOGGER = logging.getLogger(__name__)

_MAX_TABLES = 16
"""With more tables than this a commit gets a single one in their place."""

_THREADS = 4


@dataclass(frozen=True, slots=True)
class ProtectReport:
    """What was protected, and what protects the version now."""

    url: str
    version: int
    committed: bool
    """Whether there was anything to do."""

    new_groups: int
    read_bytes: int
    written_bytes: int
    groups: int
    files: int
    parity_bytes: int
    shared_roots: int
    """Groups of which a lost root would take more than one file, so that it could not be made again."""

    seconds: float


def protect(target: DatasetLike, *, width: int = 4, progress: Progress | None = None) -> ProtectReport:
    """Make parity files for groups of `width` files of `target` that have none; nothing is done for those that do.

    Where a dataset lies on R roots, `width` up to R - 1 survives the loss of any one of them. `progress` gets the bytes
    read, and all.

    Raises:
        ConfigError: `width` is less than one.
        CorruptError, MissingError: a file is damaged or gone: `repair` it first.
        ConflictError: what it protects was changed meanwhile.
    """
    if width < 1:
        raise ConfigError("a group has at least one file", width=width, hint="Choose 1 or more.")
    started = time.monotonic()
    dataset = open_for_change(target)
    storage = dataset.storage
    wanted = {member.path: member for member in members_of(dataset)}
    kept, tables = _whole_groups(dataset, wanted, width=width)
    todo = _missing(dataset, wanted, kept, width=width)
    new: list[Group] = []
    read_bytes, total = 0, sum(member.size_bytes for members in todo for member in members)
    threads = min(_THREADS, os.cpu_count() or 1)
    for group in in_parallel(partial(write_group, storage), todo, threads=threads):
        new.append(group)
        read_bytes += sum(member.size_bytes for member in group.members)
        if progress is not None:
            progress(read_bytes, total)
    changed = bool(new) or len(kept) < sum(ref.groups for ref in dataset.commit.parity)
    commit = _commit(dataset, tables, kept, new) if changed else dataset.commit
    return ProtectReport(
        url=dataset.url,
        version=commit.version,
        committed=commit is not dataset.commit,
        new_groups=len(new),
        read_bytes=read_bytes,
        written_bytes=sum(group.size_bytes for group in new),
        groups=sum(ref.groups for ref in commit.parity),
        files=sum(ref.files for ref in commit.parity),
        parity_bytes=sum(ref.size_bytes for ref in commit.parity),
        shared_roots=sum(shares_roots(storage, group) for group in [*kept, *new]),
        seconds=time.monotonic() - started,
    )


def members_of(dataset: Dataset) -> Iterator[Member]:
    """Yield what can be protected: the files of `dataset` that lie in it, and are not empty."""
    for file in files_of(dataset.segments):
        if file.size_bytes:
            yield Member(file.key, file.size_bytes, file.digest)


def unprotected(dataset: Dataset, groups: Sequence[Group]) -> list[Member]:
    """Return the files of `dataset` that none of `groups` protects."""
    covered = {(member.path, member.digest) for group in groups for member in group.members}
    return [member for member in members_of(dataset) if (member.path, member.digest) not in covered]


def shares_roots(storage: Storage, group: Group) -> bool:
    """Return whether one lost root would take two files of `group`, parity included, that lie nowhere else."""
    homes = [storage.copies(path) for path in group.paths]
    single = [copies[0].url for copies in homes if len(copies) == 1]
    return len(set(single)) < len(single)


def live_groups(dataset: Dataset) -> list[Group]:
    """Return the groups of `dataset` all of whose members are files of it."""
    wanted = {member.path: member for member in members_of(dataset)}
    groups = (group for ref in dataset.commit.parity for group in load_groups(dataset.storage, ref))
    return [group for group in groups if _is_live(group, wanted)]


def _is_live(group: Group, wanted: dict[str, Member]) -> bool:
    return all(wanted.get(member.path) == member for member in group.members)


def _whole_groups(
    dataset: Dataset, wanted: dict[str, Member], *, width: int
) -> tuple[list[Group], list[tuple[ParityRef, list[Group]]]]:
    """Return the groups to keep, and by table those to keep of it; short groups stay only if there is nothing new."""
    tables = [(ref, _readable(dataset.storage, ref)) for ref in dataset.commit.parity]
    live = [group for _, groups in tables for group in groups if _is_live(group, wanted)]
    fresh = {_class(member) for member in unprotected(dataset, live)}
    kept = {group.path for group in live if len(group.members) >= width or _class(group.members[0]) not in fresh}
    by_table = [(ref, [group for group in groups if group.path in kept]) for ref, groups in tables]
    return [group for _, groups in by_table for group in groups], by_table


def _readable(storage: Storage, ref: ParityRef) -> list[Group]:
    """Return the groups of a table; none if it is lost: what it names is protected anew."""
    try:
        return load_groups(storage, ref)
    except (CorruptError, MissingError) as error:
        _LOGGER.warning("a table of parity groups is lost, its files are protected anew: %s", error)
        storage.delete(parity_table_key(ref.digest))
        return []


def _class(member: Member) -> str:
    """Return what may be in one group: shards with shards, documents with documents, which are much smaller."""
    return member.path.partition("/")[0]


def _missing(
    dataset: Dataset, wanted: dict[str, Member], kept: Collection[Group], *, width: int
) -> list[tuple[Member, ...]]:
    covered = {member.path for group in kept for member in group.members}
    files = [(member, dataset.storage.copies(path)[0].url) for path, member in wanted.items() if path not in covered]
    roots = len(dataset.storage.copies(INFO_KEY))
    groups = []
    for kind in sorted({_class(member) for member, _ in files}):
        groups += choose_groups([file for file in files if _class(file[0]) == kind], width=width, roots=roots)
    return groups


def _commit(
    dataset: Dataset, tables: list[tuple[ParityRef, list[Group]]], kept: list[Group], new: list[Group]
) -> Commit:
    storage = dataset.storage
    same = [ref for ref, groups in tables if len(groups) == ref.groups]
    if len(same) >= _MAX_TABLES:
        same, moved = [], kept
    else:
        moved = [group for ref, groups in tables if len(groups) < ref.groups for group in groups]
    refs = (*same, *([store_groups(storage, [*moved, *new])] if moved or new else []))

    def build(newest: Commit | None) -> Commit:
        gone = _without_members(dataset, newest, new)
        for group in gone:
            # A purge came between: what was made from the purged bytes goes, too.
            storage.delete(group.path)
        if newest is None or newest.parity != dataset.commit.parity or gone:
            raise ConflictError(
                "what is protected was changed meanwhile",
                url=dataset.url,
                started_from=dataset.version,
                newest=newest.version if newest else None,
                hint="Nothing was lost. Give the same command again: it starts from the newest version.",
            )
        return msgspec.structs.replace(draft_commit("protect", parent=newest), parity=refs)

    return publish(storage, dataset.info, build)


def _without_members(dataset: Dataset, newest: Commit | None, groups: Sequence[Group]) -> list[Group]:
    """Return those of `groups` that have a file which is not one of `newest`."""
    if newest is None or newest.segments == dataset.commit.segments:
        return []
    there = {member.path: member for member in members_of(dataset.at(newest))}
    return [group for group in groups if not _is_live(group, there)]
