"""`protect`: parity files for what has none yet, and one commit that names them."""

import logging
import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from datastore.dataset.durability.parity import (
    Group,
    Member,
    choose_groups,
    load_groups,
    members_of,
    parity_table_key,
    store_groups,
    write_group,
)
from datastore.dataset.log.manifest import INFO_KEY, Commit, ParityRef
from datastore.dataset.operations.append import draft_commit, publish
from datastore.dataset.operations.transaction import Target, open_to_change
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, ConflictError, CorruptError, MissingError
from datastore.storage.base import Storage
from datastore.store.parallel import in_parallel

__all__ = ["ProtectReport", "protect", "unprotected"]

_LOGGER = logging.getLogger(__name__)

_MAX_TABLES = 16
"""With more tables than this a commit gets a single one in their place."""

_THREADS = 4

Progress = Callable[[int, int], None]
"""Called with the bytes of files read, and to read."""


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


def protect(target: Target, *, width: int = 4, progress: Progress | None = None) -> ProtectReport:
    """Make parity files for groups of `width` files of `target` that have none; nothing is done for those that do.

    Where a dataset lies on R roots, `width` up to R - 1 survives the loss of any one of them.

    Raises:
        ConfigError: `width` is less than one.
        CorruptError, MissingError: a file is damaged or gone: `repair` it first.
        ConflictError: what it protects was changed meanwhile.
    """
    if width < 1:
        raise ConfigError("a group has at least one file", width=width, hint="Choose 1 or more.")
    started = time.monotonic()
    dataset = open_to_change(target)
    storage = dataset.storage
    wanted = {member.path: member for member in members_of(dataset.segments)}
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


def unprotected(dataset: Dataset, groups: Sequence[Group]) -> list[Member]:
    """Return the files of `dataset` that none of `groups` protects."""
    covered = {(member.path, member.digest) for group in groups for member in group.members}
    return [member for member in members_of(dataset.segments) if (member.path, member.digest) not in covered]


def shares_roots(storage: Storage, group: Group) -> bool:
    """Return whether one lost root would take two files of `group`, parity included, that lie nowhere else."""
    homes = [storage.copies(path) for path in (group.path, *(member.path for member in group.members))]
    single = [copies[0].url for copies in homes if len(copies) == 1]
    return len(set(single)) < len(single)


def live_groups(dataset: Dataset) -> list[Group]:
    """Return the groups of `dataset` all of whose members are files of it."""
    wanted = {member.path: member for member in members_of(dataset.segments)}
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
    current = Dataset(dataset.storage, info=dataset.info, commit=newest)
    there = {member.path: member for member in members_of(current.segments)}
    return [group for group in groups if not _is_live(group, there)]
