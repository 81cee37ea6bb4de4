"""The blocks of stored files, each checked against its digest without trusting any other: all of them, or some drawn.

A file of this machine is opened once and read into one buffer; everything else is asked for block by block.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from datastore.digest import DIGEST_BYTES, digest_bytes
from datastore.errors import ConfigError, MissingError, StorageError
from datastore.storage.base import Storage
from datastore.storage.reasons import explain, too_short

__all__ = ["BadBlock", "Blocks", "Draw", "Room", "check_blocks", "check_copies"]

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
