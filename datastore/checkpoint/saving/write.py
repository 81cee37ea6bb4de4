"""One rank's share of one save: pieces of tensors become one part file and one document that says what is in it.

Pieces that are as they were in the last save are not written again: their entry points into the earlier part. To find
out they are hashed first, up to the first chunk that differs, which costs half of what copying does. A piece that the
last two saves found different is not asked again until it happens to be the same: dense training pays once.

Nothing here renames, appends or reuses a name: a part is there whole or not at all.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch
from typing_extensions import Buffer

from datastore.checkpoint.format.manifest import CHUNK_BYTES, Entry, PartInfo, StepRef, chunks_of, info_key, part_key
from datastore.checkpoint.items import item_digests
from datastore.checkpoint.ranks import SavingRank
from datastore.checkpoint.saving.snapshot import BufferPool, Captured, Snapshot
from datastore.checkpoint.tensors import DTYPES, Bytes, byte_view
from datastore.digest import digest_hex
from datastore.document import seal
from datastore.errors import MissingError
from datastore.formats.safetensors import ITEM_BYTES, HeaderTensor, encode_header
from datastore.storage.base import Storage
from datastore.storage.errors import conflict
from datastore.storage.ranges import total_bytes
from datastore.threads import each, in_thread

__all__ = ["Known", "Staged", "describe_share", "digests_of", "share_header", "stage", "write_share"]

Place: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...]]

_SLICE_BYTES = 32 * 2**20
"""How much one thread copies at a time."""


_ONE_WRITE_BYTES = 128 * 2**20
"""What is written if it is absent; more is written in several requests at once where a storage has those."""


@dataclass(frozen=True, slots=True)
class Known:
    """What is remembered of the last save or restore: which piece lies where, and which were other than before."""

    entries: dict[Place, Entry] = field(default_factory=dict)
    changing: frozenset[Place] = frozenset()

    def after(self, entries: Iterable[Entry]) -> "Known":
        """Return what is known once `entries` have been saved or restored."""
        found = {entry.place: entry for entry in entries}
        pairs = ((place, entry, self.entries.get(place)) for place, entry in found.items())
        changing = (place for place, entry, before in pairs if before and before.digests != entry.digests)
        return Known(found, frozenset(changing))

    def candidate(self, item: Captured) -> Entry | None:
        """Return the entry of the last save that may still be true of `item`, if it is worth finding out."""
        place = (item.name, item.piece.box.starts, item.piece.box.shape)
        entry = None if place in self.changing else self.entries.get(place)
        return entry if entry is not None and entry.dtype == item.spec.dtype else None


@dataclass(frozen=True, slots=True)
class Staged:
    """A share whose content no longer depends on the training program."""

    kept: tuple[Entry, ...]
    fresh: tuple[tuple[Captured, Bytes], ...]
    buffer: torch.Tensor | None = None
    """Where the bytes of `fresh` lie; None if they are read from the tensors themselves."""

    @property
    def size_bytes(self) -> int:
        """Bytes of what has to be written."""
        return sum(len(data) for _, data in self.fresh)

    def beside(self, known: Known) -> "Staged":
        """Return the share with what turns out to be as it was in the save that `known` is of, which ended after this was staged."""
        found = [(item, data, _still(known.candidate(item), data)) for item, data in self.fresh]
        same = (named for item, _, entry in found if entry is not None for named in _named(entry, item))
        return replace(
            self,
            kept=(*self.kept, *same),
            fresh=tuple((item, data) for item, data, entry in found if entry is None),
        )


def stage(
    snapshot: Snapshot, known: Known, pool: BufferPool, *, threads: int, copy: bool, lead_bytes: int = 0
) -> Staged:
    """Return the pieces of `snapshot` with their bytes fixed: copied, or looked at in place if `copy` is False.

    In place is for a caller that waits until everything is written. What is on another device, or does not lie in one
    run of memory, is copied in any case. Copies follow one another in the buffer, behind `lead_bytes` that are left free.
    """
    kept, rest = _unchanged(snapshot.pieces, known, threads)
    views = {item.name: None if copy else byte_view(item.piece.tensor) for item in rest}
    rest = _in_order(rest)
    total = sum(item.size_bytes for item in rest if views[item.name] is None)
    buffer = pool.take(lead_bytes + total) if lead_bytes + total else None
    fresh, moves, position = [], [], lead_bytes
    for item in rest:
        data = views[item.name]
        if data is None:
            target = _slice(buffer, position, item)
            position += item.size_bytes
            moves.append((target, item))
            data = target.numpy()
        fresh.append((item, data))
    _copy(moves, threads)
    again, fresh = _recognized(fresh, known)
    return Staged((*kept, *again), tuple(fresh), buffer)


def _in_order(items: Iterable[Captured]) -> list[Captured]:
    """Return `items` as they stand in a part: falling item size aligns each tensor, names make the file a function of the state."""
    return sorted(items, key=lambda item: (-ITEM_BYTES[item.spec.dtype], item.name))


def _unchanged(pieces: Sequence[Captured], known: Known, threads: int) -> tuple[list[Entry], list[Captured]]:
    """Return the entries of pieces that are as they were, and the other pieces."""
    found = each(lambda item: _still(known.candidate(item), byte_view(item.piece.tensor)), pieces, threads=threads)
    kept = [named for item, entry in zip(pieces, found, strict=True) if entry for named in _named(entry, item)]
    return kept, [item for item, entry in zip(pieces, found, strict=True) if entry is None]


def _recognized(
    fresh: Sequence[tuple[Captured, Bytes]], known: Known
) -> tuple[list[Entry], list[tuple[Captured, Bytes]]]:
    """Return the entries of pieces that could be compared only once they were copied, and the rest of `fresh`."""
    kept: list[Entry] = []
    rest = []
    for item, data in fresh:
        entry = _still(known.candidate(item), data) if byte_view(item.piece.tensor) is None else None
        if entry is None:
            rest.append((item, data))
        else:
            kept.extend(_named(entry, item))
    return kept, rest


def _still(entry: Entry | None, data: Bytes | None) -> Entry | None:
    """Return `entry` if `data` are the bytes it describes."""
    if entry is None or data is None or len(data) != entry.stop - entry.start:
        return None
    for chunk in chunks_of(entry, CHUNK_BYTES):
        if digest_hex(data[chunk.start - entry.start : chunk.stop - entry.start].data) != chunk.digest:
            return None
    return entry


def _slice(buffer: torch.Tensor | None, start: int, item: Captured) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8) if buffer is None else buffer[start : start + item.size_bytes]


def _copy(moves: Sequence[tuple[torch.Tensor, Captured]], threads: int) -> None:
    """Copy each piece into its bytes; those of this memory in parallel, while those of devices queue."""
    devices = {item.piece.tensor.device for _, item in moves if item.piece.tensor.device.type == "cuda"}
    for device in devices:
        torch.cuda.synchronize(device)  # What was queued before the save must be in it.
    for target, item in moves:
        if byte_view(item.piece.tensor) is None and item.size_bytes:
            shaped = target.view(DTYPES[item.spec.dtype]).view(item.piece.box.shape)
            shaped.copy_(item.piece.tensor, non_blocking=True)
    each(lambda slices: np.copyto(*slices), _slices(moves), threads=threads)
    for device in devices:
        torch.cuda.synchronize(device)


def _slices(moves: Iterable[tuple[torch.Tensor, Captured]]) -> Iterator[tuple[Bytes, Bytes]]:
    for target, item in moves:
        source = byte_view(item.piece.tensor)
        if source is not None:
            data = target.numpy()
            for start in range(0, len(source), _SLICE_BYTES):
                yield data[start : start + _SLICE_BYTES], source[start : start + _SLICE_BYTES]


def share_header(items: Iterable[Captured], *, run_id: str, step: int) -> bytes:
    """Return the header of a part that holds `items`. Its length is the same for all runs."""
    tensors = [HeaderTensor(item.name, item.spec.dtype, item.piece.box.shape) for item in _in_order(items)]
    return encode_header(tensors, metadata={"format": "pt", "run": run_id, "step": str(step)})


def write_share(member: SavingRank, run_id: str, ref: StepRef, *, snapshot: Snapshot, staged: Staged) -> PartInfo:
    """Write this rank's part, if there is anything new, and its document; return the document.

    Raises:
        StorageError: the storage failed; nothing that a commit could name is there.
    """
    digests = in_thread(lambda: digests_of(staged))  # While the disk is busy with the part.
    try:
        if staged.fresh:
            header = share_header((item for item, _ in staged.fresh), run_id=run_id, step=ref.step)
            part = part_key(ref, member.rank)
            _put_part(member.storage, part, header, *(data.data for _, data in staged.fresh if len(data)))
    finally:
        wait([digests])  # It reads memory that the caller gives to others.
    info = describe_share(member, run_id, ref, snapshot=snapshot, staged=staged, digests=digests.result())
    member.storage.put_new(info_key(ref, member.rank), seal(info))
    return info


def _put_part(storage: Storage, key: str, *chunks: Buffer) -> None:
    """Write a part, whose name no other save has.

    Put-if-absent goes to a bucket in one request, of 5 GiB at most, for parts of a request are put together without a condition on some. So there
    what is large is only looked for before. That tells two processes that take themselves for one rank, as does the document, which is put if absent.
    """
    if "://" not in storage.url or total_bytes(chunks) <= _ONE_WRITE_BYTES:
        storage.put_new(key, *chunks)
        return
    with suppress(MissingError):
        storage.stat(key)
        raise conflict(key=key, url=storage.url)
    storage.put(key, *chunks)


def describe_share(
    member: SavingRank, run_id: str, ref: StepRef, *, snapshot: Snapshot, staged: Staged, digests: Sequence[str]
) -> PartInfo:
    """Return the document of this rank's part, in which the pieces of `staged` have `digests`."""
    part, header = "", b""
    if staged.fresh:
        part = part_key(ref, member.rank)
        header = share_header((item for item, _ in staged.fresh), run_id=run_id, step=ref.step)
    return PartInfo(
        run_id=run_id,
        step=ref.step,
        save_id=ref.save_id,
        rank=member.rank,
        world=member.world,
        part=part,
        size_bytes=len(header) + staged.size_bytes,
        data_start=len(header),
        header_digest=digest_hex(header) if part else "",
        chunk_bytes=CHUNK_BYTES,
        entries=(*staged.kept, *_entries(part, len(header), staged, digests)),
        items=item_digests(snapshot.items),
        own_items=snapshot.own_items,
    )


def _entries(part: str, data_start: int, staged: Staged, digests: Sequence[str]) -> Iterator[Entry]:
    position = data_start
    for (item, data), found in zip(staged.fresh, digests, strict=True):
        entry = Entry(
            tensor=item.name,
            dtype=item.spec.dtype,
            global_shape=item.spec.shape,
            shape=item.piece.box.shape,
            offsets=item.piece.box.starts,
            part=part,
            start=position,
            stop=position + len(data),
            digests=found,
        )
        position = entry.stop
        yield from _named(entry, item)


def _named(entry: Entry, item: Captured) -> Iterator[Entry]:
    """Yield the entry under each name that the same memory has."""
    for name in (item.name, *item.aliases):
        yield Entry(
            tensor=name,
            dtype=entry.dtype,
            global_shape=entry.global_shape,
            shape=entry.shape,
            offsets=entry.offsets,
            part=entry.part,
            start=entry.start,
            stop=entry.stop,
            digests=entry.digests,
        )


def digests_of(staged: Staged) -> list[str]:
    """Return the digests of the chunks of each piece of `staged` that has to be written."""
    return [
        "".join(digest_hex(data[start : start + CHUNK_BYTES].data) for start in range(0, len(data), CHUNK_BYTES))
        for _, data in staged.fresh
    ]
