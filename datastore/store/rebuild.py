"""One file made again from what is left of it: good blocks of any of its copies, and parity for the rest.

Parity works position by position, so a block can be made again if no other file of the group is damaged at the same
place; two damaged files of a group may both come back. Nothing is returned but bytes that have the file's digest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from datastore.dataset.durability.blocks import BadBlock, Blocks, Room, check_blocks
from datastore.dataset.durability.parity import Bytes, Group, Member, mix
from datastore.dataset.shards.segment_file import BLOCK_BYTES, ShardInfo
from datastore.digest import DIGEST_BYTES, digest_bytes
from datastore.errors import DatastoreError
from datastore.storage.base import Storage

__all__ = ["File", "Rebuilder", "Rebuilt", "files_of", "parity_file"]


@dataclass(frozen=True, slots=True)
class File:
    """A file as its manifest describes it: as blocks, and as a whole."""

    blocks: Blocks
    digest: bytes

    @property
    def path(self) -> str:
        """Its key."""
        return self.blocks.path

    def faults(self, place: Storage, room: Room) -> list[BadBlock]:
        """Return what is wrong with the copy at `place`."""
        return check_blocks(place, self.blocks, chosen=range(len(self.blocks)), room=room)


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """The bytes of a file, or why there are none."""

    data: Bytes | None
    how: str


def files_of(shards: Iterator[ShardInfo]) -> Iterator[File]:
    """Yield the files of `shards` that lie in the dataset itself."""
    for shard in shards:
        files = (
            (File(Blocks(shard.path, shard.size_bytes, shard.block_bytes, shard.block_digests), shard.digest)),
            _one_block(shard.docs_path, shard.docs_bytes, shard.docs_digest),
        )
        yield from (file for file in files if file.path and not file.path.startswith("/") and "://" not in file.path)


def parity_file(group: Group) -> File:
    """Return the parity file of `group`."""
    return File(Blocks(group.path, group.size_bytes, BLOCK_BYTES, group.block_digests), group.digest)


def _one_block(path: str, size_bytes: int, digest: bytes) -> File:
    return File(Blocks(path, size_bytes, max(1, size_bytes), digest if size_bytes else b""), digest)


class Rebuilder:
    """Makes files again. `places` are all storages that may hold a copy of something."""

    def __init__(self, places: Sequence[Storage], *, files: Mapping[str, File], groups: Sequence[Group]) -> None:
        self._places = places
        self._files = files
        self._groups: dict[str, list[Group]] = {}
        for group in groups:
            for path in (group.path, *(member.path for member in group.members)):
                self._groups.setdefault(path, []).append(group)

    def rebuild(self, file: File) -> Rebuilt:
        """Return all bytes of `file`; memory: its size, and a block of each other file of its group."""
        data = np.empty(file.blocks.size_bytes, np.uint8)
        parity = 0
        for block in range(len(file.blocks)):
            start, stop = block * file.blocks.block_bytes, file.blocks.end_of(block)
            target = data[start:stop]
            if self._copied(file, block, target):
                continue
            reason = self._mixed(file, block, target)
            if reason:
                return Rebuilt(None, reason)
            parity += 1
        if digest_bytes(data.data) != file.digest:
            return Rebuilt(None, "its blocks are right, but its digest is not")
        return Rebuilt(data, "made again from parity" if parity else "put together from its copies")

    def _copied(self, file: File, block: int, target: Bytes) -> bool:
        """Fill `target` with a good copy of a block; return whether there is one."""
        blocks = file.blocks
        wanted = blocks.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
        for place in self._places:
            try:
                place.read_into(blocks.path, block * blocks.block_bytes, target.data)
            except DatastoreError:
                continue
            if digest_bytes(target.data) == wanted:
                return True
        return False

    def _mixed(self, file: File, block: int, target: Bytes) -> str:
        """Fill `target` with a block made from its group; return why that cannot be done, or ""."""
        groups = self._groups.get(file.path, [])
        if not groups:
            return "there is no good copy of it, and no parity"
        reason = ""
        for group in groups:
            reason = self._mixed_from(group, file, block, target)
            if not reason:
                return ""
        return reason

    def _mixed_from(self, group: Group, file: File, block: int, target: Bytes) -> str:
        start = block * file.blocks.block_bytes
        target[:] = 0
        for other in self._others(group, file.path):
            stop = min(start + target.size, other.blocks.size_bytes)
            if start < stop:
                part = self._range(other, start, stop)
                if part is None:
                    return f"there is no good copy of it, and {other.path} of its group is damaged at the same place"
                mix(target[: stop - start], part)
        wanted = file.blocks.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]
        return "" if digest_bytes(target.data) == wanted else "its group does not give its bytes back"

    def _others(self, group: Group, path: str) -> Iterator[File]:
        if group.path != path:
            yield self._files.get(group.path) or parity_file(group)
        for member in group.members:
            if member.path != path:
                yield self._files.get(member.path) or _member_file(member)

    def _range(self, file: File, start: int, stop: int) -> Bytes | None:
        """Return bytes `[start, stop)` of `file`, from blocks that are good; None if one is not."""
        size = file.blocks.block_bytes
        first, last = start // size, (stop - 1) // size
        found = np.empty(file.blocks.end_of(last) - first * size, np.uint8)
        for block in range(first, last + 1):
            at = (block - first) * size
            if not self._copied(file, block, found[at : file.blocks.end_of(block) - first * size]):
                return None
        return found[start - first * size : stop - first * size]


def _member_file(member: Member) -> File:
    """Return a file that has left the version: its blocks are not known any more."""
    return _one_block(member.path, member.size_bytes, member.digest)
