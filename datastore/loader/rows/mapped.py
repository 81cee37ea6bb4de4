"""Batches of shards on this machine whose texts and bytes stay where they are: in the file, and in the page cache of the kernel.

A batch is read and checked once, as any other. What is kept of it is where each value starts, and the columns of plain numbers; its
texts are then copied out of the file row by row, by the kernel (`loader.cache.files.Copier`). So ranks of one machine share
the memory, and what a loader takes of its own does not grow with its windows.

It pays where rows are long. Short ones are kept in memory, where a row costs less.
"""

import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datastore.dataset.shards.batches import BatchReader, InPlace
from datastore.dataset.snapshot import Dataset
from datastore.loader.cache.files import map_ahead
from datastore.loader.rows.gather import Held, Values, held, is_takeable

__all__ = ["MappedBatches"]

_LONG_BYTES = 1_024
"""Bytes of a row, on the average of a shard, from which on they stay in the file."""

_MAPS = 16_384
"""Files mapped at a time; a quarter of what Linux allows a process by default (vm.max_map_count)."""

_OVERHEAD_BYTES = 1_024
"""Of the objects that a batch is made of."""


class MappedBatches:
    """The batches of `dataset` that can be read so. Thread-safe."""

    def __init__(self, dataset: Dataset) -> None:
        self._reader = BatchReader(dataset.storage, dataset.segments, schema=dataset.schema)
        self._lock = threading.Lock()
        self._maps: WeakValueDictionary[Path, npt.NDArray[np.uint8]] = WeakValueDictionary()
        """Each ends when no batch of it is kept."""

    def read(self, shard: int, batch: int, *, columns: Sequence[str] | None = None) -> Held | None:
        """Return one batch of a shard, deleted rows too; None if it does not lie in one file here, or its rows are short.

        Raises:
            MissingError, CorruptError, StorageError: it cannot be read, or is damaged.
        """
        if not hasattr(os, "memfd_create") or not self._is_long(shard):
            return None
        place = self._reader.read_in_place(shard, batch, columns=columns)
        if place is None:
            return None
        whole = held(place.rows)
        if whole.others is not None and not all(map(is_takeable, whole.others.schema.types)):
            return None
        found = self._map(place)
        return None if found is None else _placed(whole, place, found)

    def _is_long(self, shard: int) -> bool:
        info = self._reader.info(shard)
        return info.size_bytes >= _LONG_BYTES * info.documents

    def _map(self, place: InPlace) -> "npt.NDArray[np.uint8] | None":
        with self._lock:
            found = self._maps.get(place.path)
            if found is None and len(self._maps) < _MAPS:
                try:
                    found = self._maps[place.path] = _mapped(place.path)
                except OSError:  # It was read a moment ago: let it stay in memory.
                    return None
        return found if found is not None and len(found.data) == place.size_bytes else None


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    """Return a file, for the kernel to read."""
    # Arrow maps it and lets go of the descriptor; `mmap.mmap` would keep one per map.
    with pa.memory_map(str(path)) as file:
        return np.frombuffer(memoryview(file.read_buffer()).cast("B"), np.uint8)


def _placed(whole: Held, place: InPlace, file: npt.NDArray[np.uint8]) -> Held:
    """Return a batch whose texts lie in `file`, and all else in memory of its own."""
    columns = {name: _values(values, place, file.data) for name, values in whole.columns.items()}
    others = whole.others
    if others is not None:
        others = pa.ipc.read_record_batch(others.serialize(), others.schema)
    kept = [values.data.nbytes for values in columns.values() if not values.mapped]
    kept += [values.offsets.nbytes for values in columns.values() if values.offsets is not None]
    kept += [values.there.nbytes for values in columns.values() if values.there is not None]
    size_bytes = sum(kept) + (0 if others is None else others.nbytes) + _OVERHEAD_BYTES
    return Held(columns, others, size_bytes)


def _values(values: Values, place: InPlace, file: memoryview) -> Values:
    if values.offsets is None:
        return replace(values, data=memoryview(values.data.tobytes()))
    offsets = memoryview(values.offsets.tobytes()).cast(values.offsets.format)  # type: ignore[call-overload]
    start = pa.py_buffer(values.data).address - place.address
    if 0 <= start <= start + values.data.nbytes <= place.size_bytes:
        data = file[start : start + values.data.nbytes]
        map_ahead(pa.py_buffer(data).address, data.nbytes)
        return replace(values, data=data, offsets=offsets, mapped=True)
    return replace(values, data=memoryview(values.data.tobytes()), offsets=offsets)  # It was made when rows were read.
