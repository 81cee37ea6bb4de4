"""The tables of parity groups: which files share a parity file, encoded, checked, stored and loaded."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from datastore.dataset.log.keys import PARITY_TABLES_FOLDER, parity_table_key, table_digest_in
from datastore.dataset.log.manifest import Commit, ParityRef
from datastore.digest import digest_hex
from datastore.errors import CorruptError
from datastore.formats.arrow import table_of
from datastore.storage.base import Storage
from datastore.storage.verified import read_checked

__all__ = [
    "PARITY_SCHEMA",
    "Group",
    "Member",
    "decode_groups",
    "drop_parity",
    "encode_groups",
    "load_groups",
    "parity_keys",
    "store_groups",
]

_TYPES: dict[str, pa.DataType] = {
    "path": pa.string(),
    "size_bytes": pa.int64(),
    "digest": pa.binary(16),
    "block_digests": pa.binary(),
    "member_paths": pa.list_(pa.field("item", pa.string(), nullable=False)),
    "member_bytes": pa.list_(pa.field("item", pa.int64(), nullable=False)),
    "member_digests": pa.list_(pa.field("item", pa.binary(16), nullable=False)),
}

PARITY_SCHEMA = pa.schema(pa.field(name, kind, nullable=False) for name, kind in _TYPES.items())
"""One row per group: its parity file, as a segment describes a shard's, and the files that it protects."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file that a group protects."""

    path: str
    size_bytes: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Group:
    """Some files, and the parity file that is the XOR of them."""

    path: str
    size_bytes: int
    digest: bytes
    block_digests: bytes
    """Of each `BLOCK_BYTES` of the parity file."""

    members: tuple[Member, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """Of its parity file and of what it protects."""
        return (self.path, *(member.path for member in self.members))


def encode_groups(groups: Sequence[Group]) -> bytes:
    """Return the file that holds `groups`."""
    columns: dict[str, list[object]] = {
        name: [getattr(group, name) for group in groups] for name in ("path", "size_bytes", "digest", "block_digests")
    }
    for name, attribute in (("paths", "path"), ("bytes", "size_bytes"), ("digests", "digest")):
        columns[f"member_{name}"] = [[getattr(member, attribute) for member in group.members] for group in groups]
    table = table_of((columns[name] for name in PARITY_SCHEMA.names), PARITY_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, PARITY_SCHEMA) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def decode_groups(raw: pa.Buffer, *, where: str) -> list[Group]:
    """Return the groups that a file holds; its digest is the caller's to check first.

    Raises:
        CorruptError: not an Arrow file with the columns of `PARITY_SCHEMA`.
    """
    try:
        table = pa.ipc.open_file(raw).read_all().select(PARITY_SCHEMA.names)
        table.validate(full=True)
        if not table.schema.equals(PARITY_SCHEMA):
            raise CorruptError("a column of parity groups has another type", where=where)
        groups = [_group(row) for row in table.to_pylist()]
    except (pa.ArrowException, OSError, KeyError, ValueError, MemoryError) as error:
        fact = f"not a table of parity groups: {error}"
        raise CorruptError(fact, where=where, hint="Restore this file from a copy.") from None
    if any(size < 0 for group in groups for size in (group.size_bytes, *(file.size_bytes for file in group.members))):
        raise CorruptError("a file of a parity group has less than no bytes", where=where)
    return groups


def _group(row: dict[str, object]) -> Group:
    members = zip(row["member_paths"], row["member_bytes"], row["member_digests"], strict=True)  # type: ignore[call-overload]
    return Group(
        path=str(row["path"]),
        size_bytes=int(row["size_bytes"]),  # type: ignore[call-overload]
        digest=row["digest"],  # type: ignore[arg-type]
        block_digests=row["block_digests"],  # type: ignore[arg-type]
        members=tuple(Member(*member) for member in members),
    )


def store_groups(storage: Storage, groups: Sequence[Group]) -> ParityRef:
    """Store a table of `groups`; return how a commit names it."""
    raw = encode_groups(groups)
    digest = digest_hex(raw)
    storage.put(parity_table_key(digest), raw)
    return ParityRef(
        digest=digest,
        file_bytes=len(raw),
        groups=len(groups),
        files=sum(len(group.members) for group in groups),
        size_bytes=sum(group.size_bytes for group in groups),
    )


def load_groups(storage: Storage, ref: ParityRef) -> list[Group]:
    """Return the groups of one table.

    Raises:
        MissingError, CorruptError: the table is gone or damaged.
    """
    key = parity_table_key(ref.digest)
    return decode_groups(read_checked(storage, key, size_bytes=ref.file_bytes, digest=ref.digest), where=key)


def parity_keys(storage: Storage, commit: Commit) -> Iterator[str]:
    """Yield the keys of all tables and parity files that `commit` refers to.

    Raises:
        MissingError, CorruptError: as `load_groups`.
    """
    for ref in commit.parity:
        yield parity_table_key(ref.digest)
        for group in load_groups(storage, ref):
            yield group.path


def drop_parity(storage: Storage, commit: Commit, paths: Collection[str]) -> tuple[tuple[ParityRef, ...], list[str]]:
    """Return the refs of `commit` without the groups that protect one of `paths`; and every parity file that does.

    A parity file and the other members give back the bytes of a file that was removed, so whoever removes them for
    good removes these, those of all versions: each table that is stored is looked through.

    Raises:
        CorruptError: a table is damaged.
    """
    gone = frozenset(paths)

    def covers(group: Group) -> bool:
        return any(member.path in gone for member in group.members)

    refs: list[ParityRef] = []
    for ref in commit.parity:
        groups = load_groups(storage, ref)
        kept = [group for group in groups if not covers(group)]
        if len(kept) == len(groups):
            refs.append(ref)
        elif kept:
            refs.append(store_groups(storage, kept))
    keys: set[str] = set()
    for stat in storage.list(PARITY_TABLES_FOLDER):
        digest = table_digest_in(stat.key)
        if digest is None:
            continue
        raw = read_checked(storage, stat.key, size_bytes=stat.size_bytes, digest=digest)
        keys.update(group.path for group in decode_groups(raw, where=stat.key) if covers(group))
    return tuple(refs), sorted(keys)
