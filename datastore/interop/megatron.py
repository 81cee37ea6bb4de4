r"""Megatron's indexed dataset: all tokens in a `.bin`, and an `.idx` that says where each document begins.

    "MMIDIDX\0\0" | uint64 version 1 | uint8 dtype | uint64 sequences | uint64 documents + 1
    int32 lengths[sequences] | int64 pointers[sequences], in bytes | int64 documents[documents + 1], in sequences

All little-endian. Each of our documents is one sequence, its end-of-text id included (what Megatron's own tool calls
`--append-eod`). It knows no uint32: ids above 65,535 are int32. The `.bin` is written as a stream, of any size.

Source: https://github.com/NVIDIA/Megatron-LM (`megatron/core/datasets/indexed_dataset.py`)
"""

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import IO, Any

import numpy as np
import pyarrow as pa
from typing_extensions import override

from datastore.errors import ConfigError, CorruptError
from datastore.formats.arrow import array_of, numbers_of
from datastore.interop.base import Exporter, Folder, Format, Rows, Span, whole_files
from datastore.storage.base import Storage

__all__ = ["MEGATRON", "MegatronExporter"]

_MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<9sQBQQ")
_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""What can be tokens; 6 and 7 are floats."""

_PIECE_BYTES = 8 * 2**20


class MegatronExporter(Exporter):
    """Writes `tokens_00000.bin` and `.idx`, and further pairs when one has more than `shard_bytes`."""

    @override
    def __init__(self, folder: Folder, schema: pa.Schema, *, shard_bytes: int) -> None:
        kind: Any = schema.field("tokens").type if "tokens" in schema.names else pa.null()
        if kind not in (pa.list_(pa.field("item", pa.uint16(), False)), pa.list_(pa.field("item", pa.uint32(), False))):
            raise ConfigError(
                "Megatron reads tokens alone", columns=schema.names, hint="Export records to another format."
            )
        self._dtype = np.dtype("<u2" if kind.value_type == pa.uint16() else "<i4")
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._pairs = 0
        self._open = ExitStack()
        self._bin: IO[bytes] | None = None
        self._lengths: list[Any] = []

    @override
    def write(self, rows: pa.Table) -> None:
        for chunk in rows.column("tokens").chunks:
            lists: Any = chunk
            offsets = numbers_of(lists.offsets)
            values = numbers_of(lists.values.slice(int(offsets[0]), int(offsets[-1] - offsets[0])))
            if self._dtype.kind == "i" and values.size and int(values.max()) > np.iinfo(np.int32).max:
                raise ConfigError("Megatron has no id above 2^31 - 1", largest=int(values.max()), hint="Export to mds.")
            if self._bin is None:
                self._bin = self._open.enter_context(self._folder.open(f"tokens_{self._pairs:05}.bin"))
            self._bin.write(np.ascontiguousarray(values, self._dtype).data)
            self._lengths.append(np.diff(offsets).astype(np.int32))
            if self._bin.tell() >= self._shard_bytes:
                self._finish()

    @override
    def close(self) -> None:
        if self._bin is not None or not self._pairs:
            self._finish()

    def _finish(self) -> None:
        name = f"tokens_{self._pairs:05}"
        if self._bin is None:
            self._folder.put(f"{name}.bin", b"")
        self._open.close()
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int32)
        pointers = np.zeros(lengths.size, np.int64)
        np.cumsum(lengths[:-1], out=pointers[1:])
        code = next(code for code, dtype in _CODES.items() if dtype == self._dtype.name)
        self._folder.put(
            f"{name}.idx",
            _HEAD.pack(_MAGIC, 1, code, lengths.size, lengths.size + 1),
            lengths.astype("<i4").data,
            (pointers * self._dtype.itemsize).astype("<i8").data,
            np.arange(lengths.size + 1, dtype="<i8").data,
        )
        self._pairs += 1
        self._bin, self._lengths = None, []


class _Index:
    """An `.idx` in a storage; only the parts that are asked for are read."""

    def __init__(self, storage: Storage, key: str) -> None:
        self.key = f"{key.removesuffix('.bin')}.idx"
        self._storage = storage
        size = storage.stat(self.key).size_bytes
        if size < _HEAD.size:
            raise self.damaged("it ends within its header")
        magic, version, code, self.sequences, bounds = _HEAD.unpack(self._read(0, _HEAD.size))
        if magic != _MAGIC or version != 1:
            raise self.damaged("its header is another")
        if code not in _CODES:
            raise ConfigError("its values are no tokens", file=self.key, code=code, hint="Import indexed tokens.")
        self.dtype = np.dtype(_CODES[code]).newbyteorder("<")
        self.documents = bounds - 1
        self._starts = (_HEAD.size, _HEAD.size + 4 * self.sequences, _HEAD.size + 12 * self.sequences)
        wanted = self._starts[2] + 8 * bounds
        if bounds < 1 or size not in (wanted, wanted + self.sequences):  # With one more byte per sequence: its mode.
            raise self.damaged("its size is not that of its tables")
        if (self.bounds(0, 0)[0], self.bounds(self.documents, self.documents)[0]) != (0, self.sequences):
            raise self.damaged("its documents do not cover all sequences")

    def damaged(self, reason: str) -> CorruptError:
        """Return the error that says what is wrong with it."""
        return CorruptError(f"not an index of Megatron: {reason}", where=self.key, hint="Restore it from a copy.")

    def lengths(self, start: int, stop: int) -> Any:
        """Return the tokens of each sequence."""
        return np.frombuffer(self._read(self._starts[0] + 4 * start, self._starts[0] + 4 * stop), "<i4")

    def pointers(self, start: int, stop: int) -> Any:
        """Return the byte at which each sequence begins."""
        return np.frombuffer(self._read(self._starts[1] + 8 * start, self._starts[1] + 8 * stop), "<i8")

    def bounds(self, start: int, stop: int) -> Any:
        """Return the first sequence of each document from `start` on, and of the one after the last."""
        found = np.frombuffer(self._read(self._starts[2] + 8 * start, self._starts[2] + 8 * (stop + 1)), "<i8")
        if (np.diff(found) < 0).any() or found[0] < 0 or found[-1] > self.sequences:
            raise self.damaged("its documents do not ascend")
        return found

    def first_from(self, byte: int, end: int) -> int:
        """Return the first document that begins at `byte` or later; `end` is the size of the `.bin`."""

        def start(document: int) -> int:
            sequence = int(self.bounds(document, document)[0])
            return int(self.pointers(sequence, sequence + 1)[0]) if sequence < self.sequences else end

        return _bisect(self.documents, lambda document: start(document) < byte)

    def _read(self, start: int, stop: int) -> bytes:
        return self._storage.get_ranges(self.key, [(start, stop)])[0]


def _bisect(count: int, before: Callable[[int], bool]) -> int:
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if before(middle) else (low, middle)
    return low


def _schema(storage: Storage, key: str) -> pa.Schema:
    return pa.schema([("tokens", pa.list_(pa.from_numpy_dtype(_Index(storage, key).dtype)))])


def _read(storage: Storage, key: str, span: Span) -> Iterator[Rows]:
    index = _Index(storage, key)
    size = storage.stat(key).size_bytes
    first, last = index.first_from(span[0], size), index.first_from(span[1], size)
    if span[1] >= size:
        last = index.documents
    step = 65_536
    while first < last:
        stop = min(first + step, last)
        bounds = index.bounds(first, stop)
        begin, offsets = _places(index, bounds, size)
        taken = min(len(offsets) - 1, max(1, int(np.searchsorted(offsets, _PIECE_BYTES // index.dtype.itemsize))))
        yield first, _table(storage, key, index.dtype, begin, offsets[: taken + 1])
        step = max(64, 2 * taken)
        first += taken


def _places(index: _Index, bounds: Any, size_bytes: int) -> tuple[int, Any]:
    """Return the byte at which the first document begins, and where each one begins and ends, in tokens from there."""
    first, last = int(bounds[0]), int(bounds[-1])
    lengths = index.lengths(first, last).astype(np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    pointers = index.pointers(first, last)
    begin = int(pointers[0]) if pointers.size else 0
    if (lengths < 0).any() or (pointers != begin + ends[:-1] * index.dtype.itemsize).any():
        raise index.damaged("its sequences do not lie end to end")
    if begin < 0 or begin + int(ends[-1]) * index.dtype.itemsize > size_bytes:
        raise index.damaged("it leads beyond the end of its .bin")
    return begin, ends[bounds - first]


def _table(storage: Storage, key: str, dtype: np.dtype[Any], begin: int, offsets: Any) -> pa.Table:
    stop = begin + dtype.itemsize * int(offsets[-1])
    raw = storage.get_ranges(key, [(begin, stop)])[0] if stop > begin else b""
    values = array_of(np.frombuffer(raw, dtype))
    lists: Any = pa.ListArray
    return pa.table({"tokens": lists.from_arrays(array_of(offsets.astype(np.int32)), values)})


MEGATRON = Format(files=whole_files(".bin"), schema=_schema, read=_read, can_be_cut=True)
