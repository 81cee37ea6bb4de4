"""Parity: one more file for each few, from which any one of them can be made again.

The parity file of a group is the XOR of its members (shards, or their documents files), each padded with zeros to the
longest; so is any member that of all the others and the parity file, position by position. It costs 1/k of the space
where `copies` cost all of it, and saves one file per group: members lie on different roots as far as there are roots.

Groups are written once and stand in a table that the commit names. New shards are unprotected until the next `protect`;
a group that a member has left, or that is not full, is made anew when there are new files for it.
"""

import heapq
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from datastore.dataset.log.manifest import Commit, ParityRef
from datastore.dataset.shards.segment_file import BLOCK_BYTES, ShardInfo
from datastore.digest import block_digests, digest_bytes, digest_hex, require_digest
from datastore.errors import CorruptError, MissingError, StorageError
from datastore.storage.base import Storage
from datastore.storage.verified import read_checked

__all__ = [
    "PARITY_SCHEMA",
    "Group",
    "Member",
    "choose_groups",
    "decode_groups",
    "drop_parity",
    "encode_groups",
    "load_groups",
    "members_of",
    "parity_keys",
    "parity_table_key",
    "store_groups",
    "write_group",
    "xor_files",
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

_FOLDER = "_parity"
_PIECE_BYTES = 4 * 2**20
"""Read, digested and mixed in at a time: 7 to 8 GB of files per CPU-second (AMD EPYC, 2026-11-25, tools/bench/redundancy)."""

_SALTS = 64
"""Names tried for a parity file, of which the one is taken that lies on another root than its members."""

Bytes = npt.NDArray[np.uint8]


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


def members_of(shards: Iterable[ShardInfo]) -> Iterator[Member]:
    """Yield the files of `shards` that lie in the dataset itself, and are not empty."""
    for shard in shards:
        for path, size_bytes, digest in (
            (shard.path, shard.size_bytes, shard.digest),
            (shard.docs_path, shard.docs_bytes, shard.docs_digest),
        ):
            if size_bytes and not path.startswith("/") and "://" not in path:
                yield Member(path, size_bytes, digest)


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
        path = f"parity/{name[:2]}/{name}.xor"
        shared = sum(taken.count(copy.url) for copy in storage.copies(path))
        if shared < fewest:
            best, fewest = path, shared
        if not shared:
            break
    return best


def parity_table_key(digest: str) -> str:
    """Return the key of the table of groups with that digest."""
    return f"{_FOLDER}/{digest}.arrow"


def encode_groups(groups: Sequence[Group]) -> bytes:
    """Return the file that holds `groups`."""
    columns = {
        name: [getattr(group, name) for group in groups] for name in ("path", "size_bytes", "digest", "block_digests")
    }
    for name, attribute in (("paths", "path"), ("bytes", "size_bytes"), ("digests", "digest")):
        columns[f"member_{name}"] = [[getattr(member, attribute) for member in group.members] for group in groups]
    table = pa.table(columns, schema=PARITY_SCHEMA)
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
    if any(
        size < 0 for group in groups for size in (group.size_bytes, *(member.size_bytes for member in group.members))
    ):
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
    for stat in storage.list(_FOLDER):
        digest = stat.key.removeprefix(f"{_FOLDER}/").removesuffix(".arrow")
        raw = read_checked(storage, stat.key, size_bytes=stat.size_bytes, digest=digest)
        keys.update(group.path for group in decode_groups(raw, where=stat.key) if covers(group))
    return tuple(refs), sorted(keys)
