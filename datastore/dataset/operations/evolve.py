"""Change the columns of a record dataset: one commit with another schema, no shard is touched.

Rows that are there are read as rows of the new schema: a column they lack has its default, or null; a narrower value is
widened. Older versions keep their own schema. Whoever writes rows of the old schema meanwhile is told so when he
commits, and two changes at once are done one after the other, each to what the other has left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pyarrow as pa

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.keys import EVOLUTION, commit_key
from datastore.dataset.log.manifest import Commit
from datastore.dataset.operations.transaction import DatasetLike, draft_commit, open_for_change, publish
from datastore.errors import ConfigError
from datastore.formats.evolution import DEFAULT, SchemaChange, changed, column_ids
from datastore.formats.records import check_format
from datastore.formats.schema import MEDIA_TYPE, SchemaLike, check_storable, decode_schema, encode_schema

__all__ = ["ColumnInfo", "describe", "evolve"]

"""What a reader has to know of a version whose shards may have an older schema."""


@dataclass(frozen=True, slots=True)
class ColumnInfo:
    """A column as people see it."""

    name: str
    type: str
    nullable: bool
    number: int
    """Tells it from a column that had its name before."""

    media_type: str | None
    default: str | None
    """What rows have that are older than it, as JSON; None for null."""


def describe(schema: pa.Schema) -> list[ColumnInfo]:
    """Return the columns of a record dataset's schema."""
    found = []
    for field, number in zip(schema, column_ids(schema), strict=True):
        notes = {key: value.decode() for key, value in (field.metadata or {}).items() if key in {MEDIA_TYPE, DEFAULT}}
        found.append(
            ColumnInfo(field.name, str(field.type), field.nullable, number, notes.get(MEDIA_TYPE), notes.get(DEFAULT))
        )
    return found


def evolve(
    target: DatasetLike,
    *,
    add: SchemaLike | None = None,
    defaults: Mapping[str, Any] | None = None,
    widen: "Mapping[str, str | pa.DataType | pa.Field[Any]] | None" = None,
    rename: Mapping[str, str] | None = None,
    drop: Sequence[str] = (),
) -> Commit:
    """Change the columns of the record dataset `target`: first `drop`, then `rename`, `widen`, `add`; return the version.

    Types are Arrow's, or texts as `parse_field` reads them. `defaults` are the values of added columns in the rows that
    are there; where none is given, it is null. A column that is dropped and added again starts empty. Given again, the
    last change is done already: nothing is committed, and the newest version returned.

    Raises:
        ConfigError: no change; a column is not there, or there twice; a type is not wider; a default does not fit.
        ConflictError, StorageError: as `CommitLog.append`; nothing has changed.
    """
    change = SchemaChange(
        drop=drop, rename=dict(rename or {}), widen=dict(widen or {}), add=add or {}, defaults=dict(defaults or {})
    )
    dataset = open_for_change(target)

    def build(newest: Commit | None) -> Commit:
        newest = newest or dataset.commit
        if newest.kind != "records":
            raise ConfigError(
                "only records have columns to change", url=dataset.url, kind=newest.kind, hint="Name a record dataset."
            )
        return newest if _is_done(dataset.log, newest, change) else _changed(newest, change)

    return publish(dataset.storage, dataset.info, build)


def _is_done(log: CommitLog, newest: Commit, change: SchemaChange) -> bool:
    """Return whether the last change of columns was this very one, and is still what rows are read as."""
    commit = newest
    while commit.operation != "evolve":
        if commit.version == 1 or EVOLUTION not in commit.features:
            return False
        commit = log.read(commit.version - 1)
    if commit.record_schema != newest.record_schema or commit.version == 1:
        return False
    try:
        return _changed(log.read(commit.version - 1), change).record_schema == newest.record_schema
    except ConfigError:
        return False


def _changed(newest: Commit, change: SchemaChange) -> Commit:
    before = decode_schema(newest.record_schema, where=commit_key(newest.version))
    schema = changed(before, change)
    if schema.equals(changed(before, SchemaChange()), check_metadata=True):
        raise ConfigError("that changes nothing", hint="Name a column to `add`, `widen`, `rename` or `drop`.")
    # What is there stays, also of types that are refused today.
    check_storable(pa.schema([each for each in schema if not any(each.type.equals(old.type) for old in before)]))
    check_format(schema, format="arrow")
    return msgspec.structs.replace(
        draft_commit("evolve", parent=newest),
        record_schema=encode_schema(schema),
        features=tuple(sorted({*newest.features, EVOLUTION})),
    )
