"""The contract of whatever hands out tokens block by block.

Promises:

1. A block is handed out only after its bytes had the digest that the manifest records.
2. While a block is held it stays: its tokens can be read, and are right.
3. A block that cannot be had right is an error that names the file and the block; nothing wrong is ever handed out.

Ranks share nothing: there is no lock, no shared memory and no file between processes.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from datastore.cache.layout import I64, BlockLayout, BlockRange
from datastore.dataset.shards.segment_file import ShardInfo
from datastore.errors import CorruptError

__all__ = ["BlockStats", "TokenBlocks", "damaged"]


@dataclass(frozen=True, slots=True)
class BlockStats:
    """What happened so far; sizes in bytes."""

    hits: int = 0
    """Blocks asked for that were there already."""

    fills: int = 0
    """Blocks read and checked."""

    filled_bytes: int = 0
    refetches: int = 0
    """Fills repeated because the first bytes were wrong."""

    evictions: int = 0
    resident_bytes: int = 0
    """Memory in use now, with what is being fetched; 0 for mapped files, whose memory is the kernel's."""

    peak_bytes: int = 0


class TokenBlocks(Protocol):
    """The tokens of a dataset, block by block. Thread-safe; not to be used in a forked child."""

    @property
    def layout(self) -> BlockLayout:
        """The numbering of blocks."""
        ...

    @property
    def budget_bytes(self) -> int | None:
        """How much can be held at once; None if there is no limit."""
        ...

    def hold(self, blocks: I64) -> AbstractContextManager[None]:
        """Return a context within which `blocks` (in any order, repeats allowed) are there.

        Raises:
            CorruptError: a block is damaged; the message names shard and block.
            MissingError: a shard's file is gone.
            StorageError: the storage failed.
            ConfigError: `blocks` need more than `budget_bytes`.
        """
        ...

    def absent(self, blocks: I64) -> I64:
        """Return those of `blocks` that are not there, without waiting."""
        ...

    def fetch(self, block: int) -> bool:
        """Bring one block ahead of its use, if there is room; return whether it is there now.

        Raises:
            DatastoreError: as `hold`.
        """
        ...

    def tokens(self, shard: int) -> memoryview:
        """Return the flat tokens of a shard, read-only, one item per token; only those in held blocks are there."""
        ...

    def data(self, shard: int) -> memoryview:
        """Return the bytes of a shard's file, read-only; only those of held blocks are there."""
        ...

    def expect(self, batches: Sequence[I64]) -> None:  # noqa: ARG002 - the protocol
        """Take note of the blocks of batches to come, in order, after those told before; a cache may ignore it."""
        return

    def passed(self) -> None:
        """Take note that the first of the batches told was delivered."""
        return

    def forget(self) -> None:
        """Expect none of the batches told any more."""
        return

    def stats(self) -> BlockStats:
        """Return counts since the start."""
        ...

    def close(self) -> None:
        """Give back all memory. Views handed out stay valid for as long as they are referred to."""
        ...


def damaged(fact: str, *, shard: ShardInfo, block: BlockRange, **values: object) -> CorruptError:
    """Return the error for a block that cannot be had right."""
    return CorruptError(
        fact,
        shard=shard.path,
        block=block.index,
        bytes=f"{block.start}-{block.stop}",
        **values,
        hint="Restore this file from a copy; `datastore verify` lists all that is damaged.",
    )
