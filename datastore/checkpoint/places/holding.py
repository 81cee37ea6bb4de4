"""A step in the memory of several ranks: what each of them holds, which step is there as a whole, and who is to hold what.

Part p lies with ranks p and p + 1 (counted round): with the rank that saved it, and with the next one. Documents are small, and each rank has
all of them. After a restore into fewer ranks the same rule says who holds the parts of the ranks there were.
"""

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from typing_extensions import override

from datastore.checkpoint.format.manifest import PartInfo, StepCommit, chunks_of
from datastore.checkpoint.places.peers import Move, Peers
from datastore.checkpoint.saving.snapshot import BufferPool
from datastore.digest import check_digest
from datastore.document import Count, Document, unseal
from datastore.errors import CorruptError, MissingError
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Stat, Storage
from datastore.storage.wrappers import WrappedStorage
from datastore.threads import each

__all__ = [
    "Found",
    "HeldPart",
    "HeldStep",
    "Holding",
    "SpreadStorage",
    "clear",
    "fetch_parts",
    "keepers",
    "newest_whole",
]


_THREADS = 2
"""Threads that hash what has arrived."""


class Holding(Document, frozen=True, kw_only=True):
    """What a rank says that it has of a step."""

    step: Count
    save_id: str
    written: tuple[Count, ...]
    """The ranks that saved a part."""

    held: tuple[Count, ...]
    """Those of them whose part is here."""


@dataclass(frozen=True, slots=True)
class HeldPart:
    """A part in memory that is taken from a pool."""

    data: torch.Tensor
    """[N] of uint8: the bytes of the part."""

    buffer: torch.Tensor
    pool: BufferPool

    @classmethod
    def new(cls, pool: BufferPool, size_bytes: int) -> "HeldPart":
        """Return a part of `size_bytes`, its content undefined."""
        buffer = pool.take(size_bytes)
        return cls(buffer[:size_bytes], buffer, pool)

    def release(self) -> None:
        """Give the memory back."""
        self.pool.give(self.buffer)


@dataclass(frozen=True, slots=True)
class HeldStep:
    """What this rank has of one step."""

    commit: StepCommit
    files: dict[str, bytes]
    """All documents of the step, sealed, by key."""

    parts: dict[int, HeldPart] = field(default_factory=dict)
    """Parts by the rank that saved them."""

    @property
    def key(self) -> tuple[int, str]:
        """Its name."""
        return self.commit.step, self.commit.save_id

    @property
    def holding(self) -> Holding:
        """What the other ranks need to know of it."""
        written = tuple(ref.rank for ref in self.commit.parts if ref.part)
        return Holding(
            step=self.commit.step, save_id=self.commit.save_id, written=written, held=tuple(sorted(self.parts))
        )

    def document(self, rank: int) -> PartInfo:
        """Return the document of one part."""
        key = self.commit.parts[rank].info
        return unseal(PartInfo, self.files[key], where=key)

    def publish(self, storage: MemoryStorage) -> None:
        """Let `storage` hold this step and nothing else."""
        clear(storage)
        for key, raw in self.files.items():
            storage.put(key, raw)
        for rank, part in self.parts.items():
            storage.hold(self.commit.parts[rank].part, part.data.numpy().data)

    def release(self, *, but: AbstractSet[int] = frozenset()) -> None:
        """Give back the memory of all parts `but` some."""
        for rank in self.parts.keys() - but:
            self.parts.pop(rank).release()


def clear(storage: Storage) -> None:
    """Remove all that `storage` has."""
    for stat in list(storage.list()):
        storage.delete(stat.key)


class SpreadStorage(WrappedStorage):
    """What this rank has of a step. Parts that only other ranks have count as there, for nobody here reads them."""

    def __init__(self, inner: Storage, commit: StepCommit) -> None:
        super().__init__(inner)
        self._sizes = {ref.part: ref.size_bytes for ref in commit.parts}

    @override
    def stat(self, key: str) -> Stat:
        try:
            return super().stat(key)
        except MissingError:
            if key not in self._sizes:
                raise
            return Stat(key=key, size_bytes=self._sizes[key], modified=0.0)


def keepers(part: int, world: int) -> tuple[int, int]:
    """Return the two ranks of `world` that are to have the part that rank `part` saved."""
    return part % world, (part + 1) % world


@dataclass(frozen=True, slots=True)
class Found:
    """A step that is whole in the memory of the ranks."""

    key: tuple[int, str]
    knowing: list[int]
    """The ranks that have its documents."""

    holders: dict[int, list[int]]
    """Which ranks have each part."""

    def source(self, part: int, other: int) -> int:
        """Return which rank sends `part` to the `other` one: they take turns."""
        holders = self.holders[part]
        return holders[other % len(holders)]


def newest_whole(holdings: Sequence[Iterable[Holding]]) -> Found:
    """Return the newest step of which each part is with some rank; `holdings` are what each rank says.

    Raises:
        MissingError: there is none.
    """
    steps: dict[tuple[int, str], Found] = {}
    for rank, those in enumerate(holdings):
        for holding in those:
            key = (holding.step, holding.save_id)
            found = steps.setdefault(key, Found(key, [], {part: [] for part in holding.written}))
            found.knowing.append(rank)
            for part in holding.held:
                found.holders[part].append(rank)
    if not steps:
        hint = "Restore from storage, or start anew."
        raise MissingError("no rank has a step in its memory", ranks=len(holdings), hint=hint)
    whole = [found for found in steps.values() if all(found.holders.values())]
    if whole:
        return max(whole, key=lambda found: found.key)
    lost = {key: [part for part, holders in found.holders.items() if not holders] for key, found in steps.items()}
    nearest = min(lost, key=lambda key: (len(lost[key]), -key[0]))
    raise MissingError(
        "no step is whole in memory: the ranks that had these parts are gone",
        step=nearest[0],
        parts_of_ranks=lost[nearest],
        hint="Restore from storage.",
    )


def fetch_parts(
    peers: Peers, step: HeldStep, sends: Sequence[Move], wanted: Sequence[tuple[int, int]], pool: BufferPool
) -> None:
    """Carry out `sends`, add the parts `wanted` (whose, and from whom) to `step`, and return when all ranks have verified theirs.

    Raises:
        CorruptError: what some rank received is not what was sent.
    """
    found = {part: HeldPart.new(pool, step.commit.parts[part].size_bytes) for part, _ in wanted}
    peers.exchange(sends, [Move(source, part, found[part].data) for part, source in wanted])
    fault: CorruptError | None = None
    for part, held in found.items():
        try:
            _verify(held.data, step.document(part))
            step.parts[part] = held
        except CorruptError as error:  # The others must not wait for this rank.
            fault = error
    if not peers.least(fault is None):
        raise fault or CorruptError("a part did not reach another rank as it was sent", hint="See its message.")


def _verify(data: torch.Tensor, info: PartInfo) -> None:
    view = data.numpy().data
    check_digest(view[: info.data_start], info.header_digest, where=f"{info.part} (header)")
    chunks = {chunk for entry in info.entries for chunk in chunks_of(entry, info.chunk_bytes)}
    each(lambda chunk: chunk.check(view[chunk.start : chunk.stop]), sorted(chunks), threads=_THREADS)
