"""Small neighbouring shards, put together: the shards that groups of them become, stored here or by other processes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from datastore.dataset.elsewhere import Crew, received, sent
from datastore.dataset.shards.files import (
    read_documents,
    read_token_table,
    shard_uid,
    store_records,
    write_record_shard,
    write_token_shard,
)
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.snapshot import Dataset
from datastore.digest import digest_hex
from datastore.engines.engine import Tell
from datastore.formats.arrow import array_of, numbers_of
from datastore.formats.joining import cut_to_fit, keep_rows
from datastore.formats.records import encode_parts
from datastore.formats.tokens import TokenTable, offsets_of
from datastore.threads import in_parallel
from datastore.units import Progress, telling

__all__ = ["Group", "deleted_tokens", "live_rows", "merge_all", "merge_members"]


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbours that become one shard, or none if all is deleted, each with the number of its place."""

    members: Sequence[tuple[int, ShardInfo]]


def merge_all(
    dataset: Dataset, groups: Sequence[Group], *, crew: Crew | None, progress: Progress | None
) -> list[list[ShardInfo]]:
    """Store the shards that `groups` become, and return them; by a `crew`, or else by this process, one after the other.

    `progress` gets the bytes of shards that were put together, and of all that will be.

    Raises:
        MissingError, CorruptError: a file is gone or damaged.
        StorageError: the storage failed.
    """
    total = sum(map(_size, groups))
    if crew is None:
        return [_merged(dataset, group) for group in telling(groups, progress, size=_size, total=total)]
    items = ((tuple(index for index, _ in group.members), {"shard": group.members[0][1].path}) for group in groups)
    answers = crew.spread(merge_members, items, answer=list[ShardInfo])
    made = dict(telling(answers, progress, size=lambda answer: _size(groups[answer[0]]), total=total))
    return [made[number] for number in range(len(groups))]


def merge_members(order: bytes, _: Tell) -> bytes:
    """Store the shards that the members of a group become, whose numbers are ordered."""
    dataset, members = received(order, tuple[int, ...])
    return sent(_merged(dataset, Group([(index, dataset.segments.shard(index)) for index in members])))


def _size(group: Group) -> int:
    return sum(shard.size_bytes for _, shard in group.members)


def _merged(dataset: Dataset, group: Group) -> list[ShardInfo]:
    """Store the shard that `group` becomes, mostly one; the same members give the same."""
    if not live_rows(dataset, group):
        return []
    names = [
        f"{shard.uid} {shard.digest.hex()} {digest_hex(dataset.deletions.rows(shard.uid).astype('<i4').tobytes())}"
        for _, shard in group.members
    ]
    uid = digest_hex("\n".join(["compact", *names]).encode())
    if dataset.kind == "records":
        return _merged_records(dataset, group, uid)
    return [_merged_tokens(dataset, group, uid)]


def _merged_records(dataset: Dataset, group: Group, uid: str) -> list[ShardInfo]:
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


def _merged_tokens(dataset: Dataset, group: Group, uid: str) -> ShardInfo:
    shards = [shard for _, shard in group.members]
    total = sum(shard.tokens - deleted_tokens(dataset, shard) for shard in shards)
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


def deleted_tokens(dataset: Dataset, shard: ShardInfo) -> int:
    """Return how many tokens of `shard` are deleted."""
    spans = dataset.deletions.spans(shard.uid)
    return int((spans[:, 1] - spans[:, 0]).sum())


def live_rows(dataset: Dataset, group: Group) -> int:
    """Return how many rows of `group` are not deleted."""
    return sum(shard.documents - dataset.deletions.rows(shard.uid).size for _, shard in group.members)
