"""Compact: runs of small neighbouring shards become full ones, without the documents that are deleted.

Documents keep their order, but shards get new uids, and a run's order of samples follows from those: what compact makes
is a *new generation* of the dataset. A run that is under way goes on with the version that it is pinned to, until
`vacuum` removes what only that needs; a new run gets another order of samples. Nothing is read or written if there is
nothing to gain. The price is writing anew every small shard and every one of which something is deleted, once.

Memory: one shard of the target size, some three times over while it is put together, and a few of its members; of Parquet
no member is ever decoded as a whole. Neighbours that one file cannot hold, because their categories together are more than
the column's indices can number, stay apart.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from datastore.dataset.elsewhere import crew_of
from datastore.dataset.log.keys import DELETIONS
from datastore.dataset.log.manifest import Commit, sum_refs
from datastore.dataset.operations.merging import Group, deleted_tokens, live_rows, merge_all
from datastore.dataset.operations.transaction import (
    DatasetLike,
    draft_commit,
    explain_expiry,
    open_for_change,
    publish,
    remove_orphans,
    require_unchanged,
)
from datastore.dataset.shards.deletions import drop_deletions
from datastore.dataset.shards.files import (
    remove_unused,
)
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.inventory import files_of
from datastore.dataset.shards.segment_changes import replace_shards
from datastore.dataset.snapshot import Dataset
from datastore.engines.engine import Engine
from datastore.errors import ConfigError, ConflictError
from datastore.formats.records import decoded_bytes
from datastore.units import Progress

__all__ = ["TARGET_BYTES", "Candidate", "CompactReport", "compact", "group_members"]

TARGET_BYTES = 64 * 2**20

_LARGEST_TARGET = 2**30

_LARGEST_DECODED = 2**30
"""Shards of Parquet that would take more memory than this when they are read whole stay apart, however small they are."""


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What a compact did, or would do."""

    url: str
    version: int
    """The version that it made; the one that there was, if there was nothing to gain or it was only asked."""

    committed: bool
    shards_before: int
    shards_after: int
    merged: int
    """Shards that were put together, or written again without what is deleted."""

    dropped_documents: int
    dropped_tokens: int
    read_bytes: int
    written_bytes: int
    """0 of a dry run."""

    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shard that may be put together with its neighbours."""

    index: int
    live_bytes: int
    """About what it has without its deleted rows."""

    deleted: bool
    """Whether something of it is deleted."""

    kind: str
    """Only shards of the same kind are put together."""

    decoded_bytes: int = 0
    """About what its rows take in memory, if they are compressed."""


def compact(
    target: DatasetLike,
    *,
    target_bytes: int = TARGET_BYTES,
    dry_run: bool = False,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> CompactReport:
    """Put small neighbouring shards of `target` together into shards of up to `target_bytes`, and drop deleted rows.

    A shard of at least half of that, of which nothing is deleted, stays as it is. The result makes a new version with
    the same documents in the same order, and shards of other uids: see above what that means for runs. `progress` gets
    the bytes of shards that were put together, and of all that will be. With an `engine` other processes do the work, each
    on shards of its own; the result is the same to the byte. With `dry_run` only the report is
    made.

    Raises:
        ConfigError: `target_bytes` is out of range, the URL names a version, or an engine cannot see the dataset.
        MissingError, CorruptError: a file is gone or damaged; nothing has changed.
        ConflictError: another operation changed the same shards meanwhile; nothing has changed.
    """
    if not 0 < target_bytes <= _LARGEST_TARGET:
        raise ConfigError("not a size for shards", target_bytes=target_bytes, hint="Choose `target_bytes` up to 1 GiB.")
    started = time.monotonic()
    dataset = open_for_change(target)
    with explain_expiry(dataset, operation="compact"):
        crew = crew_of(dataset, target, engine) if engine else None
        groups = [
            Group([(member.index, dataset.segments.shard(member.index)) for member in group])
            for group in group_members(_members(dataset, target_bytes), target_bytes=target_bytes)
        ]
        made = None if dry_run else merge_all(dataset, groups, crew=crew, progress=progress)
        report = _compacted(dataset, groups, made)
    return replace(report, seconds=time.monotonic() - started)


def _compacted(dataset: Dataset, groups: Sequence[Group], made: Sequence[Sequence[ShardInfo]] | None) -> CompactReport:
    """Commit what was `made` of `groups`; None: it was only asked."""
    dry_run = made is None
    if made is not None:  # Some do not go together after all.
        groups, made = _gains(dataset, groups, made)
    commit = _commit(dataset, groups, made) if made else dataset.commit
    members = [shard for group in groups for _, shard in group.members]
    emptied = sum(live_rows(dataset, group) == 0 for group in groups)
    return CompactReport(
        url=dataset.url,
        version=commit.version,
        committed=commit is not dataset.commit,
        shards_before=len(dataset.segments),
        shards_after=len(dataset.segments)
        - len(members)
        + (len(groups) - emptied if dry_run else sum(map(len, made or ()))),
        merged=len(members),
        dropped_documents=sum(dataset.deletions.rows(shard.uid).size for shard in members),
        dropped_tokens=sum(deleted_tokens(dataset, shard) for shard in members),
        read_bytes=sum(shard.size_bytes + shard.docs_bytes for shard in members),
        written_bytes=sum(shard.size_bytes + shard.docs_bytes for shards in made or () for shard in shards),
    )


def _gains(
    dataset: Dataset, groups: Sequence[Group], made: Sequence[Sequence[ShardInfo]]
) -> tuple[list[Group], list[Sequence[ShardInfo]]]:
    """Return the groups that became fewer shards, or lost what is deleted, each with those; the other files are removed."""
    kept: list[tuple[Group, Sequence[ShardInfo]]] = []
    for group, shards in zip(groups, made, strict=True):
        if len(shards) < len(group.members) or any(dataset.deletions.rows(each.uid).size for _, each in group.members):
            kept.append((group, shards))
        else:
            remove_unused(dataset.storage, [shard.path for shard in shards])
    return [group for group, _ in kept], [shards for _, shards in kept]


def group_members(members: Iterable[Candidate], *, target_bytes: int) -> Iterator[list[Candidate]]:
    """Yield the runs of neighbours that are worth putting together: several, or one of which something is deleted.

    `members`, in order, are all shards that may be written anew. A run ends where the next one would make it larger than
    `target_bytes`, or too large when it is decoded, so what comes of it, given again, is not worth it any more.
    """
    group: list[Candidate] = []
    size_bytes = decoded = 0
    for member in members:
        fits = group and (member.index, member.kind) == (group[-1].index + 1, group[-1].kind)
        large = size_bytes + member.live_bytes > target_bytes or decoded + member.decoded_bytes > _LARGEST_DECODED
        if not fits or large:
            if len(group) > 1 or any(each.deleted for each in group):
                yield group
            group, size_bytes, decoded = [], 0, 0
        group.append(member)
        size_bytes += member.live_bytes
        decoded += member.decoded_bytes
    if len(group) > 1 or any(each.deleted for each in group):
        yield group


def _members(dataset: Dataset, target_bytes: int) -> Iterator[Candidate]:
    """Yield the shards that are less than half full, or of which something is deleted."""
    segments = dataset.segments
    deleted = set(segments.find(sorted(dataset.deletions.uids)).tolist())
    small = np.flatnonzero(segments.size_bytes < target_bytes / 2).tolist()
    for index in sorted(deleted.union(small) - {-1}):
        shard = segments.shard(index)
        gone = dataset.deletions.rows(shard.uid).size
        share = deleted_tokens(dataset, shard) / shard.tokens if shard.tokens else gone / max(1, shard.documents)
        columns = [(column.name, column.dtype, column.width) for column in shard.layout.columns]
        yield Candidate(
            index=index,
            live_bytes=round(shard.size_bytes * (1 - share)),
            deleted=bool(gone),
            kind=f"{shard.dtype} {shard.layout.format} {columns}",
            decoded_bytes=round((1 - share) * _decoded_bytes(shard)),
        )


def _decoded_bytes(shard: ShardInfo) -> int:
    return decoded_bytes(
        [batch.stop - batch.start for batch in shard.layout.batches if shard.layout.format == "parquet"]
    )


def _commit(dataset: Dataset, groups: Sequence[Group], made: Sequence[Sequence[ShardInfo]]) -> Commit:
    """Commit that the shards `made` stand where the `groups` stood."""
    storage = dataset.storage
    new: dict[str, list[ShardInfo]] = {}
    for group, shards in zip(groups, made, strict=True):
        new |= {member.uid: [] for _, member in group.members}
        new[group.members[0][1].uid] = list(shards)

    def build(newest: Commit | None) -> Commit:
        current = require_unchanged(dataset, newest, uids=new, operation="compact")
        commit = current.commit
        segments = replace_shards(storage, commit.segments, new)
        deletions = commit.deletions
        if not current.deletions.uids.isdisjoint(new):
            deletions = drop_deletions(storage, current.deletions, uids=new)
        return msgspec.structs.replace(
            draft_commit("compact", parent=commit),
            segments=segments,
            deletions=deletions,
            totals=sum_refs(segments, deletions),
            features=tuple(sorted(set(commit.features) - (set() if deletions else {DELETIONS}))),
        )

    try:
        return publish(storage, dataset.info, build)
    except ConflictError:
        remove_orphans(
            dataset,
            {
                each.uid: [file.key for file in files_of(shards, linked=True)]
                for group, shards in zip(groups, made, strict=True)
                for _, each in group.members
            },
        )
        raise
