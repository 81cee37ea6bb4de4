"""The disk under the memory: blocks of datasets that lie elsewhere, kept in a folder that the ranks of a machine share.

It is a help and never a need. What is not there is fetched; what is there and wrong is removed, and fetched; a disk that is full or
fails is left alone for a minute, and one line of the log says so. Nothing that happens here ends a run, and no run waits for
another for more than a second.

Promises:

1. The files of all blocks, those that are being written with them, are never larger than `budget_bytes` together, whoever writes.
2. Bytes are handed out only if they have the digest that the manifest records, each time that they are read.
3. A process that is killed leaves nothing that another has to wait for, and no file that stays.

What is evicted, if there is no room: of this dataset what is needed last, as far as the order of its samples is known, and otherwise
what was used least recently. Datasets that nobody has read for an hour go first; others give up the same fraction of theirs, so
two runs on one folder share it. A sixteenth of the budget is freed at a time, for all files are looked at to choose.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from datastore.digest import digest_bytes
from datastore.loader.cache.folder import CachedBlock, CacheFolder, Ledger

__all__ = ["DiskStats", "DiskTier", "NextUses", "batch_name", "block_name"]

_LOGGER = logging.getLogger(__name__)

_PAUSE_S = 60.0
"""After a failed write nothing is written for so long."""

_IDLE_NS = 3600 * 10**9

_FREED = 16
"""At least this fraction of the budget is freed at a time."""

NextUses = Callable[[Sequence[str]], Sequence[int]]
"""Says of blocks of a dataset, by their names, when each is needed next: the larger the number, the later."""


@dataclass(frozen=True, slots=True)
class DiskStats:
    """What happened so far in this process; sizes in bytes."""

    disk_hits: int = 0
    """Blocks that were read from the disk instead of from where the dataset lies."""

    disk_hit_bytes: int = 0
    disk_writes: int = 0
    disk_write_bytes: int = 0
    disk_evictions: int = 0
    """Blocks that had to go, those of other datasets as well."""

    disk_corrupt: int = 0
    """Blocks whose file was wrong; each was removed."""


def block_name(uid: str, index: int) -> str:
    """Return what block number `index` of a shard of tokens is called."""
    return f"{uid}-b{index}"


def batch_name(uid: str, index: int) -> str:
    """Return what batch number `index` of a shard of records is called."""
    return f"{uid}-r{index}"


class DiskTier:
    """The blocks of the dataset `uuid` (at `url`) in the folder `root`. Thread-safe.

    Unless it `evicts`, nothing is written once the budget is used up.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """

    def __init__(self, root: Path, *, budget_bytes: int, uuid: str, url: str, evicts: bool = True) -> None:
        self._folder = CacheFolder(root)
        self._folder.make()
        self._budget_bytes = budget_bytes
        self._uuid, self._url = uuid, url
        self._evicts = evicts
        self.is_full = False
        """Whether something was not written: there was no room, and nothing was to go; or the disk failed."""
        self.next_uses: NextUses | None = None
        """When blocks of this dataset are needed next; None: nobody knows."""
        self._counts = threading.Lock()
        self._stats = DiskStats()
        self._counted = False
        """Whether this process has counted the files: an earlier one may have been killed."""
        self._paused_until = 0.0
        self._warned = False

    def read(self, name: str, target: memoryview, *, digest: bytes) -> bool:
        """Fill `target` with a block; return whether it is there and right."""
        path = self._folder.path(self._uuid, name)
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            whole = _fill(file, target)
            with suppress(OSError):  # It may belong to another user.
                os.utime(file)
        except OSError:
            whole = False
        finally:
            os.close(file)
        if whole and digest_bytes(target) == digest:
            self._count(disk_hits=1, disk_hit_bytes=len(target))
            return True
        with suppress(OSError):
            Path(path).unlink()
            self._count(disk_corrupt=1)
        return False

    def write(self, name: str, data: memoryview) -> bool:
        """Keep a block whose digest is right; return whether it was written."""
        if len(data) > self._budget_bytes or time.monotonic() < self._paused_until:
            return False
        try:
            with self._folder.locked() as ledger:
                written = ledger is not None and self._store(ledger, name, data)
        except OSError as error:
            self._step_aside(error)
            return False
        if written:
            self._count(disk_writes=1, disk_write_bytes=len(data))
        return written

    def has(self, name: str) -> bool:
        """Return whether there is a file for a block, right or wrong."""
        return Path(self._folder.path(self._uuid, name)).exists()

    def stats(self) -> DiskStats:
        """Return the counts."""
        with self._counts:
            return self._stats

    def _store(self, ledger: Ledger, name: str, data: memoryview) -> bool:
        if self.has(name):  # Another rank has fetched it, too.
            return False
        if not self._counted:
            ledger.used_bytes = sum(block.size_bytes for block in self._folder.count())
            self._counted = True
        used = ledger.used_bytes
        if used + len(data) > self._budget_bytes:
            if not self._evicts:
                self.is_full = True
                return False
            used = self._make_room(ledger, len(data))
        # Before there is a byte of it: a process that is killed has counted too much, never too little.
        ledger.used_bytes = used + len(data)
        try:
            self._folder.put(self._uuid, name, data, url=self._url)
        except BaseException:
            _undo(ledger, used)
            raise
        return True

    def _make_room(self, ledger: Ledger, size_bytes: int) -> int:
        """Evict until `size_bytes` fit, and return how many bytes are there then."""
        blocks = self._folder.count()
        used = sum(block.size_bytes for block in blocks)
        if used + size_bytes <= self._budget_bytes:
            return used
        bound = self._budget_bytes - max(size_bytes, self._budget_bytes // _FREED)
        gone = 0
        for block in self._by_turn(blocks):
            if used <= bound:
                break
            self._folder.remove(block)
            used -= block.size_bytes
            gone += 1
            ledger.used_bytes = used
        self._count(disk_evictions=gone)
        return used

    def _by_turn(self, blocks: list[CachedBlock]) -> list[CachedBlock]:
        """Return all blocks, what is to go first at the front."""
        now_ns = time.time_ns()
        turns: list[tuple[float, int, CachedBlock]] = []
        for uuid in {block.dataset for block in blocks}:
            mine = sorted((block for block in blocks if block.dataset == uuid), key=lambda block: block.used_ns)
            idle = uuid != self._uuid and mine[-1].used_ns < now_ns - _IDLE_NS
            if uuid == self._uuid and self.next_uses is not None:
                uses = self.next_uses([block.name for block in mine])
                mine = [mine[at] for at in sorted(range(len(mine)), key=lambda at: -uses[at])]
            turns += [(-1.0 if idle else at / len(mine), block.used_ns, block) for at, block in enumerate(mine)]
        return [block for _, _, block in sorted(turns, key=lambda turn: turn[:2])]

    def _step_aside(self, error: OSError) -> None:
        """Write nothing for a while, and say so the first time."""
        self.is_full = True
        self._paused_until = time.monotonic() + _PAUSE_S
        if self._warned:
            return
        self._warned = True
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        _LOGGER.warning(
            "%s (cache_dir=%r, reason=%r). Blocks are fetched without it; it is tried again every %d s.",
            "the disk of the cache is full" if full else "the cache on disk cannot be written",
            str(self._folder.root),
            error.strerror or str(error),
            _PAUSE_S,
        )

    def _count(self, **more: int) -> None:
        with self._counts:
            old = asdict(self._stats)
            self._stats = replace(self._stats, **{name: old[name] + count for name, count in more.items()})


def _undo(ledger: Ledger, used_bytes: int) -> None:
    """Take back what was counted for a file that did not come to be."""
    ledger.used_bytes = used_bytes


def _fill(file: int, target: memoryview) -> bool:
    """Fill `target` from the start of a file; return whether it has exactly as many bytes."""
    if os.fstat(file).st_size != len(target):
        return False
    while target:
        count = os.readv(file, [target])
        if not count:
            return False
        target = target[count:]
    return True
