"""Parts packed for a place that is far or dear: fewer bytes, the same tensors; whoever reads need not be told.

A part `parts/X.safetensors` is stored either as it is, or packed as `parts/X.safetensors.packed`. `PackedParts` makes of the second what the first would
be: to all code above it there is one kind of part, with the same bytes at the same places, so the digests of a step are of the tensors, not
of how they are stored, and hold in every place.

    magic, 8 bytes | length of the index, 8 bytes | index | frames

A frame is up to 4 MiB of one tensor, or of small ones. Its bytes are parted by their place within an element - first all lowest bytes, then all second
ones ... - because signs and exponents repeat themselves and fractions do not; each plane is stored by zstd (level 1), or as it is where that gains less than 5 %.

Of trained weights and AdamW's state it takes 0.64 to 0.85 of the bytes, at some 1 GB/s for each thread (docs/benchmarks-checkpoint.md). So
it is for places that take less than that, never for a disk of this machine.
"""

import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
import zstandard
from numpy.typing import NDArray
from typing_extensions import Buffer, override

from datastore.checkpoint.format.manifest import is_part_key
from datastore.document import Count, Document, Positive, Sealed, seal, unseal
from datastore.errors import CorruptError, MissingError
from datastore.formats.safetensors import ITEM_BYTES
from datastore.storage.base import Stat, Storage
from datastore.storage.wrappers import WrappedStorage
from datastore.threads import each

__all__ = ["PACKED_SUFFIX", "Bytes", "Codec", "PackedParts", "with_codec"]

Codec = Literal["none", "zstd"]

Bytes = NDArray[np.uint8]

PACKED_SUFFIX = ".packed"
"""Of the name of a part that is stored packed."""

_MAGIC = b"dspack01"

_FRAME_BYTES = 4 * 2**20
"""As large as a chunk with a digest, and cut where chunks are."""

_ALONE_BYTES = 2**20
"""A tensor of so many bytes has frames of its own."""

_GAIN = 0.95

_LARGEST_FRAME_BYTES = 2**26

_THREADS = 2

_HEAD_BYTES = 2**16
"""Read at once in the hope that the index is in it."""


class Frame(Document, frozen=True, kw_only=True):
    """Bytes of a part that are packed together."""

    size_bytes: Count
    item_bytes: Positive
    """How many planes they are parted into."""

    planes: tuple[Count, ...]
    """Bytes of each plane as it is stored; as many as it has: not compressed."""


class PackedIndex(Sealed, frozen=True, kw_only=True):
    """What is in a packed part: the frames, in the order of the bytes that they are of."""

    size_bytes: Count
    frames: tuple[Frame, ...]


@dataclass(frozen=True)
class _Packed:
    index: PackedIndex
    data_start: int

    @cached_property
    def starts(self) -> list[int]:
        """Where each frame starts in the part as it was, and where that ends."""
        return list(accumulate((frame.size_bytes for frame in self.index.frames), initial=0))

    @cached_property
    def places(self) -> list[int]:
        """Where each frame is stored."""
        return list(accumulate((sum(frame.planes) for frame in self.index.frames), initial=self.data_start))


def with_codec(storage: Storage, codec: Codec = "none") -> Storage:
    """Return `storage` with packed parts read as what they are of, and new ones stored by `codec`."""
    if isinstance(storage, PackedParts) and codec in ("none", storage.codec):
        return storage
    return PackedParts(storage.inner if isinstance(storage, PackedParts) else storage, codec)


class PackedParts(WrappedStorage):
    """A storage of a run whose parts may be packed. Asks for a packed part only where there is no plain one."""

    def __init__(self, inner: Storage, codec: Codec) -> None:
        super().__init__(inner)
        self.codec = codec
        self._lock = threading.Lock()
        self._known: dict[str, _Packed | None] = {}

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        if self._packs(key):
            self._forget(key)
            self.inner.put(key + PACKED_SUFFIX, *pack(chunks))
        else:
            self.inner.put(key, *chunks)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        if self._packs(key):
            self._forget(key)
            self.inner.put_new(key + PACKED_SUFFIX, *pack(chunks))
        else:
            self.inner.put_new(key, *chunks)

    @override
    def get(self, key: str) -> bytes:
        packed = self._packed(key)
        return self.inner.get(key) if packed is None else self._range(key, packed, 0, packed.index.size_bytes).tobytes()

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        packed = self._packed(key)
        if packed is None:
            return self.inner.get_ranges(key, ranges)
        return [self._range(key, packed, start, stop).tobytes() for start, stop in ranges]

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        packed = self._packed(key)
        if packed is None:
            self.inner.read_into(key, start, target)
        else:
            view = np.frombuffer(memoryview(target), dtype=np.uint8)
            view[:] = self._range(key, packed, start, start + len(view))

    @override
    def stat(self, key: str) -> Stat:
        packed = self._packed(key)
        if packed is None:
            return self.inner.stat(key)
        return Stat(key, packed.index.size_bytes, self.inner.stat(key + PACKED_SUFFIX).modified)

    @override
    def local_path(self, key: str) -> Path | None:
        return self.inner.local_path(key) if self._packed(key) is None else None

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        """Yield packed parts by the names of what they are of, with the bytes that they take."""
        found = (
            Stat(stat.key.removesuffix(PACKED_SUFFIX), stat.size_bytes, stat.modified)
            for stat in self.inner.list(folder)
        )
        yield from sorted(found, key=lambda stat: stat.key)

    @override
    def delete(self, key: str) -> None:
        self.inner.delete(key)
        if is_part_key(key, "safetensors"):
            self._forget(key)
            self.inner.delete(key + PACKED_SUFFIX)

    def _packs(self, key: str) -> bool:
        return self.codec != "none" and is_part_key(key, "safetensors")

    def _forget(self, key: str) -> None:
        with self._lock:
            self._known.pop(key, None)

    def _packed(self, key: str) -> _Packed | None:
        """Return the index of `key` if it is stored packed."""
        if not is_part_key(key, "safetensors"):
            return None
        with self._lock:
            if key in self._known:
                return self._known[key]
        found: _Packed | None = None
        try:
            self.inner.stat(key)
        except MissingError:
            found = self._index(key)
            if found is None:
                return None  # It is not there at all, yet.
        with self._lock:
            self._known[key] = found
        return found

    def _index(self, key: str) -> _Packed | None:
        name = key + PACKED_SUFFIX
        try:
            size = self.inner.stat(name).size_bytes
        except MissingError:
            return None
        head = self.inner.get_ranges(name, [(0, min(size, _HEAD_BYTES))])[0]
        length = int.from_bytes(head[8:16], "little")
        if head[:8] != _MAGIC or 16 + length > size:
            raise _damaged(key, "it has no index")
        raw = head[16 : 16 + length]
        if len(raw) < length:
            raw = self.inner.get_ranges(name, [(16, 16 + length)])[0]
        index = unseal(PackedIndex, raw, where=name)
        sizes = [frame.size_bytes for frame in index.frames]
        if sum(sizes) != index.size_bytes or max(sizes, default=0) > _LARGEST_FRAME_BYTES:
            raise _damaged(key, "its index does not add up")
        return _Packed(index, 16 + length)

    def _range(self, key: str, packed: _Packed, start: int, stop: int) -> Bytes:
        """Return the bytes [start, stop) of the part as it was.

        Raises:
            CorruptError: it is not so long, or a frame cannot be unpacked.
        """
        if stop > packed.index.size_bytes:
            raise _damaged(key, f"it ends at {packed.index.size_bytes:,}")
        result = np.empty(stop - start, dtype=np.uint8)
        starts, places = packed.starts, packed.places
        first, last = bisect_right(starts, start) - 1, bisect_right(starts, stop - 1)
        if start < stop:
            raw = self.inner.get_ranges(key + PACKED_SUFFIX, [(places[first], places[last])])[0]
        for number in range(first, last) if start < stop else ():
            here = raw[places[number] - places[first] : places[number + 1] - places[first]]
            data = _unpacked(key, packed.index.frames[number], here)
            begin = starts[number]
            low, high = max(begin, start), min(begin + len(data), stop)
            result[low - start : high - start] = data[low - begin : high - begin]
        return result


def _damaged(key: str, reason: str) -> CorruptError:
    hint = "Restore it from a copy, or use an earlier step."
    return CorruptError(f"a packed part is damaged: {reason}", part=key, hint=hint)


def pack(chunks: Sequence[Buffer]) -> list[bytes]:
    """Return the file of a packed part, whose bytes are `chunks` laid end to end; takes memory for what comes out."""
    pieces = [np.frombuffer(memoryview(chunk), dtype=np.uint8) for chunk in chunks]
    cuts = _cuts(pieces[0], sum(map(len, pieces)))
    whole = _Laid(pieces)
    packed = each(lambda cut: _packed_frame(whole.range(*cut[:2]), cut[2]), cuts, threads=_THREADS)
    frames = tuple(frame for frame, _ in packed)
    raw = seal(PackedIndex(size_bytes=whole.size_bytes, frames=frames))
    return [_MAGIC, len(raw).to_bytes(8, "little"), raw, *chain.from_iterable(planes for _, planes in packed)]


class _Laid:
    """Pieces of memory laid end to end."""

    def __init__(self, pieces: Sequence[Bytes]) -> None:
        self._pieces = pieces
        self._starts = list(accumulate(map(len, pieces), initial=0))
        self.size_bytes = self._starts[-1]

    def range(self, start: int, stop: int) -> Bytes:
        found = [
            piece[max(start - begin, 0) : stop - begin]
            for piece, begin in zip(self._pieces, self._starts[:-1], strict=True)
            if begin < stop and start < begin + len(piece)
        ]
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, dtype=np.uint8), *found])


def _cuts(first: Bytes, size_bytes: int) -> list[tuple[int, int, int]]:
    """Return start, stop and item size of each frame of a safetensors file that begins with `first`."""
    header = 8 + int.from_bytes(first[:8].tobytes(), "little")
    table: dict[str, Any] = orjson.loads(first[8:header].tobytes())
    spans = sorted(
        (*entry["data_offsets"], 1 if entry["dtype"] == "F4" else ITEM_BYTES[entry["dtype"]])
        for name, entry in table.items()
        if name != "__metadata__"
    )
    groups: list[tuple[int, int, int]] = [(0, header, 1)]
    for start, stop, item in spans:
        begin, end, before = groups[-1]
        small = end - begin < _ALONE_BYTES and stop - start < _ALONE_BYTES and item == before and begin >= header
        groups[-1:] = [(begin, header + stop, item)] if small else [groups[-1], (header + start, header + stop, item)]
    assert groups[-1][1] == size_bytes
    return [
        (at, min(at + _FRAME_BYTES, stop), item)
        for start, stop, item in groups
        for at in range(start, stop, _FRAME_BYTES)
    ]


def _packed_frame(data: Bytes, item_bytes: int) -> tuple[Frame, list[bytes]]:
    compressor = zstandard.ZstdCompressor(level=1)
    planes = []
    for number in range(item_bytes):
        plane = np.ascontiguousarray(data[number::item_bytes])
        small = compressor.compress(plane.data)
        planes.append(small if len(small) < _GAIN * len(plane) else plane.tobytes())
    return Frame(size_bytes=len(data), item_bytes=item_bytes, planes=tuple(map(len, planes))), planes


def _unpacked(key: str, frame: Frame, raw: bytes) -> Bytes:
    result = np.empty(frame.size_bytes, dtype=np.uint8)
    expected, at = frame.size_bytes // frame.item_bytes, 0
    if len(frame.planes) != frame.item_bytes or frame.size_bytes % frame.item_bytes:
        raise _damaged(key, "a frame does not add up")
    for number, length in enumerate(frame.planes):
        plane = raw[at : at + length]
        at += length
        try:
            data = plane if length == expected else zstandard.ZstdDecompressor().decompress(plane, expected)
        except zstandard.ZstdError as error:
            raise _damaged(key, str(error)) from None
        if len(data) != expected:
            raise _damaged(key, "a plane has another length")
        result[number :: frame.item_bytes] = np.frombuffer(data, dtype=np.uint8)
    return result
