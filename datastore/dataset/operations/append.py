"""Shards become visible: one commit names them all, or none of them.

Shards are written first and nobody sees them. A commit on top of another writer's rebases: shards are appended in
the order of the commits, and nothing that is there is touched, small segments at the end of the list apart, which
are merged so that their number stays logarithmic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import pyarrow as pa

from datastore.dataset.log.commits import StoredCommit
from datastore.dataset.log.identity import create_dataset
from datastore.dataset.log.keys import LAYOUT, commit_key
from datastore.dataset.log.manifest import Commit, DatasetInfo, Kind, SegmentRef, TokenizerRef, sum_refs
from datastore.dataset.operations.transaction import draft_commit, publish
from datastore.dataset.shards.info import PLAIN, ColumnLayout, ShardInfo
from datastore.dataset.shards.segment_changes import append_shards, keep_segments, recent_segments
from datastore.dataset.shards.segments import Loaded, load_segments
from datastore.errors import ConfigError, ConflictError
from datastore.formats.schema import decode_schema, encode_schema
from datastore.storage.base import Storage

__all__ = ["Opened", "Operation", "add_shards", "commit_records", "commit_shards", "with_shards"]

Operation = Literal["append", "overwrite"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A dataset as it was a moment ago: to be added to without looking first."""

    info: DatasetInfo
    newest: StoredCommit


def commit_shards(
    storage: Storage,
    shards: Sequence[ShardInfo],
    *,
    operation: Operation = "append",
    ingest_id: str = "",
    tokenizer: TokenizerRef | None = None,
    config_digest: str = "",
) -> Commit:
    """Make token shards, already written, part of the dataset in `storage`; return the version that has them.

    The dataset is created if it is not there. An append skips shards that the newest version has; if nothing is
    left, there is nothing to commit, and the newest version is returned: the same call twice adds nothing.

    Raises:
        ConfigError: the shards or the tokenizer do not go together with what is there, or the place holds something else.
        ConflictError: a shard has the uid but not the bytes of one that is there; or as `CommitLog.append`.
        StorageError: the storage failed; nothing has changed.
    """
    draft = draft_commit(operation, ingest_id=ingest_id, config_digest=config_digest)
    return add_shards(storage, shards, msgspec.structs.replace(draft, kind="tokens", tokenizer=tokenizer))


def commit_records(
    storage: Storage,
    shards: Sequence[ShardInfo],
    *,
    schema: pa.Schema,
    operation: Operation = "append",
    ingest_id: str = "",
    config_digest: str = "",
) -> Commit:
    """Make record shards, already written with `schema`, part of the dataset; otherwise as `commit_shards`."""
    draft = draft_commit(operation, ingest_id=ingest_id, config_digest=config_digest)
    draft = msgspec.structs.replace(draft, kind="records", record_schema=encode_schema(schema))
    return add_shards(storage, shards, draft)


def add_shards(
    storage: Storage,
    shards: Sequence[ShardInfo],
    draft: Commit,
    *,
    base: Callable[[Commit], Commit] = lambda newest: newest,
    settle: Callable[[], None] = lambda: None,
    opened: Opened | None = None,
) -> Commit:
    """Make `shards` part of the dataset as `draft` says; otherwise as `commit_shards` and `commit_records`.

    `base` is given each version that the new one would follow, again whenever another writer was faster, and returns what
    of it the new one keeps: all, or with more deletions, and is then a `replace`. `settle` is called before anything is committed: it returns when the files of the shards are there. What either raises ends the
    commit; nothing has changed. Whoever has `opened` the dataset a moment ago need not wait for that again.
    """
    _check_alike(shards, draft.kind)
    info = opened.info if opened else create_dataset(storage)
    loaded = recent_segments()  # Who must build again, since another writer was faster, has most of them, too.

    def build(newest: Commit | None) -> Commit:
        built = follow(newest)
        settle()
        return built

    def follow(newest: Commit | None) -> Commit:
        if newest is None:
            draft_of_first = msgspec.structs.replace(draft, operation="create")
            return with_shards(storage, draft_of_first, kept=(), shards=shards, loaded=loaded)
        based = base(newest)
        if draft.operation == "overwrite":
            whole = msgspec.structs.replace(draft, min_version=newest.min_version)
            return with_shards(storage, whole, kept=(), shards=shards)
        _check_fits(storage, newest, draft)
        fresh = _without_present(storage, newest, shards, loaded)
        if not fresh:
            return newest
        operation = "append" if based is newest else "replace"
        added = draft_commit(operation, parent=based, ingest_id=draft.ingest_id, config_digest=draft.config_digest)
        return with_shards(storage, added, kept=newest.segments, shards=fresh, loaded=loaded)

    commit = publish(storage, info, build, seen=opened.newest if opened else None)
    keep_segments(commit, loaded)
    return commit


def _check_alike(shards: Sequence[ShardInfo], kind: Kind) -> None:
    """Refuse shards that no version can have together."""
    if len({shard.uid for shard in shards}) != len(shards):
        raise ConfigError("the same shard is given twice", hint="Give each task its own id.")
    if any(shard.kind != kind for shard in shards):
        raise ConfigError("shards of another kind", kind=kind, hint="Commit tokens and records separately.")
    if len({_columns_of(shard.layout.columns) for shard in shards}) > 1:
        raise ConfigError("shards with different columns", hint="Give each token of a dataset the same columns.")


def with_shards(
    storage: Storage,
    draft: Commit,
    *,
    kept: Sequence[SegmentRef],
    shards: Sequence[ShardInfo],
    loaded: Loaded | None = None,
) -> Commit:
    """Return `draft` with `shards` after those of `kept`, its totals and features made to fit; its deletions stay."""
    segments = append_shards(storage, kept, shards, loaded=loaded)
    layout = {LAYOUT} if any(shard.layout != PLAIN for shard in shards) else set()
    return msgspec.structs.replace(
        draft,
        segments=segments,
        totals=sum_refs(segments, draft.deletions),
        features=tuple(sorted({*draft.features, *layout})),
    )


def _check_fits(storage: Storage, newest: Commit, draft: Commit) -> None:
    """Refuse to append what readers of the dataset could not read together with what is there."""
    if newest.kind != draft.kind:
        raise ConfigError(
            f"the dataset holds {newest.kind}, not {draft.kind}",
            url=storage.url,
            hint="Name another URL, or replace all that it holds: `operation=overwrite`.",
        )
    if newest.tokenizer != draft.tokenizer:
        raise ConfigError(
            "the tokenizer is not the one of the dataset",
            url=storage.url,
            dataset=newest.tokenizer.sha256[:16] if newest.tokenizer else None,
            given=draft.tokenizer.sha256[:16] if draft.tokenizer else None,
            hint="Use the dataset's tokenizer, or name another URL.",
        )
    if newest.kind == "records":
        _check_schema(
            storage,
            decode_schema(newest.record_schema, where=commit_key(newest.version)),
            decode_schema(draft.record_schema),
        )


def _check_schema(storage: Storage, stored: pa.Schema, given: pa.Schema) -> None:
    # With all that is noted in them: rows of a schema from before a change do not say which columns they have.
    if not stored.equals(given, check_metadata=True):
        raise ConfigError(
            "the records have another schema than the dataset has now",
            url=storage.url,
            dataset=stored.names,
            given=given.names,
            hint="Write the rows again with the dataset's schema, which may have changed meanwhile; or name another URL.",
        )


def _columns_of(layouts: Sequence[ColumnLayout]) -> tuple[tuple[str, str, int], ...]:
    return tuple((layout.name, layout.dtype, layout.width) for layout in layouts)


def _without_present(storage: Storage, newest: Commit, shards: Sequence[ShardInfo], loaded: Loaded) -> list[ShardInfo]:
    """Return those of `shards` that `newest` does not have."""
    segments = load_segments(storage, newest, loaded=loaded)
    if (
        newest.kind == "tokens"
        and len(segments)
        and shards
        and _columns_of(segments.columns) != _columns_of(shards[0].layout.columns)
    ):
        raise ConfigError(
            "the tokens have other columns beside them than the dataset's",
            url=storage.url,
            dataset=[column[0] for column in _columns_of(segments.columns)],
            given=[column[0] for column in _columns_of(shards[0].layout.columns)],
            hint="Write the same columns, of the same types, or name another URL.",
        )
    present = segments.digests_of([shard.uid for shard in shards])
    for shard in shards:
        if present.get(shard.uid, shard.digest) != shard.digest:
            raise ConflictError(
                "a shard of that uid is there with other bytes",
                uid=shard.uid,
                hint="One task id must stand for one input; ingest under another id.",
            )
    return [shard for shard in shards if shard.uid not in present]
