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
from functools import partial

import msgspec
import numpy as np
import pyarrow as pa

from datastore.dataset.log.keys import DELETIONS
from datastore.dataset.log.manifest import Commit, sum_refs
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
    read_documents,
    read_token_table,
    remove_unused,
    shard_uid,
    store_records,
    write_record_shard,
    write_token_shard,
)
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.inventory import files_of
from datastore.dataset.shards.segment_changes import replace_shards
from datastore.dataset.snapshot import Dataset
from datastore.digest import digest_hex
from datastore.errors import ConfigError, ConflictError
from datastore.formats.arrow import array_of, numbers_of
from datastore.formats.joining import cut_to_fit, keep_rows
from datastore.formats.records import decoded_bytes, encode_parts
from datastore.formats.tokens import TokenTable, offsets_of
from datastore.threads import in_parallel
from datastore.units import Progress, telling

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


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbours that become one shard, or none if all is deleted, each with the number of its place."""

    members: Sequence[tuple[int, ShardInfo]]


def compact(
    target: DatasetLike,
    *,
    target_bytes: int = TARGET_BYTES,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> CompactReport:
    """Put small neighbouring shards of `target` together into shards of up to `target_bytes`, and drop deleted rows.

    A shard of at least half of that, of which nothing is deleted, stays as it is. The result makes a new version with
    the same documents in the same order, and shards of other uids: see above what that means for runs. `progress` gets
    the bytes of shards that were put together, and of all that will be.

    Raises:
        ConfigError: `target_bytes` is out of range, or the URL names a version.
        MissingError, CorruptError: a file is gone or damaged; nothing has changed.
        ConflictError: another operation changed the same shards meanwhile; nothing has changed.
    """
    if not 0 < target_bytes <= _LARGEST_TARGET:
        raise ConfigError("not a size for shards", target_bytes=target_bytes, hint="Choose `target_bytes` up to 1 GiB.")
    started = time.monotonic()
    dataset = open_for_change(target)
    with explain_expiry(dataset, operation="compact"):
        report = _compacted(dataset, target_bytes, progress, dry_run=dry_run)
    return replace(report, seconds=time.monotonic() - started)


def _compacted(dataset: Dataset, target_bytes: int, progress: Progress | None, *, dry_run: bool) -> CompactReport:
    groups = [
        _Group([(member.index, dataset.segments.shard(member.index)) for member in group])
        for group in group_members(_members(dataset, target_bytes), target_bytes=target_bytes)
    ]
    told = telling(groups, progress, size=lambda group: sum(shard.size_bytes for _, shard in group.members))
    made: Sequence[Sequence[ShardInfo]] = [] if dry_run else [_merged(dataset, group) for group in told]
    if not dry_run:  # Some do not go together after all.
        groups, made = _gains(dataset, groups, made)
    commit = _commit(dataset, groups, made) if made else dataset.commit
    members = [shard for group in groups for _, shard in group.members]
    emptied = sum(_live_rows(dataset, group) == 0 for group in groups)
    return CompactReport(
        url=dataset.url,
        version=commit.version,
        committed=commit is not dataset.commit,
        shards_before=len(dataset.segments),
        shards_after=len(dataset.segments) - len(members) + (len(groups) - emptied if dry_run else sum(map(len, made))),
        merged=len(members),
        dropped_documents=sum(dataset.deletions.rows(shard.uid).size for shard in members),
        dropped_tokens=sum(_deleted_tokens(dataset, shard) for shard in members),
        read_bytes=sum(shard.size_bytes + shard.docs_bytes for shard in members),
        written_bytes=sum(shard.size_bytes + shard.docs_bytes for shards in made for shard in shards),
    )


def _gains(
    dataset: Dataset, groups: Sequence[_Group], made: Sequence[Sequence[ShardInfo]]
) -> tuple[list[_Group], list[Sequence[ShardInfo]]]:
    """Return the groups that became fewer shards, or lost what is deleted, each with those; the other files are removed."""
    kept: list[tuple[_Group, Sequence[ShardInfo]]] = []
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
        share = _deleted_tokens(dataset, shard) / shard.tokens if shard.tokens else gone / max(1, shard.documents)
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


def _deleted_tokens(dataset: Dataset, shard: ShardInfo) -> int:
    spans = dataset.deletions.spans(shard.uid)
    return int((spans[:, 1] - spans[:, 0]).sum())


def _live_rows(dataset: Dataset, group: _Group) -> int:
    return sum(shard.documents - dataset.deletions.rows(shard.uid).size for _, shard in group.members)


def _merged(dataset: Dataset, group: _Group) -> list[ShardInfo]:
    """Store the shard that `group` becomes, mostly one; the same members give the same."""
    if not _live_rows(dataset, group):
        return []
    names = [
        f"{shard.uid} {shard.digest.hex()} {digest_hex(dataset.deletions.rows(shard.uid).astype('<i4').tobytes())}"
        for _, shard in group.members
    ]
    uid = digest_hex("\n".join(["compact", *names]).encode())
    if dataset.kind == "records":
        return _merged_records(dataset, group, uid)
    return [_merged_tokens(dataset, group, uid)]


def _merged_records(dataset: Dataset, group: _Group, uid: str) -> list[ShardInfo]:
    indices = [index for index, _ in group.members]
    if group.members[0][1].layout.format == "parquet":
        # What is small in a file may be large in memory: batch by batch.
        encoded = encode_parts(_live_batches(dataset, indices))
        return [store_records(dataset.storage, encoded, uid=uid, schema=dataset.schema, format="parquet")]
    whole = pa.concat_tables(in_parallel(dataset.live_records, indices))
    return [
        write_record_shard(dataset.storage, uid=uid if not part else shard_uid(uid, part), table=table)
        for part, table in enumerate(cut_to_fit(whole))
    ]


def _live_batches(dataset: Dataset, indices: Sequence[int]) -> Iterator[pa.Table]:
    """Yield the rows of some shards that are not deleted, some megabytes at a time; one is read ahead."""

    def places() -> Iterator[tuple[int, int | None]]:
        for index in indices:
            batches = len(dataset.segments.shard(index).layout.batches)
            yield from ((index, batch) for batch in range(batches) or [None])

    def read(place: tuple[int, int | None]) -> tuple[int, pa.Table]:
        index, batch = place
        if batch is None:  # It was written before batches had ranges.
            return index, dataset.record_shard(index)
        return index, pa.Table.from_batches([dataset.read_batch(index, batch)])

    shard, row = -1, 0
    for index, table in in_parallel(read, places(), threads=1):
        row = row if index == shard else 0
        shard, live = index, dataset.live_rows(index)
        kept = table if live is None else keep_rows(table, live[row : row + table.num_rows])
        row += table.num_rows
        if kept.num_rows:
            yield kept


def _merged_tokens(dataset: Dataset, group: _Group, uid: str) -> ShardInfo:
    shards = [shard for _, shard in group.members]
    total = sum(shard.tokens - _deleted_tokens(dataset, shard) for shard in shards)
    values = np.empty(total, shards[0].dtype)
    columns = {
        column.name: np.empty((total, column.width) if column.width > 1 else total, column.dtype)
        for column in shards[0].layout.columns
    }
    at = 0
    documents = []
    for table, rows in in_parallel(partial(_live, dataset), shards):
        part = slice(at, at + table.values.size)
        values[part] = table.values
        for name, column in table.columns.items():
            columns[name][part] = column
        documents.append(rows)
        at = part.stop
    merged = pa.concat_tables(documents)
    offsets = offsets_of(numbers_of(merged.column("tokens")))
    return write_token_shard(
        dataset.storage, uid=uid, values=values, offsets=offsets, documents=merged, columns=columns
    )


def _live(dataset: Dataset, shard: ShardInfo) -> tuple[TokenTable, pa.Table]:
    """Return the tokens of a shard and their documents, without what is deleted."""
    table = read_token_table(dataset.storage, shard)
    documents = read_documents(dataset.storage, shard)
    rows = dataset.deletions.rows(shard.uid)
    if not rows.size:
        return table, documents
    kept = np.ones(shard.documents, np.bool_)
    kept[rows] = False
    tokens = np.repeat(kept, np.diff(table.offsets))
    columns = {name: column[tokens] for name, column in table.columns.items()}
    # Their offsets are not needed: the documents say how many tokens each has.
    return TokenTable(values=table.values[tokens], offsets=table.offsets, columns=columns), documents.filter(
        array_of(kept)
    )


def _commit(dataset: Dataset, groups: Sequence[_Group], made: Sequence[Sequence[ShardInfo]]) -> Commit:
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
