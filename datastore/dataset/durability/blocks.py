"""The blocks of stored files, each checked against its digest without trusting any other: all of them, or some drawn.

A file of this machine is opened once and read into one buffer; everything else is asked for block by block.

One file made again from what is left of it: good blocks of any of its copies, and parity for the rest.

Parity works position by position, so a block can be made again if no other file of the group is damaged at the same
place; two damaged files of a group may both come back. Nothing is returned but bytes that have the file's digest.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from datastore.dataset.durability.parity import Bytes, mix
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.parity_groups import Group, Member
from datastore.dataset.shards.segment_file import BLOCK_BYTES
from datastore.digest import DIGEST_BYTES, digest_bytes
from datastore.errors import ConfigError, DatastoreError, MissingError, StorageError
from datastore.storage.base import Storage
from datastore.storage.errors import explain, too_short

__all__ = [
    "BadBlock",
    "Blocks",
    "Draw",
    "File",
    "Rebuilder",
    "Rebuilt",
    "Room",
    "check_blocks",
    "check_copies",
    "files_of",
    "parity_file",
]

Read = Callable[[int, memoryview], None]
"""Fills the target with the bytes from a position on, or raises MissingError or StorageError."""


@dataclass(frozen=True, slots=True)
class BadBlock:
    """A stretch of a file that is not what was written."""

    path: str
    block: int | None
    """Its number; None if the file as a whole is meant."""

    reason: str


@dataclass(frozen=True, slots=True)
class Blocks:
    """A file as its manifest describes it."""

    path: str
    size_bytes: int
    block_bytes: int
    digests: bytes
    """xxh3_128 of each block, end to end; the last block may be shorter."""

    def __len__(self) -> int:
        return (self.size_bytes + self.block_bytes - 1) // self.block_bytes

    @property
    def sound(self) -> bool:
        """Whether there is a digest for each block."""
        return len(self.digests) == DIGEST_BYTES * len(self)

    def end_of(self, block: int) -> int:
        """Return where a block ends."""
        return min((block + 1) * self.block_bytes, self.size_bytes)

    def bytes_in(self, chosen: Sequence[int]) -> int:
        """Return how many bytes the blocks `chosen` have."""
        return sum(self.end_of(block) - block * self.block_bytes for block in chosen)


class Room(threading.local):
    """Memory to read into, one piece per thread, made anew only when more is asked for."""

    def __init__(self) -> None:
        self._bytes = memoryview(b"")

    def of(self, size_bytes: int) -> memoryview:
        """Return writable memory of `size_bytes`, which holds anything."""
        if len(self._bytes) < size_bytes:
            self._bytes = np.empty(size_bytes, np.uint8).data
        return self._bytes[:size_bytes]


class Draw:
    """Draws one of each `every` blocks in a row that it is shown, at random, and the same for the same seed.

    So the share holds for every stretch of a dataset, and no pattern in the sizes of its files goes unseen.
    """

    def __init__(self, every: float, *, seed: int) -> None:
        self.seen = 0
        """Blocks shown so far."""
        self.drawn = 0
        self.every = every
        self._random = np.random.default_rng(seed)
        self._row = 0
        self._next = -1
        self._advance()

    def of(self, count: int) -> Sequence[int]:
        """Return which of the next `count` blocks are drawn, in order."""
        start, self.seen = self.seen, self.seen + count
        if self.every <= 1:
            self.drawn += count
            return range(count)
        found = []
        while self._next < self.seen:
            found.append(self._next - start)
            self._advance()
        self.drawn += len(found)
        return found

    def _advance(self) -> None:
        self._next = max(self._next + 1, int((self._row + self._random.random()) * self.every))
        self._row += 1


def check_blocks(storage: Storage, blocks: Blocks, *, chosen: Sequence[int], room: Room) -> list[BadBlock]:
    """Return those of the blocks `chosen` that are missing, unreadable or wrong; read through `room`, one at a time.

    That the file has the size it should have is checked, too.
    """
    if not blocks.sound:
        return [BadBlock(blocks.path, None, "its digests do not match its size")]
    try:
        with _opened(storage, blocks.path) as (found_bytes, read):
            bad = []
            if found_bytes != blocks.size_bytes:
                fact = f"the file has {found_bytes} bytes, not {blocks.size_bytes}"
                bad.append(BadBlock(blocks.path, None, fact))
            there = [block for block in chosen if blocks.end_of(block) <= found_bytes]
            bad += [BadBlock(blocks.path, block, "the file ends before") for block in chosen[len(there) :]]
            return bad + list(_bad_blocks(blocks, there, read, room))
    except MissingError:
        return [BadBlock(blocks.path, None, "the file is missing")]
    except (ConfigError, StorageError) as error:  # A key that no storage takes is a file that cannot be read.
        return [BadBlock(blocks.path, None, error.fact)]


def check_copies(storage: Storage, blocks: Blocks, *, chosen: Sequence[int], room: Room) -> list[BadBlock]:
    """Return what `check_blocks` finds in all copies of the file, with the place of each if there are several."""
    try:
        copies = storage.copies(blocks.path)
    except ConfigError:  # A key that no storage takes: told below.
        copies = ()
    if len(copies) < 2:
        return check_blocks(storage, blocks, chosen=chosen, room=room)
    return [
        BadBlock(bad.path, bad.block, f"{bad.reason} (in {copy.url})")
        for copy in copies
        for bad in check_blocks(copy, blocks, chosen=chosen, room=room)
    ]


def _bad_blocks(blocks: Blocks, chosen: Sequence[int], read: Read, room: Room) -> Iterator[BadBlock]:
    for block in chosen:
        start = block * blocks.block_bytes
        target = room.of(blocks.end_of(block) - start)
        try:
            read(start, target)
        except (MissingError, StorageError) as error:
            yield BadBlock(blocks.path, block, error.fact)
            continue
        if digest_bytes(target) != blocks.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
            yield BadBlock(blocks.path, block, "the bytes do not match their digest")


@contextmanager
def _opened(storage: Storage, path: str) -> Iterator[tuple[int, Read]]:
    """Yield the size of the file `path`, and how to read it."""
    local = storage.local_path(path)
    if local is None:
        yield storage.stat(path).size_bytes, lambda start, target: storage.read_into(path, start, target)
        return

    def read(start: int, target: memoryview) -> None:
        stop = start + len(target)
        while target:
            try:
                count = os.preadv(fd, [target], stop - len(target))
            except OSError as error:
                raise explain(error, key=path, url=storage.url) from None
            if not count:
                raise too_short(key=path, url=storage.url, wanted_bytes=stop)
            target = target[count:]

    try:
        fd = os.open(local, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise explain(error, key=path, url=storage.url) from None
    try:
        yield os.fstat(fd).st_size, read
    finally:
        os.close(fd)


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
