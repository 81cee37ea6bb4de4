"""The blocks of stored files: each checked against its digest without trusting any other, and made again where it is wrong.

A file of this machine is opened once and read into one buffer; everything else is asked for block by block.

A file is made again from what is left of it: good blocks of any of its copies, and parity for the rest. Parity works position by position, so a block can be made again if no other file of the group is damaged at the same
place; two damaged files of a group may both come back. Nothing is returned but bytes that have the file's digest.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from datastore.dataset.durability.parity import Bytes, mix
from datastore.dataset.shards.inventory import StoredFile, files_of_group
from datastore.dataset.shards.parity_groups import Group
from datastore.digest import digest_bytes
from datastore.errors import ConfigError, DatastoreError, MissingError, StorageError
from datastore.storage.base import Storage
from datastore.storage.errors import explain, too_short

__all__ = [
    "BadBlock",
    "Draw",
    "Rebuilder",
    "Rebuilt",
    "Room",
    "check_blocks",
    "check_copies",
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


def check_blocks(storage: Storage, file: StoredFile, *, chosen: Sequence[int], room: Room) -> list[BadBlock]:
    """Return those of the blocks `chosen` that are missing, unreadable or wrong; read through `room`, one at a time.

    That the file has the size it should have is checked, too.
    """
    if not file.sound:
        return [BadBlock(file.key, None, "its digests do not match its size")]
    try:
        with _opened(storage, file.key) as (found_bytes, read):
            bad = []
            if found_bytes != file.size_bytes:
                fact = f"the file has {found_bytes} bytes, not {file.size_bytes}"
                bad.append(BadBlock(file.key, None, fact))
            there = [block for block in chosen if file.end_of(block) <= found_bytes]
            bad += [BadBlock(file.key, block, "the file ends before") for block in chosen[len(there) :]]
            return bad + list(_bad_blocks(file, there, read, room))
    except MissingError:
        return [BadBlock(file.key, None, "the file is missing")]
    except (ConfigError, StorageError) as error:  # A key that no storage takes is a file that cannot be read.
        return [BadBlock(file.key, None, error.fact)]


def check_copies(storage: Storage, file: StoredFile, *, chosen: Sequence[int], room: Room) -> list[BadBlock]:
    """Return what `check_blocks` finds in all copies of the file, with the place of each if there are several."""
    try:
        copies = storage.copies(file.key)
    except ConfigError:  # A key that no storage takes: told below.
        copies = ()
    if len(copies) < 2:
        return check_blocks(storage, file, chosen=chosen, room=room)
    return [
        BadBlock(bad.path, bad.block, f"{bad.reason} (in {copy.url})")
        for copy in copies
        for bad in check_blocks(copy, file, chosen=chosen, room=room)
    ]


def _bad_blocks(file: StoredFile, chosen: Sequence[int], read: Read, room: Room) -> Iterator[BadBlock]:
    for block in chosen:
        start = block * file.block_bytes
        target = room.of(file.end_of(block) - start)
        try:
            read(start, target)
        except (MissingError, StorageError) as error:
            yield BadBlock(file.key, block, error.fact)
            continue
        if digest_bytes(target) != file.digest_of(block):
            yield BadBlock(file.key, block, "the bytes do not match their digest")


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
class Rebuilt:
    """The bytes of a file, or why there are none."""

    data: Bytes | None
    how: str


class Rebuilder:
    """Makes files again. `places` are all storages that may hold a copy of something."""

    def __init__(self, places: Sequence[Storage], *, files: Mapping[str, StoredFile], groups: Sequence[Group]) -> None:
        self._places = places
        self._files = files
        self._groups: dict[str, list[Group]] = {}
        for group in groups:
            for path in group.paths:
                self._groups.setdefault(path, []).append(group)

    def rebuild(self, file: StoredFile) -> Rebuilt:
        """Return all bytes of `file`; memory: its size, and a block of each other file of its group."""
        data = np.empty(file.size_bytes, np.uint8)
        parity = 0
        for block in range(len(file)):
            start, stop = block * file.block_bytes, file.end_of(block)
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

    def _copied(self, file: StoredFile, block: int, target: Bytes) -> bool:
        """Fill `target` with a good copy of a block; return whether there is one."""
        wanted = file.digest_of(block)
        for place in self._places:
            try:
                place.read_into(file.key, block * file.block_bytes, target.data)
            except DatastoreError:
                continue
            if digest_bytes(target.data) == wanted:
                return True
        return False

    def _mixed(self, file: StoredFile, block: int, target: Bytes) -> str:
        """Fill `target` with a block made from its group; return why that cannot be done, or ""."""
        groups = self._groups.get(file.key, [])
        if not groups:
            return "there is no good copy of it, and no parity"
        reason = ""
        for group in groups:
            reason = self._mixed_from(group, file, block, target)
            if not reason:
                return ""
        return reason

    def _mixed_from(self, group: Group, file: StoredFile, block: int, target: Bytes) -> str:
        start = block * file.block_bytes
        target[:] = 0
        for other in self._others(group, file.key):
            stop = min(start + target.size, other.size_bytes)
            if start < stop:
                part = self._range(other, start, stop)
                if part is None:
                    return f"there is no good copy of it, and {other.key} of its group is damaged at the same place"
                mix(target[: stop - start], part)
        wanted = file.digest_of(block)
        return "" if digest_bytes(target.data) == wanted else "its group does not give its bytes back"

    def _others(self, group: Group, path: str) -> Iterator[StoredFile]:
        for file in files_of_group(group):
            if file.key != path:
                yield self._files.get(file.key, file)

    def _range(self, file: StoredFile, start: int, stop: int) -> Bytes | None:
        """Return bytes `[start, stop)` of `file`, from blocks that are good; None if one is not."""
        size = file.block_bytes
        first, last = start // size, (stop - 1) // size
        found = np.empty(file.end_of(last) - first * size, np.uint8)
        for block in range(first, last + 1):
            at = (block - first) * size
            if not self._copied(file, block, found[at : file.end_of(block) - first * size]):
                return None
        return found[start - first * size : stop - first * size]
